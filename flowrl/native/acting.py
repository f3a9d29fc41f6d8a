"""Acting with a Flow-Attention model on CPUs: one call of C++ (``acting.cpp``) for all blocks of a timestep.

It computes what :meth:`flowrl.model.transformer.Block.steps` does, block after block, without what a few
dozen calls of torch cost and without threads that wait for each other; the weights are put in order once for
many steps.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from flowrl.attention.flow import FlowState, empty_flow_state
from flowrl.attention.flow.cpu import MOST_STEPS, WIDTHS, flow_library
from flowrl.native.library import native_library
from flowrl.native.products import WIDTH_MULTIPLE

SOURCE = Path(__file__).with_name("acting.cpp")
NORM_EPS, FLOW_EPS, CLAMP = 1e-5, 1e-6, 10.0  # of nn.LayerNorm and flow_attention_step


@cache
def acting_library() -> ctypes.CDLL | None:
    """The C++; None where it cannot be built."""
    return native_library(SOURCE, ("pack_weight", "act"), ("REAL=float",))


class PackedBlocks:
    """The weights of a model's blocks, in the order in which C++ reads them; a copy of this moment."""

    def __init__(self, blocks: list[list[nn.Linear | nn.LayerNorm]], num_heads: int) -> None:
        """``blocks`` are the modules of each in the order of use, on a CPU; see :func:`can_pack`."""
        self.num_layers, self.num_heads = len(blocks), num_heads
        self._weights = torch.cat([part for block in blocks for module in block for part in _packed(module)])
        self.width = blocks[0][0].weight.shape[0]

    def act(self, tokens: Tensor, states: list[FlowState | None]) -> tuple[Tensor, list[FlowState]]:
        """(tokens, batch, width) float32 -> the last tokens after all blocks (batch, width), and the states.

        ``states``, one a layer, are changed and returned; None stands for the one before the first token.
        """
        num_tokens, batch, width = tokens.shape
        head_dim = width // self.num_heads
        nothing = tokens.new_empty(batch, self.num_heads, head_dim)  # whose shape is all that matters
        known = [empty_flow_state(nothing, nothing) if state is None else state for state in states]
        library, flow = acting_library(), flow_library(torch.float32, head_dim)
        assert library is not None
        assert flow is not None
        sizes = (num_tokens, batch, width, self.num_heads, self.num_layers)
        acting = _Acting(*sizes, NORM_EPS, FLOW_EPS, CLAMP, torch.get_num_threads())
        pointers = [tensor.data_ptr() for state in known for tensor in state]
        last, tokens = tokens.new_empty(batch, width), tokens.contiguous()
        library.act(
            ctypes.byref(acting),
            ctypes.cast(flow.flow_steps, ctypes.c_void_p),
            ctypes.c_void_p(self._weights.data_ptr()),
            (ctypes.c_void_p * len(pointers))(*pointers),
            ctypes.c_void_p(tokens.data_ptr()),
            ctypes.c_void_p(last.data_ptr()),
        )
        return last, known


def can_pack(width: int, num_heads: int, weight: Tensor) -> bool:
    """Whether C++ can act for Flow-Attention blocks of this width, whose weights are like this one."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and width % WIDTH_MULTIPLE == 0
        and width // num_heads in WIDTHS
        and flow_library(torch.float32, width // num_heads) is not None
        and acting_library() is not None
    )


def can_act(tokens: Tensor, states: list[FlowState | None]) -> bool:
    """Whether packed blocks can read these tokens: few, float32, without a gradient."""
    return (
        tokens.device.type == "cpu"
        and tokens.dtype == torch.float32
        and len(tokens) <= MOST_STEPS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(tensor.is_contiguous() for state in states if state is not None for tensor in state)
    )


class _Acting(ctypes.Structure):
    """Mirrors the C++ struct."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "batch", "width", "heads", "layers")),
        *((name, ctypes.c_double) for name in ("norm_eps", "flow_eps", "clamp")),
        ("threads", ctypes.c_int64),
    ]


def _packed(module: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a module, flat."""
    weight = module.weight.detach().contiguous()
    if isinstance(module, nn.Linear):
        packed, library = torch.empty_like(weight).flatten(), acting_library()
        assert library is not None
        places = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, packed))
        library.pack_weight(*(ctypes.c_int64(size) for size in weight.shape), *places)
        weight = packed
    return weight, module.bias.detach()
