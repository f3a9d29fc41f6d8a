"""Masks of valid tokens, and states into and out of the parallel form, against the naive form."""

import pytest
import torch
from attention_forms import assert_all_close, tokens, with_gradients

from flowrl.attention import flow_attention, flow_attention_step, naive_flow_attention
from flowrl.attention.flow import FlowState

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
MASKS = {
    "right padding": lambda length: [[True] * (length - 5) + [False] * 5, [True] * length],
    "left padding": lambda length: [[False] * 5 + [True] * (length - 5), [False] * (length - 1) + [True]],
    "holes": lambda length: torch.rand(2, length, generator=torch.Generator().manual_seed(7)) > 0.4,
    "nothing valid": lambda length: [[True] * length, [False] * length],
}


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
    options = {"causal": causal, "mask": mask, "clamp": 0.9}
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
