"""Linear layers through oneDNN, for processors on which MKL keeps to half-width vectors.

On processors with AVX-512 that are not Intel's, MKL, which torch multiplies by, uses AVX2 alone: oneDNN,
which torch brings as well, is twice as fast there (``results/benchmarks/ablation.md``).
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowrl.native.kernels import is_trusted, largest_difference

FEWEST_ROWS = 128  # below, oneDNN's preparations take longer than they save
CHECK_ROWS, CHECK_INPUTS, CHECK_OUTPUTS, TOLERANCE = 130, 24, 40, 1e-4
_CPUINFO = Path("/proc/cpuinfo")


class OneDNNLinear(nn.Linear):
    """``nn.Linear``, whose products and their gradients are oneDNN's for float32 batches on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        supported = (
            input.device.type == "cpu"
            and input.dtype == self.weight.dtype == torch.float32
            and input.numel() >= FEWEST_ROWS * self.in_features
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        )
        if supported and is_trusted("linear layers by oneDNN", "float32", _error, TOLERANCE):
            return _Linear.apply(input, self.weight, self.bias)
        return super().forward(input)


@cache
def library_is_held_back() -> bool:
    """Whether the processor has wider vectors than MKL uses on it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    return _CPUINFO.exists() and "GenuineIntel" not in _CPUINFO.read_text()


class _Linear(torch.autograd.Function):
    """``apply(x, weight, bias)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        g_x = onednn_product(rows, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        return g_x, onednn_product(rows.T, x.flatten(0, -2).T), rows.sum(0)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (rows, inputs), (outputs, inputs), (outputs,) -> (rows, outputs)."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


def _error() -> float:
    """How far a small product and its gradients are from nn.Linear's."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    inputs = (drawn(CHECK_ROWS, CHECK_INPUTS), drawn(CHECK_OUTPUTS, CHECK_INPUTS), drawn(CHECK_OUTPUTS))
    results = []
    for product in (_Linear.apply, torch.nn.functional.linear):
        outputs = product(*inputs)
        results.append((outputs, *torch.autograd.grad(outputs.square().sum(), inputs)))
    scale = max(float(x.detach().abs().max()) for x in results[1])
    return largest_difference(*results) / scale
