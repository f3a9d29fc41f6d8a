"""Value guidance: critics, and the actions that they move."""

import shutil

import numpy as np
import pytest
import torch
from conftest import dataset_of
from tiny_training import assert_same_end, figures, resume_here, train_here

from flowrl.data.returns import DISCOUNT
from flowrl.errors import UserError
from flowrl.model import critic
from flowrl.model.action_model import ActionModel
from flowrl.training import guidance
from flowrl.training.guidance import guide, learn_critics


@pytest.fixture(autouse=True)
def small_critics(monkeypatch):
    """A quarter of the usual width, which is enough here."""
    monkeypatch.setattr(critic, "WIDTH", 64)


def episodes(rewards_of, lengths=(5,) * 800, action_choices=()):
    """Two numbers of observation that do not depend on actions, two of action."""
    rng = np.random.default_rng(0)
    steps = sum(lengths)
    observations = rng.normal(size=(steps, 2)).astype(np.float32)
    actions = rng.uniform(-0.9, 0.9, size=(steps, 2)).astype(np.float32)
    if action_choices:
        actions = np.eye(2, dtype=np.float32)[(actions[:, 0] > 0).astype(int)]
    rewards = rewards_of(observations, actions, rng)
    return dataset_of(observations, actions, rewards, lengths, action_choices=action_choices)


def test_actions_move_towards_more_return_and_hardly_where_they_do_not_matter(monkeypatch):
    """The reward falls with the distance to an action given by the observation; otherwise it is noise."""
    monkeypatch.setattr(guidance, "UPDATES", 300)

    def best(observations):
        return 0.5 * np.tanh(observations)

    useful = episodes(lambda o, a, rng: -np.square(a - best(o)).sum(axis=1))
    useless = episodes(lambda o, a, rng: rng.normal(size=len(o)))
    distance = {}
    for name, dataset in {"useful": useful, "useless": useless}.items():
        moved, _, agreement = guide(dataset, ActionModel(2, 2), q_weight=0.1, seed=0)
        move = moved.actions - dataset.actions
        distance[name] = agreement, np.linalg.norm(move, axis=1).mean()
        assert np.abs(moved.actions).max() <= 1
        if name == "useful":
            pair = (dataset.actions, moved.actions)
            before, after = (np.linalg.norm(x - best(dataset.observations), axis=1).mean() for x in pair)
            assert after < before - 0.07
            np.testing.assert_array_equal(moved.returns_to_go, dataset.returns_to_go)
    (useful_agreement, useful_move), (useless_agreement, useless_move) = distance.values()
    assert useful_agreement > 0.7 > 0.5 > useless_agreement
    assert 0.1 < useful_move < 0.25
    assert useless_move < 0.6 * useful_move


def test_the_value_of_a_state_is_what_follows_from_it(monkeypatch):
    """Rewards of 1 until the end: Q of a late transition is lower than that of an early one."""
    monkeypatch.setattr(guidance, "UPDATES", 250)
    dataset = episodes(lambda o, a, rng: np.ones(len(o)), lengths=(40,) * 60)
    timesteps = np.tile(np.arange(40), 60)
    dataset.observations[:, 0] = timesteps / 20 - 1
    critics = learn_critics(dataset, ActionModel(2, 2), seed=0)
    values = critics.action_values(torch.from_numpy(dataset.observations), torch.from_numpy(dataset.actions))
    true = (1 - DISCOUNT ** (40 - timesteps)) / (1 - DISCOUNT)
    for member in values.numpy():
        assert np.corrcoef(member, true)[0, 1] > 0.98


def test_a_truncated_end_is_worth_nothing_by_itself_where_rewards_are_negative(monkeypatch):
    monkeypatch.setattr(guidance, "UPDATES", 150)
    dataset = episodes(lambda o, a, rng: 0.5 * a[:, 0] - 1, lengths=(40,) * 60)
    dataset.terminated[:] = False
    dataset.observations[:, 0] = np.tile(np.arange(40), 60) / 20 - 1
    critics = learn_critics(dataset, ActionModel(2, 2), seed=0)
    for member in critics.action_values(*map(torch.from_numpy, (dataset.observations, dataset.actions))):
        assert abs(np.corrcoef(member, dataset.observations[:, 0])[0, 1]) < 0.6
        assert np.corrcoef(member, dataset.actions[:, 0])[0, 1] > 0.6


def test_discrete_actions_have_no_direction_to_move_in():
    dataset = episodes(lambda o, a, rng: np.ones(len(o)), action_choices=(2,))
    with pytest.raises(UserError, match=r"--q-weight 0\.1: needs continuous actions"):
        guide(dataset, ActionModel(2, 2, (2,)), q_weight=0.1, seed=0)


def test_a_resumed_run_keeps_its_critics(unevaluated, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "UPDATES", 20)
    options = {"q_weight": 0.5, "eval_episodes": 0}
    train_here(tiny_dataset, tmp_path / "whole", **options)
    losses = [figures(each, "train")[-1]["loss"] for each in (tmp_path / "whole", unevaluated)]
    assert losses[0] != losses[1]
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000060")
    monkeypatch.setattr(guidance, "learn_critics", None)
    resume_here(run)
    assert_same_end(run, tmp_path / "whole")
