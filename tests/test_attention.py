"""Every form of every kind against the naive one, masks and states, and what makes each kind itself."""

import math
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from attention_forms import NAIVE, assert_all_close, saved_by, stepped, tokens, with_gradients

from flowrl.attention import (
    AttentionName,
    attention_kind,
    flow_attention,
    flow_attention_step,
    linear,
    naive_flow_attention,
)
from flowrl.attention.flow import FlowState, blocks
from flowrl.attention.linear import random_directions

LENGTHS = (1, 2, 127, 128, 129, 3000)
LINEAR = ("linear", "performer", "cosformer")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
FIRST_DIRECTIONS = [[0.007634183479121073, 1.0986133188034695], [2.032999461575345, -0.014127164341612443]]
MASKS = {
    "right padding": lambda length: [[True] * (length - 5) + [False] * 5, [True] * length],
    "left padding": lambda length: [[False] * 5 + [True] * (length - 5), [False] * (length - 1) + [True]],
    "holes": lambda length: torch.rand(2, length, generator=torch.Generator().manual_seed(7)) > 0.4,
    "nothing valid": lambda length: [[True] * length, [False] * length],
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def formula_by_hand(queries, keys, values, clamp, eps=1e-6):
    """The causal definition, one sum over the past at a time, for (length, width) arrays."""
    q, k, past = sigmoid(queries), sigmoid(keys), [slice(t + 1) for t in range(len(keys))]
    counts = np.arange(1, len(keys) + 1)

    def flows(to, rows, weights):
        return np.array([(x + eps) @ (weights[p] @ rows[p] + eps) for x, p in zip(to, past, strict=True)])

    incoming, outgoing = flows(q, k, np.ones(len(k))), flows(k, q, np.ones(len(k)))
    exponentials = np.exp(np.clip(flows(k, q, counts / incoming) / counts, -clamp, clamp))
    competition = counts * exponentials / [exponentials[p].sum() for p in past]
    allocation = sigmoid(flows(q, k, counts / outgoing) / counts)
    aggregated = [((k[p] @ x) * competition[p]) @ values[p] for x, p in zip(q, past, strict=True)]
    return (allocation / incoming)[:, None] * aggregated


@pytest.mark.parametrize("clamp", [0.3, 10.0])
def test_naive_form_is_the_formula(clamp):
    q, k, v, _ = tokens(11, heads=1, head_dim=3, value_dim=2)
    expected = formula_by_hand(*(x[0, 0].numpy() for x in (q, k, v)), clamp)
    np.testing.assert_allclose(naive_flow_attention(q, k, v, clamp=clamp)[0, 0], expected, rtol=1e-12)


def test_naive_bidirectional_form_is_the_formula():
    q, _, _, _ = tokens(4, heads=1, head_dim=3, value_dim=2)
    _, k, v, _ = tokens(7, heads=1, head_dim=3, value_dim=2, seed=1)
    actual = naive_flow_attention(q, k, v, causal=False, clamp=0.45)[0, 0]
    sinks, sources, values, eps = q[0, 0].sigmoid().numpy(), k[0, 0].sigmoid().numpy(), v[0, 0].numpy(), 1e-6
    incoming = (sinks + eps) @ (sources.sum(0) + eps)
    outgoing = (sources + eps) @ (sinks.sum(0) + eps)
    conserved = (sources + eps) @ ((1 / incoming) @ sinks + eps)
    exponentials = np.exp(np.clip(conserved, -0.45, 0.45))
    assert (conserved > 0.45).any()
    assert (conserved < 0.45).any()
    competition = 7 * exponentials / exponentials.sum()
    allocation = sigmoid((sinks + eps) @ ((1 / outgoing) @ sources + eps) * 4 / 7)
    aggregated = (sinks @ sources.T * competition) @ values
    np.testing.assert_allclose(actual, (allocation / incoming)[:, None] * aggregated, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "length", "options"),
    [
        *((name, length, {}) for name in NAIVE for length in LENGTHS if (name, length) != ("softmax", 3000)),
        *(("flow", 200, given) for given in ({"clamp": 0.3}, {"clamp": 1.0}, {"eps": 0.05}, {"eps": 0.0})),
    ],
)
def test_parallel_recurrent_and_naive_forms_agree(name, length, options):
    kind, few = attention_kind(name), 1 if length > 1000 else 2
    value_dim = {127: 1, 129: 19}.get(length, 5)  # narrower and wider than heads
    q, k, v, weight = tokens(length, heads=few, batch=few, value_dim=value_dim)
    expected = with_gradients(NAIVE[name], q, k, v, weight, **options)
    if options not in ({}, {"eps": 0.0}):  # which differ too little from the default
        assert (expected[0] - naive_flow_attention(q, k, v, clamp=1e9)).abs().max() > 1e-4
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
    before, effect = attention(*inputs), 0.0
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
    assert stepped(*[tensor[:, :, -300:] for tensor in (queries, keys, values)]).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        *(
            ("flow", {"causal": causal}, dtype)
            for causal in (True, False)
            for dtype in (torch.float32, torch.bfloat16)
        ),
        *((name, {}, torch.bfloat16) for name in LINEAR),
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


def naive_without_the_invalid(queries, keys, values, *, mask, **options):
    """The naive form of each row's valid tokens alone, put back where they were; zeros elsewhere."""
    outputs = torch.zeros_like(values)
    for row, valid in enumerate(mask):
        if valid.any():
            part = (x[row : row + 1, :, valid] for x in (queries, keys, values))
            outputs[row, :, valid] = naive_flow_attention(*part, **options)[0]
    return outputs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [9, 200])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_masked_tokens_have_no_effect(name, causal, length, dtype):
    """Values, gradients and what the invalid tokens hold: not even a NaN of theirs reaches anything."""
    mask = torch.as_tensor(MASKS[name](length))
    inputs = tokens(length, batch=2, head_dim=16, value_dim=16)
    options = {"causal": causal, "mask": mask, "clamp": 0.9, "eps": 0.0 if length == 9 else 1e-6}
    expected = with_gradients(naive_without_the_invalid, *inputs, **options)
    spoilt = [x.masked_fill(~mask[:, None, :, None], torch.nan).to(dtype) for x in inputs[:3]]
    actual = with_gradients(flow_attention, *spoilt, inputs[3].to(dtype), **options)
    assert_all_close(actual, expected, TOLERANCE[dtype])
    assert not actual[0].masked_select(~mask[:, None, :, None]).any()


def in_parts(queries, keys, values, *, lengths, **options):
    """The outputs of one part after the other, each from the state that the one before returned."""
    outputs, state = [], None
    for part in zip(*(x.split(lengths, dim=2) for x in (queries, keys, values)), strict=True):
        output, state = flow_attention(*part, initial_state=state, return_state=True, **options)
        outputs.append(output)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [(1, 4, 60), (130, 70), (64, 300, 1), (200, 3)])
def test_parts_from_states_equal_the_whole(lengths, dtype):
    """Gradients pass through the states: a prompt may be learned from what follows it."""
    inputs = tokens(sum(lengths), batch=2, head_dim=16, value_dim=16)
    expected = with_gradients(naive_flow_attention, *inputs, clamp=0.9)
    actual = with_gradients(in_parts, *(x.to(dtype) for x in inputs), lengths=lengths, clamp=0.9)
    assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 60, 129, 300])
def test_a_prompt_read_at_once_leaves_the_state_of_its_steps(length):
    inputs = tokens(length + 1, batch=2, head_dim=16, value_dim=16)
    prompt, last = ([x[:, :, part] for x in inputs[:3]] for part in (slice(length), length))
    state = None
    for token in range(length):
        _, state = flow_attention_step(*(x[:, :, token] for x in prompt), state)
    _, found = flow_attention(*prompt, return_state=True)
    for name, actual, expected in zip(FlowState._fields, found, state, strict=True):
        assert actual.shape == expected.shape, name
        assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max(), name
    output, _ = flow_attention_step(*last, found)
    assert (output - naive_flow_attention(*inputs[:3])[:, :, -1]).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, r"mask must be bool of shape \(batch, length\)"),
        ({"mask": torch.ones(1, 3)}, "mask must be bool"),
        ({"causal": False, "return_state": True}, "belong to the causal form"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    x, longer = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        flow_attention(x, x, x, **options)
    with pytest.raises(ValueError, match="a longer past is given by initial_state"):
        flow_attention(x, longer, longer)
    _, state = flow_attention(x, x, x, return_state=True)
    with pytest.raises(ValueError, match=r"initial_state has a memory \(1, 2, 8, 8\)"):
        flow_attention(x[..., :4], x[..., :4], x, initial_state=state)
    with pytest.raises(ValueError, match=r"state has a memory \(1, 2, 8, 8\)"):
        flow_attention_step(x[:, :, 0, :4], x[:, :, 0, :4], x[:, :, 0], state)
    with pytest.raises(ValueError, match=r"floating-point tensors, got torch\.int64"):
        flow_attention(x.long(), x, x)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("head_dim", [2, 64])
@pytest.mark.parametrize("size", [1e-4, 1e2, 1e8])
def test_extreme_inputs_of_the_linear_kinds_stay_finite(name, head_dim, size):
    kind, generator = attention_kind(name), torch.Generator().manual_seed(3)
    sign = torch.randn(3, 1, 200, head_dim, generator=generator)
    for queries, keys in [
        (sign[0], sign[1]),
        (sign[0].abs(), -sign[1].abs()),
        (-sign[0].abs(), sign[1].abs()),
    ]:
        inputs = [size * queries[None], size * keys[None], 1e4 * sign[2][None]]
        results = with_gradients(kind.parallel, *inputs, 1.0)
        assert all(result.isfinite().all() for result in results)
        assert stepped(*inputs, step=kind.step).isfinite().all()
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
        errors.append((attention_kind("performer").parallel(0.2 * q, 0.2 * k, v) - exact).std().item())
    linear._directions_on.cache_clear()
    mean_of_values = v.cumsum(2) / torch.arange(1, 151)[:, None]  # what uniform weights would give
    assert errors[1] < errors[0] / 2.5
    assert errors[1] < 0.5 * (mean_of_values - exact).std()


@pytest.mark.parametrize("max_tokens", [300, 4096])
def test_cosformer_reweights_by_distance(max_tokens):
    """Forms agree within M, at it and beyond it, where no weight is negative."""
    kind, inputs = attention_kind("cosformer", max_tokens), tokens(700)
    expected = with_gradients(partial(NAIVE["cosformer"], max_tokens=max_tokens), *inputs)
    assert_all_close(with_gradients(kind.parallel, *inputs), expected, 1e-10)
    assert (stepped(*inputs[:3], step=kind.step) - expected[0]).abs().max() < 1e-10
    ones, values = torch.ones(1, 1, 700, 4).double(), torch.eye(700).double()[None, None]
    weights = kind.parallel(ones, ones, values)[0, 0]  # row i: the weights of the past, summing to 1
    relative = weights / weights.diagonal()[:, None]
    for i, j in ((5, 0), (250, 10), (299, 0), (300, 0), (301, 1), (699, 0), (699, 298), (699, 500)):
        distance = min(i, max_tokens) - min(j, max_tokens)
        assert abs(relative[i, j] - math.cos(math.pi / 2 * distance / max_tokens)) < 1e-10
    assert weights.min() > -1e-12
