"""Behaviour cloning, from the choice of episodes to the loaded agent."""

import json

import numpy as np
import pytest
import torch
from conftest import EPISODE_LENGTHS, dataset_of
from test_transformer import give_units
from tiny_training import figures, resume_here, train_here

from flowrl.data import load_episodes
from flowrl.data.dataset import top_episodes
from flowrl.errors import UserError
from flowrl.model import Agent, AgentConfig, BehaviorCloningConfig, BehaviorCloningModel
from flowrl.training.config import TrainConfig
from flowrl.training.setup import build_agent, load_dataset

LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32)


def make_agent(acting=None, context_length=4):
    torch.manual_seed(0)
    model = BehaviorCloningModel(BehaviorCloningConfig(3, 2, 1000, num_layers=2, embed_dim=16, dropout=0.5))
    with torch.no_grad():
        model.mlp[-1].weight.mul_(20)  # so that some actions reach the bounds
    give_units(model)
    config = AgentConfig(model.config, context_length, full_episodes=False, targets=(300.0,))
    return Agent(model, config, acting=acting)


def by_hand(model, observations):
    """The perceptron in numpy, (..., observation_dim) to (..., action_dim) in the data's units."""
    tensors = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    x = (observations - tensors["observation_mean"]) / tensors["observation_std"]
    for layer in (0, 3):
        x = np.maximum(x @ tensors[f"mlp.{layer}.weight"].T + tensors[f"mlp.{layer}.bias"], 0)
    x = np.tanh(x @ tensors["mlp.6.weight"].T + tensors["mlp.6.bias"])
    return LOW + (x + 1) / 2 * (HIGH - LOW)


@pytest.mark.parametrize("acting", [None, "recurrent", "window"])
def test_actions_are_those_of_the_perceptron_whatever_came_before(acting):
    agent, random = make_agent(acting), np.random.default_rng(0)
    assert agent.acting == (acting or "recurrent")
    agent.model.train()  # dropout is off in acting all the same
    agent.reset(4, np.array([300.0, -50.0, 0.0, 1e6]))
    slots = 4
    for t in range(12):
        if t == 5:
            agent.restart(np.array([True, False, False, True]))
        if t == 8:
            agent.keep(np.array([2, 0]))
            slots = 2
        observations = random.normal(size=(slots, 3)).astype(np.float32)
        actions = agent.act(observations, random.normal(size=slots) if t % 2 else None)
        assert actions.dtype == np.float32
        assert (actions >= LOW).all()
        assert (actions <= HIGH).all()
        np.testing.assert_allclose(actions, by_hand(agent.model, observations), atol=1e-5)


def episodes(returns, lengths):
    """Episodes of these returns; each observation holds its episode and its timestep."""
    total = sum(lengths)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    timestep = np.concatenate([np.arange(length) for length in lengths])
    rewards = np.zeros(total)
    rewards[np.cumsum(lengths) - 1] = returns
    observations, terminated = np.stack((episode, timestep), axis=1), np.arange(len(lengths)) % 2 == 0
    options = {"terminated": terminated, "notes": ("first",)}
    return dataset_of(observations, episode[:, None], rewards, lengths, **options)


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [
        (0.01, [3]),  # one at least, however long
        (0.3, [3]),  # 10 of 40; episode 1 would make it 15
        (0.375, [1, 3]),
        (0.625, [0, 1, 3]),
        (0.9, [0, 1, 3]),  # episode 2 is too long, and nothing worse is taken in its stead
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_the_best_episodes_fill_the_share_of_timesteps(fraction, kept):
    dataset = episodes([5, 9, 4, 30, 1], [10, 5, 14, 10, 1])
    top = top_episodes(dataset, fraction)
    rows = np.isin(dataset.observations[:, 0], kept)
    for name in ("observations", "actions", "rewards", "returns_to_go"):
        np.testing.assert_array_equal(getattr(top, name), getattr(dataset, name)[rows])
    np.testing.assert_array_equal(top.episode_lengths, dataset.episode_lengths[kept])
    np.testing.assert_array_equal(top.terminated, dataset.terminated[kept])
    np.testing.assert_array_equal(top.observations[top.episode_starts], [[episode, 0] for episode in kept])
    np.testing.assert_array_equal(top.episode_returns, dataset.episode_returns[kept])
    assert top.sha256 == dataset.sha256  # the data it is a part of
    assert top_episodes(episodes([0] * 100, [1] * 100), 0.29).num_episodes == 29  # 28.999... in floats
    if fraction == 1:
        assert top is dataset
    else:
        assert top.dataset_id == f"x top {fraction:g}"
        assert top.notes[0] == "first"
        assert f"{len(kept)} of 5 episodes, {rows.sum()} of 40 transitions" in top.notes[1]


def test_any_agent_trains_on_the_best_episodes_alone(tiny_dataset):
    whole = load_episodes(str(tiny_dataset), "Hopper-v4")
    config = TrainConfig(dataset=str(tiny_dataset), env="Hopper-v4", top_fraction=0.5, eval_episodes=0)
    best = int(np.argmax(whole.episode_returns))
    assert EPISODE_LENGTHS[best] == 30  # of 60
    start, dataset = whole.episode_starts[best], load_dataset(config)
    np.testing.assert_array_equal(dataset.observations, whole.observations[start : start + 30])
    assert dataset.dataset_id == "file:tiny.hdf5 top 0.5"
    assert dataset.sha256 == whole.sha256
    mean = build_agent(config, dataset).model.observation_mean
    np.testing.assert_allclose(mean, dataset.observations.mean(0), atol=1e-5)


def test_training_learns_evaluates_saves_and_resumes_exactly(tiny_dataset, tmp_path):
    options = {"agent": "bc", "top_fraction": 0.8, "learning_rate": 0.01, "schedule": "constant"}
    options["warmup_steps"] = 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = train_here(tiny_dataset, whole, **options).results
    assert [result.target_return for result in results] == [30.0]  # targets are unused: one suffices
    losses = [line["loss"] for line in figures(whole, "train")]
    assert losses[-1] < 0.9 * losses[0]
    train_here(tiny_dataset, parts, steps=23, **options)
    resume_here(parts, steps=60)
    name = "checkpoints/step-00000060/manifest.json"
    files = [json.loads((run / name).read_text())["files"] for run in (parts, whole)]
    assert files[0] == files[1]  # weights, optimiser and random states, bit for bit
    with pytest.raises(UserError, match=r"--top-fraction 0\.5: .*--resume cannot change it"):
        resume_here(parts, top_fraction=0.5)
    with pytest.raises(UserError, match=r"--agent transformer: .*--resume cannot change it"):
        resume_here(parts, agent="transformer")
