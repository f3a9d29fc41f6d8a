"""The Triton kernels against the naive form: on a GPU where there is one, else in Triton's interpreter.

Without a GPU they are also compiled for several, and what they take is held against what these have. Triton
must be installed on Linux, where the test extra brings it: without it these tests fail.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_forms import assert_all_close, computed_by, tokens, with_gradients
from test_attention import extreme_inputs

from flowrl.attention import naive_flow_attention
from flowrl.attention.flow import triton

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no Triton for this system"),
    pytest.mark.usefixtures("unwritten_is_nan"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.filterwarnings("ignore:cumsum_cuda_kernel does not have a deterministic implementation"),
]
triton_flow_attention = computed_by(triton)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB that a block may take, by compute capability


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim"),
    [
        (1, 2, 1, 16),
        (1, 2, 59, 64),  # a window of 20 timesteps
        (2, 1, 65, 16),  # two blocks
        (1, 1, 131, 32),  # three
    ],
)
def test_outputs_and_gradients_are_the_naive_ones(batch, heads, length, head_dim):
    shape = {"batch": batch, "heads": heads, "head_dim": head_dim, "value_dim": head_dim}
    inputs = on_device(*tokens(length, **shape, dtype=torch.float32))
    for options in ({}, {"clamp": 0.3, "eps": 0.05}, {"eps": 0.0}) if length < 64 else ({"clamp": 0.9},):
        exact = with_gradients(naive_flow_attention, *(x.double() for x in inputs), **options)
        actual = with_gradients(triton_flow_attention, *inputs, **options)
        assert all(x.dtype == torch.float32 for x in actual)
        assert_all_close(actual, exact, 3e-6)


def test_an_empty_batch_has_empty_outputs_and_gradients():
    inputs = on_device(*tokens(65, batch=0, head_dim=16, value_dim=16, dtype=torch.float32))
    assert [x.shape for x in with_gradients(triton_flow_attention, *inputs)] == [inputs[0].shape] * 4


@pytest.mark.parametrize(("length", "dtype"), [(40, torch.float16), (70, torch.bfloat16)])
def test_half_precision_is_summed_in_float32(length, dtype):
    shape = {"heads": 1, "head_dim": 32, "value_dim": 32}
    inputs = on_device(*(x.to(dtype) for x in tokens(length, **shape)))
    exact = with_gradients(naive_flow_attention, *(x.double() for x in inputs))
    actual = with_gradients(triton_flow_attention, *inputs)
    for value, reference in zip(actual, exact, strict=True):
        assert value.dtype == dtype
        # The final rounding (the interpreter cuts off) and, on a GPU, products of TensorFloat-32; several
        # blocks take the gradient by an output's scale from its rounded value. Flows summed in bfloat16
        # would be off by percents.
        allowed = 2**-7 * reference.abs() + (2**-10 if length < 64 else 2**-7) * reference.abs().max()
        assert ((value.double() - reference).abs() <= allowed).all()


@pytest.mark.parametrize("length", [60, 70])
def test_slices_of_a_projection_are_read_in_place(length):
    """As the model hands them over: (batch, length, 3, heads, head_dim), permuted; gradients come strided."""
    projected = torch.randn(2, length, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = torch.randn(2, 2, length // 3, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for attention in (triton_flow_attention, naive_flow_attention):
        inputs = projected.clone().requires_grad_()
        outputs = attention(*inputs.permute(2, 0, 3, 1, 4))
        (outputs[:, :, 1::3] * weight[:, :, : len(range(1, length, 3))]).sum().backward()
        results.append((outputs.detach(), inputs.grad))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's: 1 / (1 + inf) is 0
def test_extreme_inputs_stay_finite():
    cases = extreme_inputs(66, 16)
    queries, keys = (torch.stack(tensors) for tensors in zip(*cases.values(), strict=True))
    values = 2e4 * torch.rand(len(cases), 1, 66, 16, generator=torch.Generator().manual_seed(4)) - 1e4
    inputs = on_device(queries, keys, values)
    results = with_gradients(triton_flow_attention, *inputs, 1.0)
    expected = with_gradients(naive_flow_attention, *(x.double() for x in inputs), 1.0)
    for row, case in enumerate(cases):
        assert all(result[row].isfinite().all() for result in results), case
        assert (results[0][row] - expected[0][row]).abs().max() <= 1e-4 * expected[0][row].abs().max(), case


def shared_memory(cases, folder):
    """KiB that the kernels of each case take; see triton_ahead.py."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, str(Path(__file__).with_name("triton_ahead.py")), json.dumps(cases)]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [{name: taken / 1024 for name, taken in case.items()} for case in json.loads(result.stdout)]


def assert_fits(cases, taken):
    """The kernels that are chosen for a device take no more than it has, and those left out would."""
    for (capability, width, *_), kernels in zip(cases, taken, strict=True):
        fit = max(kernels.values()) <= SHARED_MEMORY[capability]
        assert triton.fits(divmod(capability, 10), width) == fit, (capability, width, kernels)


def test_a_kernel_compiles_and_takes_no_more_shared_memory_than_there_is(tmp_path):
    """The kernel with the most shared memory."""
    cases = [(86, 64, "float32", ["grad_inputs_kernel"])]
    assert_fits(cases, shared_memory(cases, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_at_every_width(tmp_path, capability, dtype):
    cases = [(capability, width, dtype, None) for width in (16, 64, 128)]
    taken = shared_memory(cases, tmp_path)
    assert [len(kernels) for kernels in taken] == [12] * 3
    assert_fits(cases, taken)
