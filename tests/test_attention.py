"""Every form of Flow-Attention against the naive one, and the naive one against a loop over the formula."""

import math
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from attention_forms import assert_all_close, saved_by, stepped, tokens, with_gradients
from naive_linear import (
    naive_cosformer_attention,
    naive_linear_attention,
    naive_performer_attention,
    naive_softmax_attention,
)

from flowrl.attention import (
    AttentionName,
    attention_kind,
    flow_attention,
    flow_attention_step,
    linear,
    naive_flow_attention,
)
from flowrl.attention.flow import blocks

LENGTHS = (1, 2, 127, 128, 129, 3000)
NAIVE = {
    "flow": naive_flow_attention,
    "softmax": naive_softmax_attention,
    "linear": naive_linear_attention,
    "performer": naive_performer_attention,
    "cosformer": naive_cosformer_attention,
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def formula_by_hand(queries, keys, values, clamp, eps=1e-6):
    """The causal definition in Python floats, one sum at a time, for (length, width) lists."""
    q = [[sigmoid(x) for x in row] for row in queries]
    k = [[sigmoid(x) for x in row] for row in keys]
    length, head_dim, value_dim = len(q), len(q[0]), len(values[0])

    def dot(x, sums):
        return sum((a + eps) * (b + eps) for a, b in zip(x, sums, strict=True))

    def sums(rows, weights):
        return [sum(w * row[c] for w, row in zip(weights, rows, strict=True)) for c in range(head_dim)]

    incoming = [dot(q[i], sums(k[: i + 1], [1] * (i + 1))) for i in range(length)]
    outgoing = [dot(k[j], sums(q[: j + 1], [1] * (j + 1))) for j in range(length)]
    result = []
    exponentials = []
    for j in range(length):
        weights = [(i + 1) / incoming[i] for i in range(j + 1)]
        conserved = dot(k[j], sums(q[: j + 1], weights)) / (j + 1)
        exponentials.append(math.exp(min(max(conserved, -clamp), clamp)))
    for i in range(length):
        weights = [(j + 1) / outgoing[j] for j in range(i + 1)]
        allocation = sigmoid(dot(q[i], sums(k[: i + 1], weights)) / (i + 1))
        row = [0.0] * value_dim
        for j in range(i + 1):
            competition = (j + 1) * exponentials[j] / sum(exponentials[: j + 1])
            pair = sum(a * b for a, b in zip(q[i], k[j], strict=True))
            row = [r + pair * competition * v for r, v in zip(row, values[j], strict=True)]
        result.append([allocation * r / incoming[i] for r in row])
    return result


@pytest.mark.parametrize("clamp", [0.3, 10.0])
def test_naive_form_is_the_formula(clamp):
    q, k, v, _ = tokens(11, heads=1, head_dim=3, value_dim=2)
    expected = formula_by_hand(q[0, 0].tolist(), k[0, 0].tolist(), v[0, 0].tolist(), clamp)
    np.testing.assert_allclose(naive_flow_attention(q, k, v, clamp=clamp)[0, 0], expected, rtol=1e-12)


def test_naive_bidirectional_form_is_the_formula():
    q, _, _, _ = tokens(4, heads=1, head_dim=3, value_dim=2)
    _, k, v, _ = tokens(7, heads=1, head_dim=3, value_dim=2, seed=1)
    actual = naive_flow_attention(q, k, v, causal=False, clamp=0.45)[0, 0]
    sinks, sources, values, eps = q[0, 0].sigmoid().numpy(), k[0, 0].sigmoid().numpy(), v[0, 0].numpy(), 1e-6
    incoming = [(x + eps) @ (sources.sum(0) + eps) for x in sinks]
    outgoing = [(x + eps) @ (sinks.sum(0) + eps) for x in sources]
    weighted_sources = sum(x / o for x, o in zip(sources, outgoing, strict=True))
    weighted_sinks = sum(x / i for x, i in zip(sinks, incoming, strict=True))
    conserved = [(x + eps) @ (weighted_sinks + eps) for x in sources]
    exponentials = np.exp(np.clip(conserved, -0.45, 0.45))
    assert (np.array(conserved) > 0.45).any()
    assert (np.array(conserved) < 0.45).any()
    competition = 7 * exponentials / exponentials.sum()
    for sink, flow_in, row in zip(sinks, incoming, actual, strict=True):
        allocation = sigmoid((sink + eps) @ (weighted_sources + eps) * 4 / 7)
        aggregated = sum(
            (sink @ source) * weight * value
            for source, weight, value in zip(sources, competition, values, strict=True)
        )
        np.testing.assert_allclose(row, allocation * aggregated / flow_in, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "length", "options"),
    [
        *((name, length, {}) for name in NAIVE for length in LENGTHS if (name, length) != ("softmax", 3000)),
        *(("flow", 200, options) for options in ({"clamp": 0.3}, {"clamp": 1.0}, {"eps": 0.05})),
    ],
)
def test_parallel_recurrent_and_naive_forms_agree(name, length, options):
    kind = attention_kind(name)
    q, k, v, weight = tokens(length, heads=1 if length > 1000 else 2, batch=1 if length > 1000 else 2)
    expected = with_gradients(NAIVE[name], q, k, v, weight, **options)
    assert not options or (expected[0] - naive_flow_attention(q, k, v, clamp=1e9)).abs().max() > 1e-4
    for dtype, tolerance in TOLERANCE.items():
        cast = [tensor.to(dtype) for tensor in (q, k, v, weight)]
        actual = with_gradients(kind.parallel, *cast, **options)
        assert actual[0].dtype == dtype
        assert_all_close(actual, expected, tolerance)
        if length < 1000 or dtype == torch.float32:  # as agents act
            outputs = stepped(*cast[:3], step=partial(kind.step, **options)).double()
            assert (outputs - expected[0]).abs().max() <= tolerance * max(1.0, expected[0].abs().max())


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 19, 47])
@pytest.mark.parametrize("name", [name for name in NAIVE if name != "softmax"])
def test_states_carry_over_blocks(monkeypatch, name, length):
    """Blocks of four tokens put every kind of boundary into a few."""
    for module in (blocks, linear):
        monkeypatch.setattr(module, "ONE_BLOCK", 4)
        monkeypatch.setattr(module, "SHORTEST_BLOCK", 4)
    inputs = tokens(length, batch=5, head_dim=4, value_dim=3)
    for options in ({}, {"clamp": 0.5}) if name == "flow" else ({},):
        expected = with_gradients(NAIVE[name], *inputs, **options)
        assert_all_close(with_gradients(attention_kind(name).parallel, *inputs, **options), expected, 1e-10)


def test_eps_and_value_width_are_honoured():
    for value_dim in (1, 8, 19):
        q, k, v, weight = tokens(150, value_dim=value_dim)
        expected = with_gradients(naive_flow_attention, q, k, v, weight, eps=0.05)
        assert_all_close(with_gradients(flow_attention, q, k, v, weight, eps=0.05), expected, 1e-10)
        assert (stepped(q, k, v, eps=0.05) - expected[0]).abs().max() < 1e-10
        assert (flow_attention(q, k, v) - expected[0]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("sinks", "sources"), [(1, 1), (5, 9), (9, 5), (300, 7), (64, 1000)])
def test_bidirectional_form_agrees_with_the_naive_one(sinks, sources, dtype):
    q, _, _, weight = tokens(sinks, seed=1)
    _, k, v, _ = tokens(sources, seed=2)
    for clamp in (0.3, 10.0):
        options = {"causal": False, "clamp": clamp}
        expected = with_gradients(naive_flow_attention, q, k, v, weight, **options)
        cast = [tensor.to(dtype) for tensor in (q, k, v, weight)]
        assert_all_close(with_gradients(flow_attention, *cast, **options), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", get_args(AttentionName))
@pytest.mark.parametrize("changed", [0, 1, 127, 128, 299])
def test_a_change_alters_nothing_before_it(name, changed):
    attention, inputs = attention_kind(name).parallel, tokens(300)[:3]
    before = attention(*inputs)
    effect = 0.0
    for index in range(3):
        altered = [tensor.clone() for tensor in inputs]
        altered[index][:, :, changed] += 100  # were a maximum taken over all keys, this would move it
        after = attention(*altered)
        assert torch.equal(after[:, :, :changed], before[:, :, :changed])
        effect += float((after[:, :, changed:] - before[:, :, changed:]).abs().max())
    assert effect > 1e-2


def extreme_inputs(length, head_dim):
    """Pairs of (1, length, head_dim) queries and keys, saturated in every way that flows can vanish."""

    def full(value):
        return torch.full((1, length, head_dim), value)

    def halves(first, second):
        return torch.cat((full(first)[:, : length // 2], full(second)[:, length // 2 :]), dim=1)

    generator = torch.Generator().manual_seed(3)
    spread = [2e4 * torch.rand(1, length, head_dim, generator=generator) - 1e4 for _ in range(2)]
    one_sided = torch.tensor([1e4, -1e4]).repeat(head_dim // 2).expand(1, length, head_dim)
    return {
        "spread": spread,
        "both off": (full(-1e4), full(-1e4)),
        "queries off": (full(-1e4), full(1e4)),
        "keys off": (full(1e4), full(-1e4)),
        "near zero": (full(-30.0), full(-30.0)),
        "crossing": (halves(-1e4, 1e4), halves(1e4, -1e4)),
        "orthogonal": (one_sided, -one_sided),
    }


def test_extreme_inputs_stay_finite_at_length_65536():
    cases = extreme_inputs(65_536, 2)
    queries, keys = (torch.stack(tensors) for tensors in zip(*cases.values(), strict=True))
    values = 2e4 * torch.rand(len(cases), 1, 65_536, 1, generator=torch.Generator().manual_seed(4)) - 1e4
    results = with_gradients(flow_attention, queries, keys, values, 1.0)
    for row, case in enumerate(cases):
        assert all(result[row].isfinite().all() for result in results), case
    last_steps = [tensor[:, :, -300:] for tensor in (queries, keys, values)]
    assert stepped(*last_steps).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        *(
            ("flow", {"causal": causal}, dtype)
            for causal in (True, False)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        *((name, {}, torch.bfloat16) for name in ("linear", "performer", "cosformer")),
    ],
)
def test_autocast_does_not_lower_the_precision(name, options, dtype):
    """Under autocast a projection hands over bfloat16; sums must not follow it, nor lower float32 input."""
    inputs = [tensor.to(dtype) for tensor in tokens(1000)]
    exact = with_gradients(NAIVE[name], *(tensor.double() for tensor in inputs), **options)
    queries, keys, values = (tensor.clone().requires_grad_() for tensor in inputs[:3])
    with torch.autocast("cpu", torch.bfloat16):
        output = attention_kind(name).parallel(queries, keys, values, **options)
        steps = (
            stepped(*inputs[:3], step=attention_kind(name).step) if options != {"causal": False} else output
        )
    (output * inputs[3]).sum().backward()
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    actual = (output, queries.grad, keys.grad, values.grad, steps)
    for value, reference in zip(actual, (*exact, exact[0]), strict=True):
        assert value.dtype == dtype
        assert ((value.double() - reference).abs() <= rounding * reference.abs() + 1e-5).all()


@pytest.mark.parametrize("head_dim", [64, 48])  # C++ does the first, torch the second
def test_memory_is_linear_in_length(head_dim):
    (short, _), (long, largest) = (saved_by(flow_attention, length, head_dim) for length in (2048, 4096))
    assert 1.9 * short < long < 2.1 * short
    assert long < 4096 * head_dim * head_dim * 4 / 4  # no (length, head_dim, head_dim) tensor is kept
    assert largest <= 3 * 4096 * head_dim  # nor made on the way; nor one of (length, length)


@pytest.mark.parametrize(
    ("attention", "queries", "keys", "values"),
    [
        (flow_attention, (2, 3, 8), (2, 3, 8), (2, 3, 8)),
        (flow_attention, (1, 2, 3, 8), (1, 2, 3, 4), (1, 2, 3, 8)),
        (flow_attention, (1, 2, 3, 8), (1, 1, 3, 8), (1, 1, 3, 8)),
        (flow_attention, (1, 2, 3, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
        (flow_attention, (1, 2, 0, 8), (1, 2, 0, 8), (1, 2, 0, 8)),
        (flow_attention_step, (1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)),
        (flow_attention_step, (2, 3, 8), (2, 3, 8), (2, 1, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(attention, queries, keys, values):
    with pytest.raises(ValueError, match=f"queries|{attention.__name__}"):
        attention(torch.zeros(queries), torch.zeros(keys), torch.zeros(values))


def test_a_step_leaves_its_state_alone_and_rows_do_not_mix_whatever_the_layout_in_memory():
    inputs = tokens(9, batch=4, heads=3, value_dim=8)[:3]
    packed = torch.stack(inputs, dim=3).permute(2, 0, 3, 1, 4).contiguous()  # (tokens, batch, 3, ...)
    expected = naive_flow_attention(*inputs)
    assert (stepped(*packed.permute(2, 1, 3, 0, 4)) - expected).abs().max() < 1e-10
    assert (stepped(*(tensor[2:3] for tensor in inputs)) - expected[2:3]).abs().max() < 1e-10
    _, state = flow_attention(*inputs, return_state=True)
    untouched = [tensor.clone() for tensor in state]
    flow_attention_step(*(tensor[:, :, 0] for tensor in inputs), state)
    assert all(map(torch.equal, state, untouched))
