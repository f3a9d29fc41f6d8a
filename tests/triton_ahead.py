"""Compiles the Triton kernels for CUDA devices that need not be there; a script that test_triton.py runs.

Takes JSON, a list of [compute capability, width of heads, dtype, names of kernels or null for all], and
prints JSON: for each the bytes of shared memory of its kernels.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from flowrl.attention.flow import triton, triton_kernels

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
NUMBERS = {int: "i32", float: "fp32"}
OPTIONS = ("num_warps", "num_stages")
LENGTHS = (60, 130)  # a window, several blocks


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


def recorded_launches(width, dtype):
    """(kernel, arguments, options) of all launches of a forward and a backward pass of each length."""
    launches = []
    for name, kernel in list(vars(triton_kernels).items()):
        if name.endswith("_kernel"):
            original = kernel.kernel if isinstance(kernel, Recorder) else kernel
            setattr(triton_kernels, name, Recorder(original, launches))
    for length in LENGTHS:
        *inputs, g_outputs = torch.zeros(4, 1, 2, length, width, dtype=dtype)
        triton.backward(inputs, g_outputs, triton.forward(inputs, 10.0, 1e-6, True), 10.0, 1e-6)
    return launches


def shared_memory(kernel, arguments, options, capability):
    """Bytes of it that a kernel takes when compiled for a device."""
    names = kernel.arg_names[: len(arguments)]
    types = (POINTERS[x.dtype] if torch.is_tensor(x) else NUMBERS[type(x)] for x in arguments)
    constants = {name: x for name, x in options.items() if name not in OPTIONS}
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    chosen = {name: x for name, x in options.items() if name in OPTIONS}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=chosen).metadata.shared


def main():
    found = []
    for capability, width, dtype, names in json.loads(sys.argv[1]):
        taken = {}
        for kernel, arguments, options in recorded_launches(width, getattr(torch, dtype)):
            name = kernel.fn.__name__
            if names is None or name in names:
                taken[name] = shared_memory(kernel, arguments, options, capability)
        found.append(taken)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
