"""Critics: the actions that they move, the estimates that they give, and tasks whose answers are known."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import dataset_of
from test_transformer import window_of
from tiny_training import assert_same_end, figures, resume_here, train_here

import flowrl
from flowrl.data import load_episodes
from flowrl.data.returns import DISCOUNT, lambda_returns
from flowrl.errors import UserError
from flowrl.evaluation.off_policy import agent_actions, estimate
from flowrl.model import critic
from flowrl.model.action_model import ActionModel
from flowrl.report.estimate import EstimateConfig, estimate_run
from flowrl.training import guidance
from flowrl.training.guidance import learn_critics, learn_guidance


@pytest.fixture
def small_critics(monkeypatch):
    """A quarter of the usual width, which is enough where actions are moved."""
    monkeypatch.setattr(critic, "WIDTH", 64)


def episodes(rewards_of, lengths=(5,) * 800):
    """Two numbers of observation that do not depend on actions, two of action."""
    rng, steps = np.random.default_rng(0), sum(lengths)
    observations = rng.normal(size=(steps, 2)).astype(np.float32)
    actions = rng.uniform(-0.9, 0.9, size=(steps, 2)).astype(np.float32)
    return dataset_of(observations, actions, rewards_of(observations, actions, rng), lengths)


@pytest.mark.usefixtures("small_critics")
def test_actions_move_towards_more_return_and_hardly_where_they_do_not_matter(monkeypatch):
    """The reward falls with the distance to an action given by the observation; otherwise it is noise."""
    monkeypatch.setattr(guidance, "UPDATES", 300)

    def best(observations):
        return 0.5 * np.tanh(observations)

    useful = episodes(lambda o, a, rng: -np.square(a - best(o)).sum(axis=1))
    useless = episodes(lambda o, a, rng: rng.normal(size=len(o)))
    found = {}
    for name, dataset in {"useful": useful, "useless": useless}.items():
        dataset.observations.flags.writeable = dataset.actions.flags.writeable = False  # as if mapped
        guidance_of = learn_guidance(dataset, ActionModel(2, 2), q_weight=0.1, seed=0)
        pair = (torch.tensor(array)[None] for array in (dataset.observations, dataset.actions))
        moves = guidance_of(*pair, torch.ones(1, len(dataset.actions), dtype=torch.bool))[0].numpy()
        found[name] = float(guidance_of.agreement), np.linalg.norm(moves, axis=1).mean()
        assert np.abs(dataset.actions + moves).max() <= 1
        if name == "useful":
            pair = (dataset.actions, dataset.actions + moves)
            before, after = (np.linalg.norm(x - best(dataset.observations), axis=1).mean() for x in pair)
            assert after < before - 0.07
    (useful_agreement, useful_move), (useless_agreement, useless_move) = found.values()
    assert useful_agreement > 0.7 > 0.5 > useless_agreement
    assert 0.1 < useful_move < 0.25
    assert useless_move < 0.6 * useful_move


def test_guidance_adds_the_gradient_of_q_at_the_policys_own_actions_where_timesteps_are_valid():
    torch.manual_seed(0)
    model, outputs = ActionModel(2, 2), torch.randn(2, 3, 2).mul(0.3).requires_grad_()
    model.forward = lambda window: outputs
    window = window_of(*(torch.randn(2, 3, 2) for _ in range(3)), torch.randn(2, 3))
    window.valid[0, 2] = False
    critics = critic.Critics(2, 2, 2).requires_grad_(False)
    critics.members[1] = critics.members[0]  # so that they agree
    guidance_of = guidance.Guidance(critics, q_weight=0.01)
    guidance_of.mean_slope.fill_(0.5)
    losses = (model.loss(window, each) for each in (None, guidance_of))
    plain, guided = (torch.autograd.grad(loss, outputs)[0] for loss in losses)
    q = critics.action_values(window.observations, outputs).mean(dim=0)
    slopes = torch.autograd.grad((q * window.valid).sum(), outputs)[0]
    factor = -2 * 2 * 0.01 / 0.5 / (2 * window.valid.sum())
    torch.testing.assert_close(guided - plain, factor * slopes)


@pytest.mark.usefixtures("small_critics")
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


@pytest.mark.usefixtures("small_critics")
def test_a_truncated_end_is_worth_nothing_by_itself_where_rewards_are_negative(monkeypatch):
    monkeypatch.setattr(guidance, "UPDATES", 150)
    dataset = episodes(lambda o, a, rng: 0.5 * a[:, 0] - 1, lengths=(40,) * 60)
    dataset.terminated[:] = False
    dataset.observations[:, 0] = np.tile(np.arange(40), 60) / 20 - 1
    critics = learn_critics(dataset, ActionModel(2, 2), seed=0)
    for member in critics.action_values(*map(torch.from_numpy, (dataset.observations, dataset.actions))):
        assert abs(np.corrcoef(member, dataset.observations[:, 0])[0, 1]) < 0.6
        assert np.corrcoef(member, dataset.actions[:, 0])[0, 1] > 0.6


def test_what_cannot_guide_is_one_line():
    dataset = episodes(lambda o, a, rng: np.ones(len(o)))
    with pytest.raises(UserError, match=r"--resume: the checkpoint's critics are damaged, or of an earlier"):
        learn_guidance(dataset, ActionModel(2, 2), 0.1, 0, saved={"critics.mean": torch.ones(1)})
    discrete = replace(dataset, action_choices=(2,))
    with pytest.raises(UserError, match=r"--q-weight 0\.1: needs continuous actions"):
        learn_guidance(discrete, ActionModel(2, 2, (2,)), 0.1, 0)


@pytest.mark.usefixtures("small_critics")
def test_a_resumed_run_keeps_its_critics(unevaluated, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "UPDATES", 20)
    train_here(tiny_dataset, tmp_path / "whole", q_weight=0.5, eval_episodes=0)
    losses = [figures(each, "train")[-1]["loss"] for each in (tmp_path / "whole", unevaluated)]
    assert losses[0] != losses[1]
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000060")
    monkeypatch.setattr(guidance, "learn_critics", None)
    resume_here(run)
    assert_same_end(run, tmp_path / "whole")


@pytest.mark.parametrize("trace", [0.0, 0.7, 1.0])
def test_corrected_returns_are_their_sum_of_errors(tiny_dataset, trace):
    """Harutyunyan et al. (2016), Eq. 4: Q and the errors that follow, discounted, weighted by the trace."""
    dataset = load_episodes(str(tiny_dataset))
    taken, chosen = np.random.default_rng(0).normal(size=(2, dataset.num_transitions)).astype(np.float32)
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
def test_agent_actions_are_those_of_the_model_over_the_data(tiny_dataset, tmp_path, monkeypatch, options):
    train_here(tiny_dataset, tmp_path / "run", steps=3, eval_episodes=0, **options)
    agent = flowrl.load_agent(tmp_path / "run")
    dataset, target = load_episodes(str(tiny_dataset)), 50.0
    monkeypatch.setattr(agent, "took", lambda actions, took=agent.took: (took(actions), actions.fill(9)))
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
    assert "nan" not in table
    agent = flowrl.load_agent(tmp_path / "run")
    agent.save(tmp_path / "alone")
    with pytest.raises(UserError, match="alone: names no data; give --dataset or --env"):
        estimate_run(EstimateConfig(tmp_path / "alone"))
    other = episodes_of_two(*np.zeros((3, 4, 2)))
    message = "toy: estimates need continuous actions and the agent's observations"
    with pytest.raises(UserError, match=message):
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
