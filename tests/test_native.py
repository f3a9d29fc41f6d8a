"""Acting, dropout and linear layers as flowrl.native puts them into a model, against plain torch."""

import copy
from functools import partial
from typing import get_args

import numpy as np
import pytest
import test_transformer
import torch
from torch import nn

from flowrl.attention import AttentionName
from flowrl.model import Agent, AgentConfig
from flowrl.native import linear
from flowrl.native.accelerate import accelerate_acting, accelerate_training
from flowrl.native.dropout import FastDropout
from flowrl.native.linear import OneDNNLinear

pytestmark = pytest.mark.usefixtures("unchecked")
make_model = partial(test_transformer.make_model, dtype=torch.float32, noise=0.1, embed_dim=64)


def is_accelerated(model):
    return "read" in vars(model)


def timesteps_of(batch, steps, seed=1):
    """Observations, returns-to-go, timesteps and the actions taken before them."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        drawn = [torch.randn(batch, *shape, generator=generator) for shape in ((3,), (), (2,))]
        yield *drawn[:2], torch.full((batch,), step), drawn[2]


@torch.no_grad()
def act(model, inputs, state):
    """Actions (steps, batch, action_dim) and the state after them."""
    actions = []
    for *inputs_now, previous in inputs:
        predicted, state = model.step(*inputs_now, state._replace(previous_actions=previous))
        actions.append(predicted)
    return torch.stack(actions), state


@pytest.mark.parametrize("layout", ["interleaved", "fused"])
@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (0, {}),
        (1, {}),
        (5, {"num_layers": 1}),
        (33, {"embed_dim": 96, "num_heads": 3}),  # 32 wide heads, three panels
        (130, {"num_heads": 4}),  # several slices a thread
    ],
)
def test_actions_and_states_are_the_blocks_own(batch, options, layout):
    model = make_model(layout, **options)
    expected, expected_state = act(model, timesteps_of(batch, 20), model.start(batch))
    accelerate_acting(model)
    assert is_accelerated(model)
    actual, state = act(model, timesteps_of(batch, 20), model.start(batch))
    assert torch.allclose(actual, expected, atol=2e-6)
    for layer, reference in zip(state.layers, expected_state.layers, strict=True):
        for name, a, b in zip(reference._fields, layer, reference, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name


def gelu_for_relu(model):
    for block in model.blocks:
        block.mlp[1] = nn.GELU()


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (gelu_for_relu, {}),
        (nn.Module.double, {}),
        *((nn.Module.eval, {"attention": name}) for name in sorted({*get_args(AttentionName)} - {"flow"})),
        (nn.Module.eval, {"embed_dim": 40, "num_heads": 5}),
        (nn.Module.eval, {"embed_dim": 48, "num_heads": 3}),
    ],
)
def test_a_model_of_another_structure_kind_or_width_acts_in_torch(change, options):
    model = make_model(**options)
    change(model)
    accelerate_acting(model)
    assert not is_accelerated(model)


def test_a_model_that_computes_otherwise_acts_in_torch_with_a_warning():
    model = make_model()
    for block in model.blocks:
        block.step = lambda x, state, read: (x[:, read], state)
    with pytest.warns(UserWarning, match=r"acting in C\+\+ .*torch is used instead"):
        accelerate_acting(model)
    assert not is_accelerated(model)


def test_gradients_and_autocast_act_in_torch(monkeypatch):
    model = make_model()
    accelerate_acting(model)
    library = type("Library", (), {"act": lambda *_: pytest.fail("C++ was called")})
    monkeypatch.setattr("flowrl.native.acting.acting_library", lambda: library)
    observations, returns, timesteps, _ = next(timesteps_of(4, 1))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.step(observations, returns, timesteps, model.start(4))
    actions, _ = model.step(observations, returns, timesteps, model.start(4))
    assert actions.requires_grad


def test_agents_accelerate_their_model_at_every_reset():
    model = make_model()
    agent = Agent(model, AgentConfig(model.config, 5, full_episodes=True, targets=(1.0,)), acting="window")
    agent.reset(2, 1.0)
    assert not is_accelerated(model)
    agent.acting = "recurrent"
    agent.reset(2, 1.0)
    first = model.read
    agent.act(np.zeros((2, 3)))
    agent.reset(2, 1.0)
    assert model.read is not first  # the weights may have changed in between


def test_the_switch_turns_everything_off(monkeypatch):
    monkeypatch.setenv("FLOWRL_KERNELS", "off")
    model = make_model(dropout=0.1)
    accelerate_acting(model)
    accelerate_training(model)
    assert not is_accelerated(model)
    assert type(model.dropout) is nn.Dropout


def test_training_gets_a_fast_dropout_with_the_same_weights():
    model = make_model(dropout=0.25)
    before = copy.deepcopy(model.state_dict())
    accelerate_training(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dropout, x = model.blocks[0].dropout.train(), torch.ones(100_000, requires_grad=True)
    assert (type(dropout), dropout.p) == (FastDropout, 0.25)
    outputs = dropout(x)
    outputs.sum().backward()
    assert torch.equal(outputs, x.grad)
    torch.testing.assert_close(outputs.unique(), torch.tensor([0, 4 / 3]))
    assert (outputs == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert FastDropout(1 - 1e-6).train()(x).isfinite().all()


def test_onednn_gives_the_outputs_and_gradients_of_torch(monkeypatch):
    monkeypatch.setattr("flowrl.native.accelerate.library_is_held_back", lambda: True)
    model = make_model()
    accelerate_training(model)
    assert type(model.blocks[0].mlp[0]) is OneDNNLinear
    torch.manual_seed(0)
    plain = nn.Linear(96, 64)
    layer = copy.deepcopy(plain)
    layer.__class__ = OneDNNLinear
    x, results = torch.randn(8, 50, 96), []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        outputs = module(inputs)
        outputs.square().sum().backward()
        results.append((outputs, inputs.grad, module.weight.grad, module.bias.grad))
    assert type(results[0][0].grad_fn).__name__ == "_LinearBackward"
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("maker", "vectors"), [("Intel", "AVX512"), ("AMD", "AVX2"), ("AMD", "AVX512")])
def test_onednn_multiplies_where_mkl_keeps_to_half_the_vectors(maker, vectors, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text({"Intel": "GenuineIntel", "AMD": "AuthenticAMD"}[maker])
    monkeypatch.setattr(linear, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    assert linear.library_is_held_back.__wrapped__() == ((maker, vectors) == ("AMD", "AVX512"))


def test_a_wrong_product_is_noticed_and_torch_is_used(monkeypatch):
    right = linear.onednn_product
    monkeypatch.setattr(linear, "onednn_product", lambda *arguments: right(*arguments) + 0.1)
    layer, x = OneDNNLinear(16, 8), torch.randn(200, 16)
    with pytest.warns(UserWarning, match="linear layers by oneDNN differs from torch"):
        outputs = layer(x)
    assert torch.equal(outputs, nn.functional.linear(x, layer.weight, layer.bias))
