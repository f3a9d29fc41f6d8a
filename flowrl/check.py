"""What runs on this machine, and why: ``flowrl check``, or ``python scripts/check_device.py``."""

import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
import tyro
from torch import Tensor

from flowrl.attention.flow import cpu, flow_attention, triton
from flowrl.attention.flow.blocks import causal_flow_blocks
from flowrl.attention.flow.operators import check_error
from flowrl.machine import available_cores, available_memory
from flowrl.model.transformer import ModelConfig, SequenceModel
from flowrl.native.acting import can_pack
from flowrl.native.kernels import SWITCH, kernels_enabled
from flowrl.native.library import installed_compiler
from flowrl.native.linear import FEWEST_ROWS, OneDNNLinear, library_is_held_back

WIDTH = 64  # of the heads of the paper's model
SHAPES = ((16, 4, 60, WIDTH), (1, 4, 3072, WIDTH))  # batch, heads, tokens, width: windows, an episode
REPETITIONS = 3
GIB = 1 << 30
Result = TypeVar("Result")
_CPUINFO = Path("/proc/cpuinfo")


def run_check() -> str:
    """The command, whose only option is --help."""
    return tyro.cli(describe_device)


def describe_device() -> str:
    """Show the machine, which hand-written kernels are used, and the error and speed of attention's."""
    device = torch.device("cpu")
    reason = _why_not(device, cpu)
    lines = [*_machine(), *_attention(device, cpu, "C++", reason)]
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        lines += _attention(device, triton, "Triton", _why_not(device, triton))
    lines += _others(reason)
    return "\n".join(f"{name:20}{text}" for name, text in lines)


def _machine() -> list[tuple[str, str]]:
    cores, memory = available_cores(), available_memory()
    size = f", {memory / GIB:.0f} GiB" if memory else ""
    vectors = torch.backends.cpu.get_cpu_capability()
    processor = f"{_cpuinfo('model name') or platform.machine()}, {cores} cores{size}, vectors: {vectors}"
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(_cpuinfo("flags", "Features").split())
    compiler = installed_compiler()
    return [
        ("processor", f"{processor}, bfloat16: {'native' if native else 'emulated'}"),
        ("CUDA device", _cuda_device()),
        ("software", f"Python {platform.python_version()}, torch {torch.__version__}, {_triton_version()}"),
        ("compiler", "none; g++ or the one that CXX names" if compiler is None else " ".join(compiler)),
        (SWITCH, f"{os.environ.get(SWITCH, 'not set')}: kernels are {'on' if kernels_enabled() else 'off'}"),
    ]


def _cuda_device() -> str:
    if not torch.cuda.is_available():
        return "none" if torch.version.cuda else "none; this torch is built for CPUs alone"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{device}, bfloat16: {'native' if native else 'emulated'}"


def _triton_version() -> str:
    try:
        return f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "no Triton"


def _attention(device: torch.device, form: ModuleType, name: str, reason: str) -> list[tuple[str, str]]:
    """Flow-Attention on a device by torch and by the faster form, unless there is a reason not to."""
    sizes = " and ".join(" x ".join(map(str, shape)) for shape in SHAPES)
    fast = "not used"
    if not reason:
        error = check_error(form, device, torch.float32, WIDTH)
        fast = f"{_speed(flow_attention, device)}, largest difference from torch {error:.0e}"
    return [
        ("Flow-Attention", f"{device.type.upper()}, forward and backward of {sizes}, float32"),
        ("  torch", _speed(_by_torch, device)),
        (f"  {name}", f"{fast}: {reason}" if reason else fast),
    ]


def _why_not(device: torch.device, form: ModuleType) -> str:
    """Why a form of Flow-Attention is not used; empty where it is."""
    if not kernels_enabled():
        return f"{SWITCH} is off"
    if form is cpu and installed_compiler() is None:
        return "there is no compiler"
    available, message = _with_warning(
        lambda: form.is_available(torch.float32 if form is cpu else device, WIDTH)
    )
    if not available:
        return message or "not made for this system or device"
    tokens = torch.zeros(1, 1, 1, WIDTH, device=device)
    return _with_warning(lambda: flow_attention(tokens, tokens, tokens))[1]  # of a check that failed


def _others(reason: str) -> list[tuple[str, str]]:
    """Acting and linear layers; ``reason`` is why C++ is not used, if it is not."""
    model = SequenceModel(ModelConfig(observation_dim=3, action_dim=1, max_timesteps=9))
    acts, message = _with_warning(lambda: not reason and can_pack(model))
    linear = "not used: not a processor with AVX-512 of another maker than Intel"
    if not kernels_enabled():
        linear = f"not used: {SWITCH} is off"
    elif library_is_held_back():
        _, failed = _with_warning(lambda: OneDNNLinear(8, 8)(torch.zeros(FEWEST_ROWS, 8)))
        linear = f"not used: {failed}" if failed else "used"
    return [
        ("Acting in C++", "used" if acts else f"not used: {reason or message}"),
        ("Linear by oneDNN", linear),
    ]


def _with_warning(function: Callable[[], Result]) -> tuple[Result, str]:
    """What a function returns, and the first warning of a kernel that is not used."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    messages = [str(warning.message) for warning in caught]
    return result, next((text for text in messages if "torch" in text and "used" in text), "")


def _by_torch(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return causal_flow_blocks(queries, keys, values, clamp=10.0, eps=1e-6)[0]


def _speed(attention: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device) -> str:
    """The shortest time of a few forward and backward passes for each of the shapes."""
    times = []
    for shape in SHAPES:
        inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
        seconds = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            attention(*inputs).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        times.append(f"{1e3 * min(seconds):.3g} ms")
    return " and ".join(times)


def _cpuinfo(*names: str) -> str:
    """The first value of one of these names in the processor's description (Linux)."""
    for line in _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
