"""Acting by one call of C++ against the blocks' own steps in torch, and when it is used."""

import copy

import numpy as np
import pytest
import torch
from workload import Sizes, make_agent, paper_config

from flowrl.attention.kinds import select_rows
from flowrl.model import acting
from flowrl.model.transformer import ModelConfig, SequenceModel

needs_compiler = pytest.mark.skipif(
    acting.acting_library() is None, reason="no g++, or none for this machine"
)


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    shape = {"num_layers": 2, "embed_dim": 64, "num_heads": 2, **options}
    model = SequenceModel(ModelConfig(5, 3, 50, **shape))
    for parameter in model.parameters():  # biases and norms that matter, too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs_of(batch, steps, seed=1):
    """Returns-to-go, observations, previous actions and timesteps of ``steps`` timesteps."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        drawn = [torch.randn(batch, *shape, generator=generator) for shape in ((), (5,), (3,))]
        yield *drawn, torch.full((batch,), step)


@torch.no_grad()
def act(model, inputs, states=None):
    """Actions (steps, batch, action_dim) and the states after them."""
    interleaved = model.config.token_layout == "interleaved"
    states, actions = states or [None] * model.config.num_layers, []
    for step, (returns, observations, previous, timesteps) in enumerate(inputs):
        told = None if interleaved and step == 0 else previous
        predicted, states = model.step(returns, observations, told, timesteps, states)
        actions.append(predicted)
    return torch.stack(actions), states


@needs_compiler
@pytest.mark.parametrize("layout", ["interleaved", "fused"])
@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (0, {}),
        (1, {}),
        (5, {"num_layers": 1}),
        (33, {"embed_dim": 96, "num_heads": 3}),  # 32 wide heads, panels that are not whole
        (130, {"num_heads": 4}),  # several slices a thread
    ],
)
def test_actions_and_states_are_the_blocks_own(batch, options, layout):
    model = make_model(token_layout=layout, **options)
    expected, expected_states = act(model, inputs_of(batch, 20))
    model.prepare_to_act()
    assert model._packed is not None
    actual, states = act(model, inputs_of(batch, 20))
    assert torch.allclose(actual, expected, atol=2e-6)
    for state, reference in zip(states, expected_states, strict=True):
        for name, a, b in zip(reference._fields, state, reference, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name


@needs_compiler
def test_neither_threads_nor_other_episodes_change_a_bit():
    """Of the blocks, that is: in what torch does before and after them a row may depend on its neighbours."""
    model = make_model()
    model.prepare_to_act()
    tokens = torch.randn(6, 3, 70, 64, generator=torch.Generator().manual_seed(2))

    def run(tokens):
        outputs, states = [], [None, None]
        with torch.no_grad():
            for step in tokens:
                last, states = model._packed.act(step, states)
                outputs.append(last)
        return torch.stack(outputs), *(tensor for state in states for tensor in state)

    expected = run(tokens)
    assert torch.equal(run(tokens[:, :, [41]])[0], expected[0][:, [41]])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, run(tokens), expected))
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_episodes_may_leave_and_actions_may_be_told_by_themselves():
    """What an agent does between steps: it keeps some slots, and tells the actions of the others."""
    outcomes = []
    for packs in (False, True):
        model = make_model()
        if packs:
            model.prepare_to_act()
        _, states = act(model, inputs_of(9, 4))
        states = [select_rows(state, torch.tensor([7, 0, 3])) for state in states]
        with torch.no_grad():
            states = model.step_action(torch.ones(3, 3), torch.full((3,), 3), states)
            inputs = next(inputs_of(3, 1, seed=2))
            outcomes.append(model.step(*inputs[:2], None, inputs[3] + 4, states)[0])
    assert torch.allclose(*outcomes, atol=2e-6)
    assert outcomes[0].std() > 1e-3


@needs_compiler
def test_what_is_not_a_number_stays_with_its_episode():
    model = make_model()
    model.prepare_to_act()
    returns, observations, previous, timesteps = next(inputs_of(40, 1))
    observations[7, 2] = float("nan")
    actions, _ = act(model, [(returns, observations, previous, timesteps)])
    assert actions[0, 7].isnan().all()
    assert actions.isnan().sum() == 3


@needs_compiler
def test_steps_go_by_the_weights_of_the_last_preparation(monkeypatch):
    model = make_model()
    first, _ = act(model, inputs_of(4, 3))
    model.prepare_to_act()
    assert copy.deepcopy(model)._packed is not None
    model.blocks[0].attention.qkv.weight.data *= 2
    changed, _ = act(model, inputs_of(4, 3))
    assert torch.allclose(changed, first, atol=2e-6)
    model.train().eval()  # forgets the copies
    assert model._packed is None
    expected, _ = act(model, inputs_of(4, 3))
    assert not torch.allclose(expected, first, atol=1e-4)
    model.prepare_to_act()
    assert torch.allclose(act(model, inputs_of(4, 3))[0], expected, atol=2e-6)


@needs_compiler
def test_what_cannot_be_packed_acts_in_torch(monkeypatch):
    for options in (
        {"attention": "softmax"},
        {"embed_dim": 40, "num_heads": 5},
        {"embed_dim": 48, "num_heads": 3},
    ):
        model = make_model(**options)
        model.prepare_to_act()
        assert model._packed is None, options
    model = make_model().double()
    model.prepare_to_act()
    assert model._packed is None

    model = make_model()
    model.prepare_to_act()
    monkeypatch.setattr(model._packed, "act", lambda *_: pytest.fail("C++ was called"))
    returns, observations, _, timesteps = next(inputs_of(4, 1))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.step(returns, observations, None, timesteps, [None, None])
    model.step(returns, observations, None, timesteps, [None, None])  # might want a gradient


@needs_compiler
def test_agents_prepare_their_model_where_they_act_step_by_step():
    sizes = Sizes(num_layers=1, embed_dim=64)
    agent = make_agent(sizes, paper_config(sizes))
    agent.acting = "window"
    agent.reset(2, 1.0)
    assert agent.model._packed is None
    agent.acting = "recurrent"
    agent.reset(2, 1.0)
    packed = agent.model._packed
    assert packed is not None
    agent.act(np.zeros((2, 11)))
    agent.reset(2, 1.0)
    assert agent.model._packed is not packed  # training may have gone on in between
