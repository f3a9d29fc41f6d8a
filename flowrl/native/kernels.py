"""Whether hand-written kernels are used: one switch for all, and a check before the first use of each.

``FLOWRL_KERNELS=off`` in the environment disables every kernel (C++, Triton): plain torch computes instead.
"""

import os
import warnings
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

SWITCH = "FLOWRL_KERNELS"
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_trusted: dict[tuple[str, Hashable], bool] = {}


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
            error = in_clean_thread(check)
        except Exception as failure:  # whatever goes wrong in a kernel must not stop a run
            give_up(key, f"failed: {failure}")
        else:
            _trusted[key] = error <= tolerance
            if not _trusted[key]:
                give_up(key, f"differs from torch by {error:.2g}")
    return _trusted[key]


def in_clean_thread(function: Callable[[], Result]) -> Result:
    """Call ``function`` free of what this thread has set: no_grad, inference mode, autocast, tracing.

    Its work on a CUDA device stays in this thread's stream.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def call() -> Result:
        with torch.cuda.stream(stream):
            return function()

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result()


def constant_when_compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``torch.compile`` takes what ``function`` returns for a constant.

    As ``torch.compiler.assume_constant_result``, without its import of the compiler, which takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def largest_difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest absolute difference between tensors pair by pair; infinite where one is not finite."""
    pairs = zip(results, expected, strict=True)
    differences = [float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs]
    return max(x if x == x else float("inf") for x in differences)


def give_up(key: tuple[str, Hashable], reason: str) -> None:
    """Trust a kernel no longer for a case, and warn."""
    _trusted[key] = False
    warnings.warn(f"{key[0]} {reason}; torch is used instead", stacklevel=4)
