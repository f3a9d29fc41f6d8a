"""Off-policy estimates against recursions, the model's own forward, and a task whose answer is known."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import dataset_of
from test_transformer import window_of
from tiny_training import train_here

import flowrl
from flowrl.data import load_episodes
from flowrl.data.returns import DISCOUNT, lambda_returns
from flowrl.errors import UserError
from flowrl.evaluation.off_policy import agent_actions, estimate
from flowrl.model.action_model import ActionModel
from flowrl.report.estimate import EstimateConfig, estimate_run


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
def test_corrected_returns_are_their_sum_of_errors(tiny_dataset, trace):
    """Harutyunyan et al. (2016), Eq. 4: Q and the errors that follow, discounted, weighted by the trace."""
    dataset = load_episodes(str(tiny_dataset))
    random = np.random.default_rng(0)
    taken, chosen = random.normal(size=(2, dataset.num_transitions)).astype(np.float32)
    returns = lambda_returns(dataset, dataset.rewards, taken, chosen, trace)
    for start, length, terminated in zip(
        dataset.episode_starts, dataset.episode_lengths, dataset.terminated, strict=True
    ):
        end = start + length - 1
        errors = [dataset.rewards[i] + DISCOUNT * chosen[i + 1] - taken[i] for i in range(start, end)]
        errors.append(dataset.rewards[end] - taken[end] if terminated else 0.0)
        for i in range(start, end + 1):
            later = enumerate(errors[i - start :])
            expected = taken[i] + sum((DISCOUNT * trace) ** k * error for k, error in later)
            assert returns[i] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"context_length": "episode", "token_layout": "fused", "conditioning": "target"},
        {"context_length": "episode", "token_layout": "interleaved"},
        {"context_length": 30, "token_layout": "interleaved"},
    ],
)
def test_the_agents_actions_are_those_of_the_model_over_the_datas_episodes(tiny_dataset, tmp_path, options):
    train_here(tiny_dataset, tmp_path / "run", steps=3, eval_episodes=0, **options)
    agent = flowrl.load_agent(tmp_path / "run")
    dataset, target = load_episodes(str(tiny_dataset)), 50.0
    actions = agent_actions(agent, dataset, target)
    for start, length in zip(dataset.episode_starts, dataset.episode_lengths, strict=True):
        rows = slice(start, start + length)
        earned = np.concatenate(([0.0], np.cumsum(dataset.rewards[rows])[:-1]))
        to_go = target - earned * (agent.conditioning == "return-to-go")
        taken = dataset.actions[rows]
        arrays = (dataset.observations[rows], taken, np.roll(taken, 1, 0), to_go)
        window = window_of(*(array[None] for array in arrays))
        with torch.no_grad():
            expected = agent.model.to_actions(agent.model(window))[0]
        np.testing.assert_allclose(actions[rows], expected, atol=1e-4)


class Shifted:
    """Acts at a distance from what is shown."""

    def __init__(self, distance: float) -> None:
        self.distance = distance
        self.model = ActionModel(2, 1)
        self.config = SimpleNamespace(model=SimpleNamespace(observation_dim=2, action_dim=1))

    def reset(self, num_envs, target) -> None: ...
    def keep(self, indices) -> None: ...
    def took(self, actions) -> None: ...
    def act(self, observations, rewards):
        return observations[:, :1] + self.distance


def episodes_of_two(shown, actions, rewards):
    """From (episodes, 2) each; the timestep is shown as well."""
    timestep = np.broadcast_to([0.0, 1.0], shown.shape)
    observations = np.stack((shown, timestep), axis=-1).reshape(-1, 2)
    lengths = np.full(len(shown), 2)
    return dataset_of(observations, actions.reshape(-1, 1), rewards.reshape(-1), lengths, dataset_id="toy")


def test_estimates_of_a_task_whose_returns_are_known():
    """A timestep pays 1 less the square of the action's distance from what is shown. The data's distances are
    uniform in -1 to 1."""
    shown, distances = np.random.default_rng(0).uniform(-1, 1, size=(2, 1000, 2))
    dataset = episodes_of_two(shown, shown + distances, 1 - np.square(distances))
    estimates = estimate(Shifted(0.8), dataset, 0.0, updates=300)
    assert estimates.data.mean() == pytest.approx(2 * (1 - 1 / 3), abs=0.1)
    for found in (estimates.first_order, estimates.fitted_q):
        assert found.mean() == pytest.approx(2 * (1 - 0.8**2), abs=0.15)


def test_fitted_q_follows_the_agents_own_later_actions():
    """The first action is what is shown next, and the second pays its product with that.

    The data's second actions are random, so that its critics see no use in the first one.
    """
    first, second = np.random.default_rng(1).uniform(-1, 1, size=(2, 1000))
    shown = np.stack((np.ones(1000), first), axis=1)
    rewards = np.stack((np.zeros(1000), second * first), axis=1)
    dataset = episodes_of_two(shown, np.stack((first, second), axis=1), rewards)
    estimates = estimate(Shifted(0.0), dataset, 0.0, updates=600)  # repeats what is shown, 1
    assert estimates.first_order.mean() == pytest.approx(1 / 3, abs=0.15)  # the mean square of first actions
    assert 0.6 < estimates.fitted_q.mean() < 1.2  # 1/3 more than DISCOUNT * (1 - 1/3), were Q exact


def test_what_cannot_be_estimated_is_one_line(tiny_dataset, tmp_path):
    train_here(tiny_dataset, tmp_path / "run", steps=1, eval_episodes=0)
    table = estimate_run(EstimateConfig(tmp_path / "run", updates=20))
    assert "file:tiny.hdf5, target 30, 1 episodes held out" in table
    assert "fitted q" in table
    agent = flowrl.load_agent(tmp_path / "run")
    agent.save(tmp_path / "alone")
    with pytest.raises(UserError, match="alone: names no data; give --dataset or --env"):
        estimate_run(EstimateConfig(tmp_path / "alone"))
    other = episodes_of_two(*np.zeros((3, 4, 2)))
    with pytest.raises(
        UserError, match="toy: estimates need continuous actions and the agent's observations"
    ):
        estimate(agent, other, 0.0)
    with pytest.raises(UserError, match="toy: a single episode, so that none can be held out"):
        estimate(Shifted(0.0), episodes_of_two(*np.zeros((3, 1, 2))), 0.0)


def test_the_run_says_how_its_data_is_read_and_any_share_of_it_can_be_held_out(tiny_dataset, tmp_path):
    """Episodes of at most 15 timesteps by the run's time limit: 9, 1, 15, 15, 15 and 5."""
    path = Path(shutil.copy(tiny_dataset, tmp_path))
    with h5py.File(path, "a") as file:
        del file["timeouts"]
    train_here(path, tmp_path / "run", steps=1, eval_episodes=0)
    table = estimate_run(EstimateConfig(tmp_path / "run", updates=20, held_out=0.8))
    assert "file:tiny.hdf5, target 30, 5 episodes held out" in table
