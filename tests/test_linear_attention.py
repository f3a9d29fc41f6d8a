"""The linear kinds of attention: what makes each kind itself (test_attention.py compares their forms)."""

import math
from functools import partial

import pytest
import torch
from attention_forms import assert_all_close, stepped, tokens, with_gradients
from naive_linear import naive_cosformer_attention

from flowrl.attention import linear
from flowrl.attention.kinds import attention_kind
from flowrl.attention.linear import random_directions

NAMES = ["linear", "performer", "cosformer"]
FIRST_DIRECTIONS = [[0.007634183479121073, 1.0986133188034695], [2.032999461575345, -0.014127164341612443]]


def parallel(name):
    return attention_kind(name).parallel


def by_steps(name):
    return lambda *inputs: stepped(*inputs, step=attention_kind(name).step)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [2, 64])
@pytest.mark.parametrize("size", [1e-4, 1e2, 1e8])
def test_extreme_inputs_stay_finite(name, head_dim, size):
    generator = torch.Generator().manual_seed(3)
    sign = torch.randn(3, 1, 200, head_dim, generator=generator)
    for queries, keys in [
        (sign[0], sign[1]),
        (sign[0].abs(), -sign[1].abs()),
        (-sign[0].abs(), sign[1].abs()),
    ]:
        inputs = [size * queries[None], size * keys[None], 1e4 * sign[2][None]]
        results = with_gradients(parallel(name), *inputs, 1.0)
        assert all(result.isfinite().all() for result in results)
        steps = by_steps(name)(*inputs)
        assert steps.isfinite().all()
        assert (results[0].abs() <= 1.01e4 * sign[2].abs().max()).all()  # a mean stays among its values


def test_directions_are_orthogonal_gaussian_and_always_the_same():
    directions = random_directions(16, 40)
    assert directions.shape == (40, 16)
    for block in directions.split(16):
        gram = block @ block.mT
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-12
    many = random_directions(16, 1600)
    assert torch.equal(many[:40], directions)
    assert many.mean(0).abs().max() < 0.1
    assert (many.mT @ many / 1600 - torch.eye(16)).abs().max() < 0.1
    assert many.square().sum(-1).std() > 4  # lengths vary as a Gaussian's do: sqrt(2 * 16) = 5.7
    # The very numbers: a change would silently change what every trained Performer computes.
    torch.testing.assert_close(random_directions(2, 2), torch.tensor(FIRST_DIRECTIONS).double())


def test_performer_estimates_softmax_attention(monkeypatch):
    """The error falls as with the square root of the number of features."""
    q, k, v, _ = tokens(150)
    exact = attention_kind("softmax").parallel(0.2 * q, 0.2 * k, v)
    errors = []
    for features in (4, 64):
        monkeypatch.setattr(linear, "FEATURES_PER_DIMENSION", features)
        linear._directions_on.cache_clear()
        errors.append((parallel("performer")(0.2 * q, 0.2 * k, v) - exact).std().item())
    linear._directions_on.cache_clear()
    mean_of_values = v.cumsum(2) / torch.arange(1, 151)[:, None]  # what uniform weights would give
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.5 * (mean_of_values - exact).std()


@pytest.mark.parametrize("max_tokens", [300, 4096])
def test_cosformer_reweights_by_distance(max_tokens):
    """Forms agree within M, at it and beyond it, where no weight is negative."""
    kind = attention_kind("cosformer", max_tokens)
    inputs = tokens(700)
    expected = with_gradients(partial(naive_cosformer_attention, max_tokens=max_tokens), *inputs)
    assert_all_close(with_gradients(kind.parallel, *inputs), expected, 1e-10)
    assert (stepped(*inputs[:3], step=kind.step) - expected[0]).abs().max() < 1e-10
    ones, values = torch.ones(1, 1, 700, 4).double(), torch.eye(700).double()[None, None]
    weights = kind.parallel(ones, ones, values)[0, 0]  # row i: the weights of the past, summing to 1
    relative = weights / weights.diagonal()[:, None]
    for i, j in ((5, 0), (250, 10), (299, 0), (300, 0), (301, 1), (699, 0), (699, 298), (699, 500)):
        distance = min(i, max_tokens) - min(j, max_tokens)
        assert abs(relative[i, j] - math.cos(math.pi / 2 * distance / max_tokens)) < 1e-10
    assert weights.min() > -1e-12
