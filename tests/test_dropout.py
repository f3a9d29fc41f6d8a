"""Dropout by bits against what dropout is: independent zeros, the mean kept, and repeatable."""

import math

import pytest
import torch

from flowrl.model.dropout import Dropout


def dropped(probability, shape, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = Dropout(probability).train()(x)
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_share_scale_and_gradient(probability):
    y, gradient = dropped(probability, (1000, 1003))
    kept = y != 0
    error = 5 * math.sqrt(probability * (1 - probability) / y.numel())  # five standard errors
    assert abs(kept.float().mean().item() - (1 - probability)) < error + 2**-17
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - probability)), rtol=2e-4)
    assert torch.equal(gradient, y)  # of ones: the factors themselves
    assert abs(y.double().mean().item() - 1) < error / (1 - probability)


def test_neighbours_rows_and_calls_are_independent():
    """The four components that share a draw above all: neighbours fall together by chance only."""
    torch.manual_seed(1)
    layer = Dropout(0.3).train()
    first, second = (layer(torch.ones(500, 1000)) == 0 for _ in range(2))
    flat = first.flatten().double()
    for distance in (1, 2, 3, 4, 5, 8, 1000):
        together = (flat[distance:] * flat[:-distance]).mean().item()
        assert together == pytest.approx(0.09, abs=5 * math.sqrt(0.09 * 0.91 / flat.numel()) * 1.5), distance
    assert (first & second).double().mean().item() == pytest.approx(0.09, abs=0.003)
    assert first.double().mean(0).min() > 0.2  # no column is spared, none always dropped
    assert first.double().mean(0).max() < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 5)])
def test_any_shape_and_type(shape, dtype):
    y, _ = dropped(0.5, shape, dtype=dtype)
    assert y.shape == shape
    assert y.dtype == dtype
    assert set(y.flatten().tolist()) <= {0.0, 2.0}


def test_the_global_generator_decides():
    first, _ = dropped(0.1, (50, 50), seed=3)
    assert torch.equal(dropped(0.1, (50, 50), seed=3)[0], first)
    assert not torch.equal(dropped(0.1, (50, 50), seed=4)[0], first)
    torch.manual_seed(3)
    layer = Dropout(0.1).train()
    layer(torch.ones(50, 50))
    state = torch.get_rng_state()
    following = layer(torch.ones(50, 50))
    torch.set_rng_state(state)
    assert torch.equal(layer(torch.ones(50, 50)), following)
    assert not torch.equal(following, first)


def test_nothing_is_dropped_in_evaluation_or_at_zero():
    x = torch.randn(10, 10)
    state = torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), state)
