"""Dropout with cheap random numbers on the CPU, where torch's own costs a tenth of a training update."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 16  # a component is dropped where one of this many equally likely numbers is below a threshold


class Dropout(nn.Module):
    """In training, drop each component with ``probability`` and scale the others up to keep the mean.

    On the CPU one 64-bit draw of torch's global generator serves four components, where ``nn.Dropout`` draws
    for each: several times faster. The probability is rounded to a multiple of 2^-16, the scale to match it.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> the same shape; x itself in evaluation."""
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.probability)
        return x * dropout_factors(x, round(self.probability * LEVELS))

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


def dropout_factors(x: Tensor, dropped_levels: int) -> Tensor:
    """Return factors of x's shape and type: 0 for ``dropped_levels`` of the 2^16 levels, else the scale."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits of each
    levels = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over -2^15 ... 2^15 - 1
    factors = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(levels, dropped_levels - LEVELS // 2, out=factors)
    return factors.mul_(LEVELS / (LEVELS - dropped_levels))
