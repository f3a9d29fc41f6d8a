"""The C++ form of Flow-Attention as a library: compiled when first needed, kept for next time.

No package is needed to build it and no torch header to read, so it takes two seconds once per type, width of
heads and machine. Where there is no g++, :func:`native_library` returns None: torch does the work.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import torch

from flowrl.atomic import atomic_path

SOURCES = ("flow_native.cpp", "vector_math.h")
NUMBERS = {torch.float32: "float", torch.float64: "double"}
INSTRUCTIONS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}  # torch's names of them, and the compiler's
COMPILER = "g++"  # unless the environment's CXX names another
LONGEST_BUILD = 300  # seconds


class Layout(ctypes.Structure):
    """Where (batch, heads, length, width) tensors lie, in elements; mirrors the C++ struct."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length")),
        *((f"{side}_{of}", ctypes.c_int64) for side in ("in", "out") for of in ("batch", "head", "token")),
        *((name, ctypes.c_double) for name in ("eps", "clamp")),
        ("threads", ctypes.c_int64),
    ]


@cache
def native_library(dtype: torch.dtype, width: int) -> ctypes.CDLL | None:
    """The library for this type of numbers and width of heads; None where it cannot be built.

    It lies in ``$XDG_CACHE_HOME/flowrl`` (``~/.cache/flowrl``), named by its sources, compiler and flags.
    Warns where a compiler is there but fails.
    """
    command = _command(dtype, width)
    if command is None:
        return None
    folder = Path(__file__).parent
    sources = b"".join((folder / name).read_bytes() for name in SOURCES)
    try:
        version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(b"\0".join((sources, version, *map(str.encode, command)))).hexdigest()[:16]
        path = _cache_folder() / f"flow-{NUMBERS[dtype]}-{width}-{key}.so"
        if not path.exists():
            with atomic_path(path) as temporary:
                _compile([*command, "-o", str(temporary), str(folder / SOURCES[0])])
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"Flow-Attention's C++ form could not be built, torch's is used: {error}", stacklevel=2)
        return None
    for name in ("flow_forward", "flow_backward", "flow_steps"):
        getattr(library, name).restype = None
    return library


def _command(dtype: torch.dtype, width: int) -> list[str] | None:
    """The compiler and its flags; None where none is installed, or none that is known to know the machine."""
    compiler = shutil.which(os.environ.get("CXX") or COMPILER)
    architecture = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability())
    if compiler is None or architecture is None or not sys.platform.startswith("linux"):
        return None
    flags = ["-std=c++17", "-O3", f"-march={architecture}", "-fPIC", "-shared", "-fopenmp"]
    return [compiler, *flags, f"-DREAL={NUMBERS[dtype]}", f"-DWIDTH={width}"]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_BUILD)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} exited with {done.returncode}"]
        raise subprocess.SubprocessError(next((line for line in lines if "error" in line), lines[0]))


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "flowrl"
