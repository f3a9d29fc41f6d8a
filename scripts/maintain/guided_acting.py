"""Move the actions of trained agents along their critics' gradient, and score them: results/guidance.md.

    python scripts/maintain/guided_acting.py runs/default/walker2d-medium/flow-episode/seed0 --dataset flowrl

``flowrl train --q-weight`` moves the targets of the policy's loss instead. Here no weight of the agent
changes: critics are learned from the run's data, and correct each action that it is about to take.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from flowrl import Agent, load_agent
from flowrl.data import load_episodes
from flowrl.errors import UserError, exit_on_user_error
from flowrl.evaluation.evaluate import evaluate, format_table
from flowrl.model.action_model import ActingState
from flowrl.model.agent import Conditioning
from flowrl.training.guidance import Guidance, learn_guidance


@dataclass(frozen=True)
class GuidanceConfig:
    """Learn critics, then evaluate the agent with and without them, from the same starts."""

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
    episodes: int = 100
    seed: int = 0
    """Of the critics, and of the evaluation's episodes."""


def guide(agent: Agent, guidance: Guidance) -> None:
    """Let the agent's actions move as ``guidance`` moves the targets of a loss."""
    model = agent.model
    plain = model.step

    def step(
        observations: Tensor, returns_to_go: Tensor, timesteps: Tensor, state: ActingState
    ) -> tuple[Tensor, ActingState]:
        outputs, state = plain(observations, returns_to_go, timesteps, state)
        with torch.inference_mode(False):
            normalised = model.normalize_observations(observations.clone())
            outputs = outputs.clone()  # of inference mode, as the observations
            moves = guidance(normalised, outputs, torch.ones(len(outputs), dtype=torch.bool))
        return outputs + moves, state

    object.__setattr__(model, "step", step)


def compare(config: GuidanceConfig) -> None:
    """Evaluate at the best return in the data, without and with the critics.

    Raises:
        UserError: an agent that acts otherwise, or without an environment.
    """
    agent = load_agent(config.run)
    if agent.model.action_choices or agent.acting != "recurrent" or agent.environment is None:
        raise UserError(f"{config.run}: needs an environment, continuous actions and recurrent acting")
    dataset = load_episodes(config.dataset, config.env)
    guidance = learn_guidance(dataset, agent.model, config.step, config.seed)
    for guided in (False, True):
        agent = load_agent(config.run, conditioning=config.conditioning)
        assert agent.environment is not None
        if guided:
            guide(agent, guidance)
        target, reference = agent.config.targets[:1], agent.config.reference
        results = evaluate(agent, agent.environment, target, config.episodes, config.seed, reference)
        print(f"{f'step {config.step:g}' if guided else 'without'}\n{format_table(results)}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        compare(tyro.cli(GuidanceConfig, description=__doc__))
