"""The C++ form of Flow-Attention against the naive one, and what happens where it cannot be built.

There must be a compiler: without one these tests fail.
"""

import atexit
import sys
import tempfile
import warnings

import pytest
import torch
from attention_forms import assert_all_close, computed_by, tokens, with_gradients
from processes import Command, finish

from flowrl.attention import flow_attention, naive_flow_attention
from flowrl.attention.flow import cpu
from flowrl.attention.flow.cpu import WIDTHS
from flowrl.native import library

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="C++ is built on Linux alone"),
    pytest.mark.usefixtures("unwritten_is_nan"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
cpp_flow_attention = computed_by(cpu)
SIZES = [*((length, 16) for length in (1, 2, 63, 64, 65, 129, 3000)), *((140, width) for width in WIDTHS[1:])]


def inputs_of(length, width, *, dtype=torch.float64, batch=2, heads=2, seed=0):
    return tokens(length, batch=batch, heads=heads, head_dim=width, value_dim=width, seed=seed, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "width"), SIZES)
def test_outputs_and_gradients_are_the_naive_ones(length, width, dtype):
    inputs = inputs_of(length, width, heads=1 if length > 1000 else 2)
    cast = [tensor.to(dtype) for tensor in inputs]
    assert cpu.supports(*cast[:3])
    for options in ({}, {"clamp": 0.9}, {"clamp": 0.3}, {"eps": 0.05}):
        expected = with_gradients(naive_flow_attention, *inputs, **options)
        actual = with_gradients(cpp_flow_attention, *cast, **options)
        assert actual[0].dtype == dtype
        assert_all_close(actual, expected, TOLERANCE[dtype])


def test_slices_of_one_projection_and_any_other_layout_give_the_same():
    inputs = inputs_of(70, 16)
    expected = with_gradients(cpp_flow_attention, *inputs)
    packed = torch.stack([tensor.transpose(1, 2) for tensor in inputs[:3]], dim=2).requires_grad_()
    output = cpp_flow_attention(*packed.permute(2, 0, 3, 1, 4))  # (batch, length, 3, heads, width) before
    (output * inputs[3]).sum().backward()
    gradients = [packed.grad[:, :, index].transpose(1, 2) for index in range(3)]
    assert all(map(torch.equal, (output.detach(), *gradients), expected))
    mixed = (inputs[0].transpose(2, 3).contiguous().transpose(2, 3), *inputs[1:])
    assert all(map(torch.equal, with_gradients(cpp_flow_attention, *mixed), expected))


def test_neither_threads_nor_other_sequences_change_a_bit():
    inputs = inputs_of(150, 16, batch=5, dtype=torch.float32)
    expected = with_gradients(cpp_flow_attention, *inputs)
    alone = with_gradients(cpp_flow_attention, *(tensor[3:4] for tensor in inputs))
    assert all(torch.equal(a, b[3:4]) for a, b in zip(alone, expected, strict=True))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, with_gradients(cpp_flow_attention, *inputs), expected))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(cpu.forward(inputs[:3], 10.0, 1e-6, False)[0], expected[0])  # nothing kept


def test_training_takes_it_where_it_applies(monkeypatch):
    """The rest goes to torch: other widths, values of another, few long sequences."""
    called, call = [], cpu._call
    inputs = inputs_of(8, 16, dtype=torch.float32)[:3]
    flow_attention(*inputs)  # the first use checks the library
    monkeypatch.setattr(cpu, "_call", lambda name, *rest: (called.append(name), call(name, *rest)))
    flow_attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        flow_attention(*(tensor.bfloat16() for tensor in inputs))
    assert called == ["flow_forward", "flow_forward"]
    called.clear()
    flow_attention(*inputs, causal=False)
    flow_attention(*(tensor[..., :8] for tensor in inputs))
    flow_attention(inputs[0], inputs[1], inputs[2][..., :5])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    flow_attention(*inputs_of(65, 16, dtype=torch.float32)[:3])
    assert called == []


@pytest.fixture
def build(monkeypatch):
    """A function that attends in this environment as in a new process; the warnings of it."""
    caches = (library.native_library, library._cache_folder, cpu.flow_library)

    def forget():
        for cached in caches:
            cached.cache_clear()

    def attend(**environment):
        forget()
        for name in ("CXX", "HOME", "TMPDIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(tempfile, "tempdir", None)
        x = torch.ones(1, 1, 3, 16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert flow_attention(x, x, x).isfinite().all()
        return [str(warning.message) for warning in caught]

    yield attend
    forget()


def test_without_a_compiler_torch_does_the_work(build, tmp_path):
    assert build(PATH=tmp_path, XDG_CACHE_HOME=tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("says", ["exit 3", "echo 'some error: no AVX' >&2; exit 1"])
def test_a_compiler_that_fails_is_reported(build, tmp_path, says):
    compiler = tmp_path / "broken-compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{says}\n')
    compiler.chmod(0o755)
    (told,) = build(CXX=compiler, XDG_CACHE_HOME=tmp_path / "cache")
    assert "could not be built, torch's forms are used" in told
    assert ("no AVX" if "AVX" in says else "exited with 3") in told
    assert list((tmp_path / "cache" / "flowrl").iterdir()) == []  # nothing half-written


def quick_compiler(folder):
    """A compiler that optimises nothing and notes its arguments in ``folder``/calls."""
    compiler = folder / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    return f"env LANG=C {compiler}"  # with arguments of its own, as "ccache g++" has


@pytest.mark.parametrize("home", [{"XDG_CACHE_HOME": "a-file"}, {"HOME": "/proc/no"}])
def test_without_a_folder_for_libraries_a_temporary_one_serves(build, tmp_path, monkeypatch, home):
    (tmp_path / "a-file").write_text("a file where a folder should be")
    (tmp_path / "temporary").mkdir()
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda *call, **options: at_exit.append((call, options)))
    places = {name: tmp_path / path for name, path in home.items()}
    assert build(CXX=quick_compiler(tmp_path), TMPDIR=tmp_path / "temporary", **places) == []
    assert f"-o {tmp_path}/temporary/flowrl-" in (tmp_path / "calls").read_text()
    (((remove, *arguments), options),) = at_exit
    remove(*arguments, **options)
    assert list((tmp_path / "temporary").iterdir()) == []


BUILD = """
import sys, torch
from flowrl.attention import flow_attention
x = torch.ones(1, 1, 3, 16)
flow_attention(x, x, x)
sys.exit()
"""


def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", quick_compiler(tmp_path))
    both = [Command([], BUILD) for _ in range(2)]
    assert [finish(process) for process in both] == [(0, "", "")] * 2
    assert [path.suffix for path in (tmp_path / "flowrl").iterdir()] == [".so"]
