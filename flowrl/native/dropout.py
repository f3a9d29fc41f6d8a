"""Dropout that draws 16 random bits per component: torch's on a CPU takes a tenth of a whole update."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 16  # a component is dropped where one of this many equally likely numbers is below a threshold


class FastDropout(nn.Dropout):
    """``nn.Dropout`` whose probability is rounded to a multiple of 2^-16, and the scale with it.

    Draws from torch's global generator.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., width) -> the same shape; the input itself in evaluation."""
        dropped_levels = min(round(self.p * LEVELS), LEVELS - 1)
        if not self.training or dropped_levels == 0:
            return input
        if torch.compiler.is_compiling() or input.device.type != "cpu":
            return F.dropout(input, self.p)
        return input * dropout_factors(input, dropped_levels)


def dropout_factors(x: Tensor, dropped_levels: int) -> Tensor:
    """Return factors of x's shape and type: 0 for ``dropped_levels`` of the 2^16 levels, else the scale."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits of each
    levels = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over -2^15 ... 2^15 - 1
    factors = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(levels, dropped_levels - LEVELS // 2, out=factors)
    return factors.mul_(LEVELS / (LEVELS - dropped_levels))
