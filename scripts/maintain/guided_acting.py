"""Move the actions of trained agents along a critic's gradient, and score them: results/guidance.md.

    python scripts/maintain/guided_acting.py runs/default/walker2d-medium/flow-episode/seed0 --dataset flowrl

The critic is learned from the run's data in about a minute; no weight of the agent changes.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from flowrl import Agent, load_agent
from flowrl.data import EpisodeDataset, load_episodes
from flowrl.errors import UserError, exit_on_user_error
from flowrl.evaluation.evaluate import evaluate, format_table
from flowrl.model.action_model import ActingState
from flowrl.model.agent import Conditioning


@dataclass(frozen=True)
class GuidanceConfig:
    """Learn a critic, then evaluate the agent with and without it, from the same starts."""

    run: tyro.conf.Positional[Path]
    """Run folder of an agent of continuous actions that acts recurrently."""
    dataset: tuple[str, ...]
    """Its data: flowrl with --env NAME, minari:ID or PATH.hdf5."""
    env: str | None = None
    """Name of the data, such as walker2d-medium."""
    conditioning: Conditioning | None = None
    """Of the acting agent; by default as the run was configured."""
    step: float = 0.1
    """How far actions move, from bounds at -1 and 1, along a gradient of mean norm."""
    updates: int = 3_000
    """Of the critic, on 256 transitions each."""
    discount: float = 0.99
    trace: float = 0.9
    """Lambda of the returns that the critic learns."""
    expectile: float = 0.7
    """Of the smaller Q that V learns."""
    episodes: int = 100
    seed: int = 0
    """Of the critic, and of the evaluation's episodes."""


class Critic(nn.Module):
    """Twin Q(s, a) and V(s), with LayerNorm; normalised inputs, outputs in standard deviations of returns.

    V is an expectile of the smaller Q. Source: Kostrikov et al. (2021), arXiv 2110.06169, Eq. 5.
    """

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        super().__init__()
        self.twins = nn.ModuleList(_perceptron(observation_dim + action_dim) for _ in range(2))
        self.state_value = _perceptron(observation_dim)

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Of (..., observation_dim) and (..., action_dim): both, (2, ...)."""
        inputs = torch.cat((observations, actions), dim=-1)
        return torch.stack([twin(inputs).squeeze(-1) for twin in self.twins])

    def slope(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Gradient of the smaller Q by the action, (..., action_dim)."""
        with torch.inference_mode(False), torch.enable_grad():
            actions = actions.clone().requires_grad_()
            smaller = self.values(observations.clone(), actions).amin(dim=0)
            return torch.autograd.grad(smaller.sum(), actions)[0]


def _perceptron(inputs: int, width: int = 256) -> nn.Sequential:
    hidden = [(inputs, width), (width, width)]
    layers = [nn.Sequential(nn.Linear(*sizes), nn.LayerNorm(width), nn.ReLU()) for sizes in hidden]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def trace_returns(
    values: Tensor, dataset: EpisodeDataset, rewards: Tensor, discount: float, trace: float
) -> Tensor:
    """Lambda-returns of all transitions, (transitions,), from state values (transitions,).

    A terminal state ends the return; the last observation of a truncated episode is not in the data, so that
    its last return is the value of the state before.
    """
    returns, bootstrapped = rewards.tolist(), values.tolist()
    for start, length, ended in zip(
        dataset.episode_starts, dataset.episode_lengths, dataset.terminated, strict=True
    ):
        last = start + length - 1
        following = returns[last] if ended else bootstrapped[last]
        returns[last] = following
        for index in range(last - 1, start - 1, -1):
            blend = (1 - trace) * bootstrapped[index + 1] + trace * following
            following = returns[index] + discount * blend
            returns[index] = following
    return torch.tensor(returns)


def learn_critic(dataset: EpisodeDataset, agent: Agent, config: GuidanceConfig) -> tuple[Critic, float]:
    """Return the critic, its weights averaged, and the mean norm of its slopes on the data."""
    torch.manual_seed(config.seed)
    with torch.no_grad():
        observations = agent.model.normalize_observations(torch.from_numpy(dataset.observations))
        actions = agent.model.normalize_actions(torch.from_numpy(dataset.actions))
    rewards = torch.from_numpy(dataset.rewards) * (1 - config.discount) / np.abs(dataset.rewards).mean()
    usable = torch.ones(len(rewards), dtype=torch.bool)  # the last of a truncated episode teaches nothing
    ends = dataset.episode_starts + dataset.episode_lengths - 1
    usable[ends[~dataset.terminated]] = False
    choices = usable.nonzero().squeeze(-1)

    critic = Critic(observations.shape[1], actions.shape[1])
    averaged = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.updates, eta_min=5e-5)
    # Observed returns first: their scale is right from the start, 1 for a reward that stays at its mean.
    targets = trace_returns(torch.ones_like(rewards), dataset, rewards, config.discount, 1.0)
    mean, scale = targets.mean(), targets.std()
    for update in range(config.updates):
        if update and update % 250 == 0:
            with torch.no_grad():
                values = torch.cat([averaged.state_value(x).squeeze(-1) for x in observations.split(8192)])
            values = values * scale + mean
            targets = trace_returns(values, dataset, rewards, config.discount, config.trace)
        batch = choices[torch.randint(len(choices), (256,))]
        values = critic.values(observations[batch], actions[batch])
        loss = (values - (targets[batch] - mean) / scale).square().mean(dim=1).sum()
        error = values.detach().amin(dim=0) - critic.state_value(observations[batch]).squeeze(-1)
        weight = torch.where(error < 0, 1 - config.expectile, config.expectile)
        loss = loss + (weight * error.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            rate = max(0.005, 1 / (update + 1))
            torch._foreach_lerp_(list(averaged.parameters()), list(critic.parameters()), rate)
    sample = choices[torch.randint(len(choices), (4096,))]
    return averaged, float(averaged.slope(observations[sample], actions[sample]).norm(dim=-1).mean())


def guide(agent: Agent, critic: Critic, length: float) -> None:
    """Let the agent's actions move by ``length`` times the critic's slope, within the bounds."""
    model = agent.model
    plain = model.step

    def step(
        observations: Tensor, returns_to_go: Tensor, timesteps: Tensor, state: ActingState
    ) -> tuple[Tensor, ActingState]:
        outputs, state = plain(observations, returns_to_go, timesteps, state)
        slope = critic.slope(model.normalize_observations(observations), outputs)
        return (outputs + length * slope).clamp(-1, 1), state

    object.__setattr__(model, "step", step)


def compare(config: GuidanceConfig) -> None:
    """Evaluate at the best return in the data, without and with the critic.

    Raises:
        UserError: an agent that acts otherwise, or without an environment.
    """
    agent = load_agent(config.run)
    if agent.model.action_choices or agent.acting != "recurrent" or agent.environment is None:
        raise UserError(f"{config.run}: needs an environment, continuous actions and recurrent acting")
    dataset = load_episodes(config.dataset, config.env)
    critic, norm = learn_critic(dataset, agent, config)
    for name, step in (("without", 0.0), (f"step {config.step:g}", config.step)):
        agent = load_agent(config.run, conditioning=config.conditioning)
        assert agent.environment is not None
        guide(agent, critic, step / norm)
        target, reference = agent.config.targets[:1], agent.config.reference
        results = evaluate(agent, agent.environment, target, config.episodes, config.seed, reference)
        print(f"{name}\n{format_table(results)}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        compare(tyro.cli(GuidanceConfig, description=__doc__))
