"""Fine-tuning online: rounds of collecting episodes and of updates on the best ones so far.

Source: Zheng et al., "Online Decision Transformer" (2022), arXiv 2202.05607, Algorithm 1. The head stays
deterministic; exploration is normal noise on continuous actions, and discrete ones are drawn. The replay
drops the episodes of lowest return, not the oldest.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowrl.data import EpisodeDataset
from flowrl.data.dataset import build_episodes, concatenate, top_episodes
from flowrl.envs.spaces import one_hot
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import episode_seeds
from flowrl.evaluation.rollout import rollout
from flowrl.finetuning.config import FinetuneConfig
from flowrl.model.agent import Agent
from flowrl.model.checkpoint import Checkpoint, has_checkpoint
from flowrl.signals import StopSignals
from flowrl.training.config import TrainConfig
from flowrl.training.setup import Stream, stream_seed
from flowrl.training.trainer import Trainer

_SAVED = ("observations", "actions", "rewards", "episode_lengths", "terminated")  # all else follows from it
_PREFIX = "replay."
_TIMESTEPS = "timesteps"


class OnlineTrainer(Trainer):
    """A training on a replay of whole episodes, in which those of higher return take the place of others.

    Windows hold the returns-to-go that an episode achieved, whatever return it aimed at (hindsight).
    """

    def __init__(
        self,
        options: FinetuneConfig,
        config: TrainConfig,
        run_dir: Path,
        agent: Agent,
        replay: EpisodeDataset,
        timesteps: int,
        device: torch.device,
        signals: StopSignals,
    ) -> None:
        self.options, self.replay = options, replay
        self.timesteps = timesteps  # of the environment, so far
        super().__init__(config, run_dir, replay, device, signals, agent=agent)
        if not has_checkpoint(run_dir):
            self.save()  # before the first evaluation, so that there is something to continue from

    def update(self) -> None:
        """Collect a round of episodes where one is due, then update."""
        if self.step % self.options.updates_per_round == 0:
            self._collect()
        super().update()

    def checkpoint(self) -> Checkpoint:
        """The replay as well."""
        saved = super().checkpoint()
        replay = {f"{_PREFIX}{name}": torch.from_numpy(getattr(self.replay, name)) for name in _SAVED}
        return replace(
            saved,
            training={**saved.training, _TIMESTEPS: self.timesteps},
            training_tensors={**saved.training_tensors, **replay},
        )

    @property
    def _evaluation_due(self) -> bool:
        """Also before the first update, unless only the last one is evaluated."""
        return super()._evaluation_due or (self.step == 0 and self.config.eval_every > 0)

    def _collect(self) -> None:
        """Add a round's episodes to the replay; random numbers of updates are the same with and without."""
        options, state, agent = self.options, self.state, self.state.agent
        assert agent.environment is not None  # checked by the command
        seed = stream_seed(options.seed, Stream.COLLECTION, self.step // options.updates_per_round)
        target = self.replay.episode_returns.max() if options.target is None else options.target
        explorer = Agent(agent.model, agent.config, acting=agent.acting, temperature=1.0, noise=options.noise)
        started = time.perf_counter()
        with (
            self._saved_at_a_failure(),  # resuming collects the round anew
            self.signals.interruptible(),
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            targets = np.full(options.episodes_per_round, float(target))
            collected = collect_episodes(explorer, agent.environment, targets, seed)
        self.timesteps += collected.num_transitions
        joined = concatenate([self.replay, collected])
        self.replay = replace(
            top_episodes(joined, min(1.0, options.replay_timesteps / joined.num_transitions)),
            dataset_id=self.replay.dataset_id,
            sha256=self.replay.sha256,
            reference=self.replay.reference,
            notes=self.replay.notes,
        )
        state.sampler.draw_from(self.replay)
        mean = float(collected.episode_returns.mean())
        figures = {
            _TIMESTEPS: self.timesteps,
            "episodes": collected.num_episodes,
            "target_return": float(target),
            "return_mean": mean,
            "replay_timesteps": self.replay.num_transitions,
            "replay_return_mean": float(self.replay.episode_returns.mean()),
            "seconds": time.perf_counter() - started,
        }
        if self.metrics is not None:  # of the update that comes next: a checkpoint of this one is without it
            self.metrics.write("round", self.step + 1, figures)
        self._say(f"step {self.step}: {self.timesteps} timesteps collected, mean return {mean:.1f}")
        self._last_log += time.perf_counter() - started


def collect_episodes(
    agent: Agent, environment: EnvironmentSpec, target_returns: np.ndarray, seed: int
) -> EpisodeDataset:
    """Run one episode for each of the target returns, (episodes,), and return them as data.

    Raises:
        UserError: see :func:`flowrl.evaluation.rollout.rollout`.
    """
    steps: list[tuple[np.ndarray, ...]] = []  # slots, observations, actions, rewards of those that run
    seeds = episode_seeds(seed, len(target_returns))
    rollouts = rollout(agent, environment, target_returns, seeds, lambda *step: steps.append(step))
    slots, observations, actions, rewards = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    by_episode = np.argsort(slots, kind="stable")
    where = f"episodes in {environment.env_id}"
    choices = agent.model.action_choices
    if choices:
        actions = one_hot(where, "actions", actions.reshape(len(actions), -1), choices)
    rewards = rewards[by_episode]
    if agent.config.reward_mode == "delayed":
        rewards = np.zeros_like(rewards)
        rewards[np.cumsum(rollouts.lengths) - 1] = rollouts.returns
    return build_episodes(
        observations=observations[by_episode],
        actions=actions[by_episode],
        rewards=rewards,
        episode_lengths=rollouts.lengths,
        terminated=rollouts.terminated,
        dataset_id=where,
        where=where,
        action_choices=choices,
        environment=environment,
    )


def saved_replay(checkpoint: Checkpoint, agent: Agent, where: str) -> tuple[EpisodeDataset, int]:
    """The replay of a checkpoint, and the timesteps that were collected up to it; ``where`` begins messages.

    Raises:
        UserError: the checkpoint is not one of a fine-tuning.
    """
    about, tensors = agent.config, checkpoint.part(_PREFIX)
    timesteps = checkpoint.training.get(_TIMESTEPS)
    if tensors.keys() != set(_SAVED) or type(timesteps) is not int:
        raise UserError(f"{where}: its checkpoint holds no replay: it is not one of a fine-tuning")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    replay = build_episodes(
        **arrays,
        dataset_id=about.dataset_id,
        where=f"{where}: replay",
        action_choices=agent.model.action_choices,
        environment=about.environment,
        reference=about.reference,
    )
    return replace(replay, sha256=about.dataset_sha256), timesteps
