"""Acting with a Flow-Attention model on CPUs: one call of C++ (``acting.cpp``) for all blocks of a timestep.

It computes what :meth:`flowrl.model.transformer.SequenceModel.read` does, block after block, without the cost
of a few dozen calls of torch and without threads that wait for each other; the weights are packed once for
many timesteps.
"""

import ctypes
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.attention.flow import FlowState, empty_flow_state
from flowrl.attention.flow.cpu import MOST_STEPS, WIDTHS, flow_library
from flowrl.model.transformer import Block, SelfAttention, SequenceModel
from flowrl.native.kernels import is_trusted, largest_difference
from flowrl.native.library import native_library

SOURCE = Path(__file__).with_name("acting.cpp")
WIDTH_MULTIPLE = 32  # which every panel's width divides
PANEL = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16  # columns stored together
FLOW_EPS = 1e-6  # the default of flow_attention_step
CHECK_BATCH, TOLERANCE = 3, 1e-4  # of an error relative to the largest number


@cache
def acting_library() -> ctypes.CDLL | None:
    """The C++; None where it cannot be built."""
    return native_library(SOURCE, ("act",), ("REAL=float", f"PANEL={PANEL}"))


def can_pack(model: SequenceModel) -> bool:
    """Whether C++ computes what the model's blocks do, once proven for its shape."""
    config, weight = model.config, model.predict_action.weight
    shape = (config.embed_dim, config.num_heads, config.num_layers)
    head_dim = config.embed_dim // config.num_heads
    return (
        config.attention == "flow"
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and config.embed_dim % WIDTH_MULTIPLE == 0
        and head_dim in WIDTHS
        and all(_is_known(block) for block in model.blocks)
        and flow_library(torch.float32, head_dim) is not None
        and acting_library() is not None
        and is_trusted("acting in C++", shape, partial(_error, model), TOLERANCE)
    )


class PackedBlocks:
    """A model's blocks, with a copy of their weights in the order that C++ reads; see :func:`can_pack`."""

    def __init__(self, model: SequenceModel) -> None:
        self._model, self._num_heads = model, model.config.num_heads
        parts = [part for block in model.blocks for module in _parts(block) for part in _packed(module)]
        self._weights = torch.cat(parts)

    def read(self, tokens: Tensor, layers: tuple) -> tuple[Tensor, tuple]:
        """See :meth:`SequenceModel.read`, which does what C++ cannot; ``layers`` are changed."""
        if not _can_read(tokens, layers):
            return SequenceModel.read(self._model, tokens, layers)
        batch, num_tokens, width = tokens.shape
        head_dim = width // self._num_heads
        like = tokens.new_empty(batch, self._num_heads, head_dim)
        states: tuple[FlowState, ...] = tuple(
            empty_flow_state(like, like) if state is None else state for state in layers
        )
        library, flow = acting_library(), flow_library(torch.float32, head_dim)
        assert library is not None
        assert flow is not None
        norm_eps = self._model.final_norm.eps
        sizes = (num_tokens, batch, width, self._num_heads, len(states))
        acting = _Acting(*sizes, norm_eps, FLOW_EPS, self._model.config.source_clamp, torch.get_num_threads())
        pointers = [tensor.data_ptr() for state in states for tensor in state]
        last, in_turn = tokens.new_empty(batch, width), tokens.transpose(0, 1).contiguous()
        library.act(
            ctypes.byref(acting),
            ctypes.cast(flow.flow_steps, ctypes.c_void_p),
            ctypes.c_void_p(self._weights.data_ptr()),
            (ctypes.c_void_p * len(pointers))(*pointers),
            ctypes.c_void_p(in_turn.data_ptr()),
            ctypes.c_void_p(last.data_ptr()),
        )
        return last, states


class _Acting(ctypes.Structure):
    """Mirrors the C++ struct."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "batch", "width", "heads", "layers")),
        *((name, ctypes.c_double) for name in ("norm_eps", "flow_eps", "clamp")),
        ("threads", ctypes.c_int64),
    ]


def _can_read(tokens: Tensor, layers: tuple[FlowState | None, ...]) -> bool:
    """Whether the tokens are few, float32 and without a gradient."""
    return (
        tokens.device.type == "cpu"
        and tokens.dtype == torch.float32
        and tokens.shape[1] <= MOST_STEPS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(tensor.is_contiguous() for state in layers if state is not None for tensor in state)
    )


def _is_known(block: nn.Module) -> bool:
    """Whether a block has the parts that C++ computes; with another activation, for one, it does not."""
    if type(block) is not Block or len(block.mlp) != 3 or type(block.mlp[1]) is not nn.ReLU:
        return False
    return all(
        isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None for module in _parts(block)
    )


def _parts(block: nn.Module) -> list[nn.Module]:
    """The modules with weights, in the order of use."""
    assert isinstance(block, Block)
    assert isinstance(block.attention, SelfAttention)
    attention, widen, narrow = block.attention, block.mlp[0], block.mlp[2]
    return [block.attention_norm, attention.qkv, attention.project, block.mlp_norm, widen, narrow]


def _packed(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a module, flat."""
    assert isinstance(module, nn.Linear | nn.LayerNorm)
    weight = module.weight.detach()
    if isinstance(module, nn.Linear):  # (outputs, inputs) -> panels (inputs, PANEL)
        weight = weight.unflatten(0, (-1, PANEL)).mT
    return weight.flatten(), module.bias.detach()


def _error(model: SequenceModel) -> float:
    """How far two reads of a few tokens, and the states after them, are from torch's."""
    generator = torch.Generator().manual_seed(0)
    packed, results = PackedBlocks(model), []
    reads = [
        torch.randn(CHECK_BATCH, tokens, model.config.embed_dim, generator=generator)
        for tokens in (MOST_STEPS - 1, 1)
    ]
    with torch.no_grad():
        for read in (packed.read, partial(SequenceModel.read, model)):
            outputs: list[Tensor] = []
            layers: tuple[Any, ...] = (None,) * model.config.num_layers  # before the first token
            for tokens in reads:
                output, layers = read(tokens, layers)
                outputs.append(output.clone())
            results.append((*outputs, *chain.from_iterable(layers)))
    scale = max(float(x.abs().max()) for x in results[1])
    return largest_difference(*results) / scale
