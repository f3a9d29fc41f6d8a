"""C++ for CPUs as libraries: compiled when first needed, kept for next time.

No package is needed to build one and no torch header to read, so it takes seconds, once a machine. Without a
compiler :func:`native_library` returns None: torch does the work.
"""

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

from flowrl.atomic import atomic_path

FOLDER = Path(__file__).parents[1]  # which headers are included from
INSTRUCTIONS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}  # torch's names of them, and the compiler's
COMPILER = "g++"  # unless the environment's CXX names another
LONGEST_BUILD = 300  # seconds


@cache
def native_library(
    source: Path, functions: tuple[str, ...], defined: tuple[str, ...] = ()
) -> ctypes.CDLL | None:
    """The library of this C++ file, whose functions return nothing; None where it cannot be built.

    ``defined`` are macros, as "NAME=value". The compiler is the environment's CXX, g++ by default. The
    library lies in ``$XDG_CACHE_HOME/flowrl`` (``~/.cache/flowrl``), named by its sources, compiler and
    flags; where that folder cannot be written, in a temporary folder of this process. Warns where a compiler
    is there but fails.
    """
    compiler = installed_compiler()
    architecture = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability())
    if compiler is None or architecture is None or not sys.platform.startswith("linux"):
        return None
    flags = ["-std=c++17", "-O3", f"-march={architecture}", "-fPIC", "-shared", "-fopenmp"]
    command = [*compiler, *flags, *(f"-D{macro}" for macro in defined)]
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        headers = (header.read_bytes() for header in sorted(FOLDER.rglob("*.h")))
        parts = (source.read_bytes(), *headers, version, *map(str.encode, command))
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        path = _cache_folder() / f"{source.stem}-{key}.so"
        if not path.exists():
            with atomic_path(path) as temporary:
                _compile([*command, f"-I{FOLDER}", "-o", str(temporary), str(source)])
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"{source.name} could not be built, torch's forms are used: {error}", stacklevel=2)
        return None
    for name in functions:
        getattr(library, name).restype = None
    return library


def installed_compiler() -> list[str] | None:
    """The compiler with its own arguments, such as "ccache g++"; None where it is not installed."""
    try:
        words = shlex.split(os.environ.get("CXX") or COMPILER)
    except ValueError:  # a quotation without an end
        return None
    return words if words and shutil.which(words[0]) else None


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_BUILD)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} exited with {done.returncode}"]
        raise subprocess.SubprocessError(next((line for line in lines if "error" in line), lines[0]))


@cache
def _cache_folder() -> Path:
    """Where libraries are kept; created."""
    try:
        home = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(home) if home else Path.home() / ".cache") / "flowrl"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home
        pass
    temporary = tempfile.mkdtemp(prefix="flowrl-")  # readable by this user alone: it holds code that is run
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)
