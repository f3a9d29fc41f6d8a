"""Agents to files and back; what does not fit is refused by name, whatever it claims to be."""

import re
from typing import get_args

import numpy as np
import pytest
import torch
from broken_inputs import refusal, with_value

import flowrl
from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.model import Agent, AgentConfig, ModelConfig, SequenceModel
from flowrl.model.checkpoint import Checkpoint, save_checkpoint
from flowrl.model.loading import agent_config_from_dict, build_model, pick_device
from flowrl.model.transformer import MixerName

LAYOUTS = ("interleaved", "fused")


ENVIRONMENT = EnvironmentSpec(
    "Nowhere-v4",
    {"frame_skip": 4},
    30,
    ("no_such_module",),
    (("RescaleAction", {"min_action": -1, "max_action": 1}), ("Unknown", None)),
)


def make_agent(layout="interleaved", attention="flow", full_episodes=True, acting=None):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "embed_dim": 8, "num_heads": 2}
    model = SequenceModel(ModelConfig(4, 2, 30, attention, layout, dropout=0.3, **sizes))
    with torch.no_grad():
        for tensor in model.state_dict().values():  # the buffers too
            tensor.add_(0.1 * torch.rand_like(tensor))
    config = AgentConfig(
        model.config,
        context_length=6,
        full_episodes=full_episodes,
        acting=acting,
        targets=(30.0, -1.5),
        reward_mode="delayed",
        dataset_id="file:x.hdf5",
        dataset_sha256="ab",
        environment=ENVIRONMENT,
        reference=ReferenceScores(-2.0, 50.0),
    )
    return Agent(model, config)


def play(agent, steps=9):
    """The actions of two episodes side by side."""
    random = np.random.default_rng(0)
    agent.reset(2, np.array([30.0, 5.0]))
    return np.stack([agent.act(random.normal(size=(2, 4)), random.normal(size=2)) for _ in range(steps)])


@pytest.mark.parametrize("attention", get_args(MixerName))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_agent_acts_as_the_saved_one(tmp_path, layout, attention):
    cases = ((True, None, "recurrent"), (False, None, "window"), (False, "recurrent", "recurrent"))
    for full_episodes, given, acting in cases:
        agent = make_agent(layout, attention, full_episodes, acting=given)
        tensors, training = dict(agent.model.state_dict()), {"x": torch.zeros(1)}
        save_checkpoint(tmp_path, Checkpoint(40, agent.config.to_dict(), tensors, {}, training), keep=1)
        loaded = flowrl.load_agent(str(tmp_path))
        assert loaded.acting == acting
        assert np.array_equal(play(loaded), play(agent))
        assert loaded.config == agent.config
        assert loaded.checkpoint_step == 40
        assert loaded.environment == ENVIRONMENT  # which is not registered here, and whose module is absent
        assert flowrl.load_agent(tmp_path, acting="window").acting == "window"
    if attention != "flow":
        with pytest.raises(UserError, match=r"source_clamp 20\.0: .* has no Flow-Attention"):
            flowrl.load_agent(tmp_path, source_clamp=20.0)
    with pytest.raises(UserError, match="acting 'forward': expected one of recurrent, window"):
        flowrl.load_agent(tmp_path, acting="forward")


def test_loaded_weights_lie_as_torch_lays_its_own(tmp_path):
    """Not where a file's bytes happen to begin: sums may depend on it, and a resumed run must not."""
    agent = make_agent()
    odd = {name: torch.empty(x.numel() + 1)[1:].view(x.shape) for name, x in agent.model.state_dict().items()}
    for name, tensor in agent.model.state_dict().items():
        odd[name].copy_(tensor)
    assert any(tensor.data_ptr() % 64 for tensor in odd.values())
    loaded = build_model(agent.config.model, odd, where="here").state_dict()
    assert not any(tensor.data_ptr() % 64 for tensor in loaded.values())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in odd.items())


HOSTILE = [  # more in test_broken_runs.py
    *((("model", "num_layers"), value) for value in (0, 1 << 40, 10**400, 2.0, True, "8", None, 1001)),
    *((("model", name), 1 << 21) for name in ("action_dim", "max_timesteps", "embed_dim", "num_heads")),
    *((("context_length",), value) for value in (0, 31)),
    (("model", "num_heads"), 3),
    (("model", "attention"), "lineal"),
    (("model", "dropout"), float("nan")),
    (("agent",), "bct"),
    *((("targets",), value) for value in ("5", [None], [float("nan")], [10**400])),
    *((("environment",), value) for value in (False, {}, {"env_id": 5})),
    (("environment", "env_id"), "os:system"),
    (("environment", "imports"), "os"),
    (("environment", "wrappers"), [["ClipAction"]]),
    *((("environment", "kwargs"), value) for value in (["x"], {"render_mode": "human"})),
    (("environment", "max_episode_steps"), 0),
    *((("reference",), value) for value in (["minimum", "maximum"], {"minimum": 1.0})),
]


@pytest.mark.parametrize(("place", "value"), HOSTILE, ids=lambda value: str(value)[:40])
def test_a_hostile_configuration_is_refused_by_name(place, value):
    changed = with_value(make_agent().config.to_dict(), place, value)
    line = refusal(lambda: agent_config_from_dict(changed, "RUN"))
    assert re.search("RUN: .*(" + "|".join((*place, "environment")) + ")", line)
    assert len(line) < 1000


def test_missing_and_unknown_entries_are_named():
    data = make_agent().config.to_dict()
    for holder, required in ((data, "targets"), (data["model"], "action_dim")):
        value = holder.pop(required)
        with pytest.raises(UserError, match=f"'{required}': Field required"):
            agent_config_from_dict(data, "RUN")
        holder[required] = value
        holder["extra"] = 1
        with pytest.raises(UserError, match="'extra': Unexpected keyword argument"):
            agent_config_from_dict(data, "RUN")
        del holder["extra"]
    del data["model"]["context_tokens"], data["model"]["time_encoding"]
    del data["environment"]["imports"], data["environment"]["wrappers"]
    model = agent_config_from_dict(data, "RUN").model
    assert (model.context_tokens, model.time_encoding) == (4096, "learned")


def test_the_device_is_a_gpu_where_there_is_one():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
