"""A few tokens at once from a state that is overwritten, against the naive form and the single step."""

import pytest
import torch
from attention_forms import tokens

from flowrl.attention import ATTENTION_KINDS, flow_attention_step, naive_flow_attention
from flowrl.attention.flow import flow_attention_decode

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CHUNKS = (2, 3, 3, 1, 7, 3, 1, 20)


def in_chunks(decode, inputs, chunks=CHUNKS, state=None, **options):
    """The outputs of all tokens, fed a chunk at a time, and the last state."""
    outputs = []
    for part in zip(*(tensor.split(chunks, dim=2) for tensor in inputs), strict=True):
        output, state = decode(*part, state, **options)
        outputs.append(output)
    return torch.cat(outputs, dim=2), state


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{}, {"clamp": 0.3}, {"eps": 0.05}])
def test_chunks_equal_the_naive_form(options, dtype):
    inputs = tokens(sum(CHUNKS), batch=2, heads=3)[:3]
    expected = naive_flow_attention(*inputs, **options)
    actual, _ = in_chunks(flow_attention_decode, [tensor.to(dtype) for tensor in inputs], **options)
    assert actual.dtype == dtype
    assert actual.shape == (2, 3, sum(CHUNKS), 5)
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * max(1.0, expected.abs().max())


def test_state_is_that_of_single_steps_and_either_form_continues_from_it():
    inputs = tokens(24, seed=1)[:3]
    single, states = None, []
    for token in range(24):
        _, single = flow_attention_step(*(tensor[:, :, token] for tensor in inputs), single)
        states.append(single)
    _, state = in_chunks(flow_attention_decode, [tensor[:, :, :12] for tensor in inputs], (5, 7))
    for name, actual, expected in zip(state._fields, state, states[11], strict=True):
        assert actual.shape == expected.shape, name
        assert (actual - expected).abs().max() < 1e-10, name
    untouched = [tensor.clone() for tensor in states[11]]
    _, one_further = flow_attention_step(*(tensor[:, :, 12] for tensor in inputs), states[11])
    assert all(map(torch.equal, states[11], untouched))  # a single step leaves its state alone
    outputs, last = flow_attention_decode(*(tensor[:, :, 13:] for tensor in inputs), one_further)
    assert (outputs - naive_flow_attention(*inputs)[:, :, 13:]).abs().max() < 1e-10
    assert last.memory is one_further.memory
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(last, states[-1], strict=True))


def test_rows_do_not_mix_whatever_the_layout_in_memory():
    inputs = tokens(9, batch=4, heads=3, value_dim=8)[:3]
    packed = torch.stack(inputs, dim=3).permute(2, 0, 3, 1, 4).contiguous()  # (tokens, batch, 3, ...)
    expected = naive_flow_attention(*inputs)
    actual, _ = in_chunks(flow_attention_decode, packed.permute(2, 1, 3, 0, 4), 3)
    assert (actual - expected).abs().max() < 1e-10
    alone, _ = in_chunks(flow_attention_decode, [tensor[2:3] for tensor in inputs], 3)
    assert (alone - expected[2:3]).abs().max() < 1e-10


@pytest.mark.parametrize("name", list(ATTENTION_KINDS))
def test_every_kind_takes_a_few_tokens_at_once(name):
    kind, inputs = ATTENTION_KINDS[name], tokens(sum(CHUNKS), value_dim=8)[:3]
    actual, _ = in_chunks(kind.decode, inputs)
    assert (actual - kind.parallel(*inputs)).abs().max() < 1e-10
