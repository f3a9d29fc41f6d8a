"""Long sequences are walked over in groups of blocks: the work must stay proportional to the length."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.attention import flow, flow_attention, naive_flow_attention


class WrittenElements(TorchDispatchMode):
    """Adds up the sizes of all tensors that operations return, views left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements += tensor.numel()
        return result


def forward_and_backward(attention, length):
    """The gradient of the queries, and how many elements were written to get it."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn((1, 2, length, 8), generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]
    with WrittenElements() as written:
        attention(*inputs).square().sum().backward()
    return inputs[0].grad, written.elements


@pytest.mark.parametrize("group", [64, 128])
def test_work_grows_as_the_length_however_many_groups_there_are(monkeypatch, group):
    for name in ("ONE_GROUP", "GROUP_TOKENS"):  # one or two blocks of 32 tokens of both sequences
        monkeypatch.setattr(flow, name, group)
    gradient, short = forward_and_backward(flow_attention, 1024)
    _, long = forward_and_backward(flow_attention, 4096)
    assert long < 4.1 * short  # a gradient of full length per group would make it eight and more
    expected, _ = forward_and_backward(naive_flow_attention, 1024)
    assert (gradient - expected).abs().max() < 1e-10
