"""Whether hand-written kernels are used: one switch for all, and a check before the first use of each.

``FLOWRL_KERNELS=off`` in the environment makes every kernel (C++, Triton) step aside for plain torch.
"""

import os
import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

SWITCH = "FLOWRL_KERNELS"
_trusted: dict[Hashable, bool] = {}


def kernels_enabled() -> bool:
    """False where the environment variable FLOWRL_KERNELS is ``off``."""
    return os.environ.get(SWITCH, "on").lower() != "off"


def is_trusted(kernel: str, case: Hashable, check: Callable[[], float], tolerance: float) -> bool:
    """Whether a kernel computed the same as torch the first time it was wanted for this case.

    Args:
        kernel: its name in the warning, such as "Flow-Attention in C++".
        case: device, dtype, width: all that decides which code runs. Each case is checked once per process.
        check: computes a tiny case both ways and returns the largest difference; it may raise.
        tolerance: largest difference accepted.

    Warns once where the check fails; the caller then uses torch.
    """
    if not kernels_enabled():
        return False
    key = (kernel, case)
    if key not in _trusted:
        _trusted[key] = False  # whatever the check itself calls for this case uses torch
        try:
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
                error = check()
            reason = f"differs from torch by {error:.2g}"
            _trusted[key] = error <= tolerance
        except Exception as failure:  # whatever goes wrong in a kernel must not stop a run
            reason = f"failed: {failure}"
        if not _trusted[key]:
            warnings.warn(f"{kernel} {reason}; torch is used instead", stacklevel=3)
    return _trusted[key]


def largest_difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest absolute difference between tensors pair by pair; infinite where one is not finite."""
    pairs = zip(results, expected, strict=True)
    worst = max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)
    return worst if worst == worst else float("inf")
