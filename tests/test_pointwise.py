"""Dropout against what dropout is, and the C++ passes between matrix products against torch's operations."""

import math

import pytest
import torch
from torch import nn

from flowrl.model import pointwise
from flowrl.native.pointwise import Dropout, add_linear, linear_relu

needs_compiler = pytest.mark.skipif(
    pointwise.pointwise_library() is None, reason="no g++, or none for this machine"
)


def dropped(probability, shape, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = Dropout(probability).train()(x)
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("width", [1003, 1024])  # torch's operations, and C++
@pytest.mark.parametrize("probability", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_share_scale_and_gradient(probability, width):
    y, gradient = dropped(probability, (1000, width))
    kept = y != 0
    error = 5 * math.sqrt(probability * (1 - probability) / y.numel())  # five standard errors
    assert abs(kept.float().mean().item() - (1 - probability)) < error + 2**-17
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - probability)), rtol=2e-4)
    assert torch.equal(gradient, y)  # of ones: the factors themselves
    assert abs(y.double().mean().item() - 1) < error / (1 - probability)


@pytest.mark.parametrize("width", [1000, 1024])
def test_neighbours_rows_and_calls_are_independent(width):
    """The components that share a draw above all: neighbours fall together by chance only."""
    torch.manual_seed(1)
    layer = Dropout(0.3).train()
    first, second = (layer(torch.ones(500, width)) == 0 for _ in range(2))
    flat = first.flatten().double()
    for distance in (1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 64, width):
        together = (flat[distance:] * flat[:-distance]).mean().item()
        assert together == pytest.approx(0.09, abs=5 * math.sqrt(0.09 * 0.91 / flat.numel()) * 1.5), distance
    assert (first & second).double().mean().item() == pytest.approx(0.09, abs=0.003)
    assert first.double().mean(0).min() > 0.2  # no column is spared, none always dropped
    assert first.double().mean(0).max() < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 5), (32,), (3, 64), (2, 3, 96)])
def test_any_shape_and_type(shape, dtype):
    y, _ = dropped(0.5, shape, dtype=dtype)
    assert y.shape == shape
    assert y.dtype == dtype
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("width", [50, 64])
def test_the_global_generator_decides(width):
    first, _ = dropped(0.1, (50, width), seed=3)
    assert torch.equal(dropped(0.1, (50, width), seed=3)[0], first)
    assert not torch.equal(dropped(0.1, (50, width), seed=4)[0], first)
    torch.manual_seed(3)
    layer = Dropout(0.1).train()
    layer(torch.ones(50, width))
    state = torch.get_rng_state()
    following = layer(torch.ones(50, width))
    torch.set_rng_state(state)
    assert torch.equal(layer(torch.ones(50, width)), following)
    assert not torch.equal(following, first)


def test_nothing_is_dropped_in_evaluation_or_at_zero():
    x = torch.randn(10, 32)
    state = torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def torch_linear_relu(x, linear):
    return linear(x).relu()


def torch_add_linear(x, inputs, linear, dropout):
    """With the components that ``add_linear`` drops next, which are those that dropout alone would."""
    before = torch.get_rng_state()
    factors = dropout(torch.ones_like(x).detach())
    torch.set_rng_state(before)
    return x + factors * linear(inputs)


def results(function, tensors, linear, *more, seed=0):
    """The outputs, and the gradients of a random sum of them by all tensors and parameters."""
    torch.manual_seed(seed)
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*tensors, linear, *more)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    return outputs.detach(), *torch.autograd.grad((outputs * weights).sum(), (*tensors, *linear.parameters()))


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max())


SHAPES = [(1,), (7,), (64,), (65,), (3, 50), (2, 3, 40)]  # of rows: within a part, at its end, beyond


@needs_compiler
@pytest.mark.parametrize("rows", SHAPES)
def test_linear_relu_is_torchs(rows):
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 64), torch.randn(*rows, 96)
    assert_close(results(linear_relu, [x], linear), results(torch_linear_relu, [x], linear))


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", SHAPES)
def test_add_linear_is_torchs(rows, training):
    torch.manual_seed(0)
    linear, dropout = nn.Linear(40, 96), Dropout(0.3).train(training)
    tensors = [torch.randn(*rows, 96), torch.randn(*rows, 40)]
    actual = results(add_linear, tensors, linear, dropout)
    assert_close(actual, results(torch_add_linear, tensors, linear, dropout))
    dropped = (actual[0] == tensors[0]).float().mean()
    assert (dropped > 0) == training


@needs_compiler
def test_any_memory_layout():
    torch.manual_seed(0)
    linear, dropout = nn.Linear(32, 64), Dropout(0.3)
    x, inputs = torch.randn(5, 9, 64)[:, 1::3], torch.randn(3, 5, 32).transpose(0, 1)
    actual = results(add_linear, [x, inputs], linear, dropout)
    assert_close(actual, results(torch_add_linear, [x, inputs], linear, dropout))
    square = nn.Linear(64, 64)
    assert_close(results(linear_relu, [x], square), results(torch_linear_relu, [x], square))
    spread = torch.ones(64).expand(5, 3, 64).requires_grad_()
    torch.manual_seed(0)
    dropout(spread).sum().backward()  # whose gradient is one number, seen as many
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(5, 3, 64)), spread.grad)


@needs_compiler
def test_threads_change_no_bit():
    torch.manual_seed(0)
    x, dropout = torch.randn(300, 64), Dropout(0.2)
    before, outcomes = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            gradient, sums = torch.empty_like(x), torch.empty(5, 64)
            pointwise._call("relu_gradient", x, pointwise._NOTHING, x, x, gradient, sums)
            torch.manual_seed(1)
            outcomes.append((gradient, sums, dropout(x)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *outcomes))
    assert torch.allclose(outcomes[0][1].sum(0), x.relu().sum(0), atol=1e-4)


@needs_compiler
def test_what_is_not_a_number_is_not_hidden():
    x, linear, dropout = torch.randn(4, 64), nn.Linear(64, 64), Dropout(0.0)
    x[1, 3] = float("nan")
    assert linear_relu(x, linear)[1].isnan().all()
    assert linear_relu(x, linear)[[0, 2, 3]].isfinite().all()
    assert add_linear(torch.zeros(4, 64), x, linear, dropout)[1].isnan().all()
    assert add_linear(x, torch.zeros(4, 64), linear, dropout).isnan().sum() == 1
    assert results(linear_relu, [x], linear)[2].isnan().any()


@needs_compiler
def test_the_rest_goes_to_torch(monkeypatch):
    """Other widths, other types, and bfloat16 by autocast."""
    called = []
    call = pointwise._call
    monkeypatch.setattr(pointwise, "_call", lambda name, *rest: (called.append(name), call(name, *rest)))
    dropout, x = Dropout(0.5), torch.randn(4, 64)
    dropout(x)
    linear_relu(x, nn.Linear(64, 32))
    add_linear(x, torch.randn(4, 5), nn.Linear(5, 64), dropout)
    assert called == ["drop", "add_bias_relu", "add_residual"]
    called.clear()
    assert dropout(x[:, :40]).shape == (4, 40)
    assert linear_relu(x, nn.Linear(64, 5)).shape == (4, 5)
    assert linear_relu(x.double(), nn.Linear(64, 32).double()).dtype == torch.float64
    assert add_linear(x[:, :5], x, nn.Linear(64, 5), dropout).shape == (4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_relu(x, nn.Linear(64, 32)).dtype == torch.bfloat16
        dropout(x)
    assert called == []
