"""The precision of sums: float32 (float64 for float64 inputs), whatever the inputs and the autocast state."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all sums for inputs of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of x."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
