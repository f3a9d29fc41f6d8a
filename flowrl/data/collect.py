"""Collect episodes of behaviour policies: the same arrays for the same seed on any number of cores."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flowrl.behavior.policy import BehaviorPolicy
from flowrl.behavior.shipped import behavior_assets, load_behavior
from flowrl.data.dataset import EpisodeDataset, build_episodes
from flowrl.envs.cued_speed import CUED_IDS
from flowrl.envs.failures import named_failure
from flowrl.envs.reference_scores import reference_scores
from flowrl.envs.spaces import EnvironmentFacts, environment_facts
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_vector_env
from flowrl.errors import UserError
from flowrl.machine import available_memory

# A constant of the data: which other slots share a batch must not depend on the machine.
SLOTS = 32
UNIFORM = "uniform"  # a policy of every environment with bounded actions


@dataclass(frozen=True)
class Part:
    """A share of a dataset that one policy collects."""

    policy: str
    """A shipped policy's name, such as "medium", or "uniform"."""
    share: float = 1.0
    """Of the dataset's steps, relative to the other parts'."""
    noise: float = 0.0
    """Standard deviation of the normal noise that is added to each action before it is clipped."""

    @classmethod
    def parse(cls, text: str, noise: float = 0.0) -> "Part":
        """Build from NAME or NAME=SHARE, such as ``medium=3``; a UserError unless the share is positive."""
        name, _, share = text.partition("=")
        with suppress(ValueError):
            part = cls(name, float(share or 1), noise)
            if 0 < part.share < np.inf:
                return part
        raise UserError(f"--policies {text}: expected NAME or NAME=SHARE, such as medium=3")


@dataclass(frozen=True)
class Recipe:
    """All that determines a dataset's content."""

    environment: str
    """Whose shipped policies act, such as "hopper"; the id of one without any, where "uniform" acts."""
    parts: tuple[Part, ...]
    steps: int = 200_000
    """Transitions in all, at least: every episode is whole."""
    seed: int = 0
    opening: str = ""
    """Policy of every episode's beginning in a robot's task of flowrl's own, by default the cued one."""
    spec: EnvironmentSpec | None = None
    """What the policies act in, if not the environment that they were trained in."""

    @property
    def acts_in(self) -> EnvironmentSpec:
        """The environment that is stepped; a UserError without shipped policies and ``spec``."""
        if self.spec is not None:
            return self.spec
        if self.opening:
            return EnvironmentSpec(CUED_IDS[self.environment])
        return EnvironmentSpec(next(iter(behavior_assets(self.environment).values())).env_id)

    @property
    def policies(self) -> list[str]:
        """The names of all shipped policies that act."""
        names = [part.policy for part in self.parts] + [self.opening] * bool(self.opening)
        return [name for name in dict.fromkeys(names) if name != UNIFORM]

    def provenance(self) -> dict[str, Any]:
        """Return what the content follows from, in JSON types: the recipe and its policies' hashes.

        Raises:
            UserError: an unknown environment or policy.
        """
        assets = behavior_assets(self.environment) if self.policies else {}
        hashes = {name: assets[name].sha256 for name in self.policies}
        recipe = json.loads(json.dumps(asdict(self)))
        for name in ("opening", "spec"):  # absent in older data
            if not recipe[name]:
                del recipe[name]
        return {"recipe": recipe, "policy_sha256": hashes}


@dataclass(frozen=True)
class UniformPolicy:
    """Actions drawn uniformly between an environment's bounds."""

    facts: EnvironmentFacts

    @property
    def observation_dim(self) -> int:
        return self.facts.observation_dim

    def act(
        self, observations: np.ndarray, normals: np.ndarray, noise: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Return float32 actions (batch, action_dim) from standard normals of that shape."""
        low, high = self.facts.action_bounds
        uniform = torch.special.ndtr(torch.from_numpy(normals)).numpy()
        whole = np.issubdtype(self.facts.action_space.dtype, np.integer)
        drawn = np.floor((high - low + 1) * uniform) if whole else (high - low) * uniform
        actions = np.clip(low + drawn + noise, low, high)
        return (np.rint(actions) if whole else actions).astype(np.float32)


Policy = BehaviorPolicy | UniformPolicy


@dataclass(frozen=True)
class Episode:
    """One whole episode of T steps, in the environment's own precision."""

    policy: str
    seed: int  # of the environment's reset
    observations: np.ndarray  # (T + 1, observation_dim) float64
    actions: np.ndarray  # (T, action_dim) float32
    rewards: np.ndarray  # (T,) float64
    terminated: bool


@dataclass(frozen=True)
class Collection:
    """Episodes, part after part, and what they came from."""

    recipe: Recipe
    episodes: tuple[Episode, ...]


def collect(recipe: Recipe) -> Collection:
    """Run the policies of ``recipe`` in the environment that it names, which they were trained in by default.

    Part p takes the episodes p/0, p/1, ... until they hold its share of the steps; episode i draws its
    environment's seed and its actions' randomness from the seed sequence (recipe.seed, p, i) alone. So
    neither the number of cores nor the order in which episodes end changes anything.

    Raises:
        UserError: unknown environment or policy, a policy file that is not the shipped one, or an environment
            without a time limit or with unbounded actions.
    """
    shipped = {name: load_behavior(recipe.environment, name) for name in recipe.policies}
    environment = recipe.acts_in
    facts = environment_facts(environment)
    if facts.max_episode_steps is None:
        raise UserError(f"environment {environment.env_id} has no time limit: give --max-episode-steps")
    policies: dict[str, Policy] = {**shipped, UNIFORM: UniformPolicy(facts)}
    bounded = np.isfinite(facts.action_bounds).all() and not facts.action_choices
    if not bounded and len(shipped) < len(recipe.parts):
        raise UserError(f"environment {environment.env_id}: 'uniform' is for continuous actions with bounds")
    opening = policies[recipe.opening] if recipe.opening else None
    if opening is None and any(each.observation_dim != facts.observation_dim for each in shipped.values()):
        raise UserError(f"environment {environment}: its observations are not those of {recipe.environment}")
    noise = 16 * SLOTS * facts.max_episode_steps * facts.action_dim  # bytes
    if noise > (available_memory() or noise):
        raise UserError(
            f"environment {environment.env_id}: noise for episodes of {facts.max_episode_steps:,} timesteps "
            f"takes {noise / 2**30:,.1f} GiB of memory: give a smaller --max-episode-steps"
        )
    shares = np.array([part.share for part in recipe.parts])
    targets = np.ceil(recipe.steps * shares / shares.sum()).astype(int).tolist()
    episodes: list[Episode] = []
    envs = make_vector_env(environment, SLOTS)
    try:
        with tqdm(total=sum(targets), desc=f"collect {environment.env_id}", unit="step", disable=None) as bar:
            for index, (part, target) in enumerate(zip(recipe.parts, targets, strict=True)):
                policy = policies[part.policy]
                start = partial(_Running, recipe.seed, index, facts.max_episode_steps, facts.action_dim)
                episodes += _collect_part(start, part, policy, opening, target, envs, environment, bar)
    finally:
        envs.close()
    return Collection(recipe, tuple(episodes))


def to_dataset(collection: Collection, dataset_id: str) -> EpisodeDataset:
    """Return the collection in flowrl's in-memory form."""
    episodes, environment = collection.episodes, collection.recipe.acts_in
    return build_episodes(
        observations=np.concatenate([episode.observations[:-1] for episode in episodes]),
        actions=np.concatenate([episode.actions for episode in episodes]),
        rewards=np.concatenate([episode.rewards for episode in episodes]),
        episode_lengths=np.array([len(episode.rewards) for episode in episodes]),
        terminated=np.array([episode.terminated for episode in episodes]),
        dataset_id=dataset_id,
        where=dataset_id,
        environment=environment,
        reference=reference_scores(environment.env_id),
    )


class _Running:
    """The unfinished episode of a slot."""

    def __init__(self, seed: int, part_index: int, limit: int, action_dim: int, number: int) -> None:
        self.number, self.limit = number, limit
        generator = np.random.default_rng([seed, part_index, number])
        self.seed = int(generator.integers(2**31))
        self.drawn = generator.standard_normal((2, limit, action_dim))  # of the policy; of the exploration
        self.observations: list[np.ndarray] = []
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []

    def episode(self, policy: str, terminated: bool) -> Episode:
        arrays = (np.stack(self.observations), np.stack(self.actions), np.array(self.rewards))
        return Episode(policy, self.seed, *arrays, terminated)


def _collect_part(
    start: Callable[[int], _Running],
    part: Part,
    policy: Policy,
    opening: Policy | None,
    target: int,
    envs: Any,
    environment: EnvironmentSpec,
    progress: tqdm,
) -> list[Episode]:
    """Return the first episodes of a part that together hold ``target`` steps.

    Where ``opening`` acts as well, ``behavior_actions`` of the environment combines the two. Policies see the
    first components of the observation, as many as they were trained with.

    A slot whose episode is over starts the next one, until the steps already taken suffice.
    """
    finished: dict[int, Episode] = {}  # by number
    whole, whole_steps, all_steps = 0, 0, 0  # finished without a gap; their steps; all steps taken
    episodes = map(start, count())
    slots = list(islice(episodes, SLOTS))
    with named_failure(environment, "reset"):
        observations, _ = envs.reset(seed=[slot.seed for slot in slots])  # (SLOTS, observation_dim)
    for slot, observation in zip(slots, observations, strict=True):
        slot.observations.append(observation)
    active = np.ones(SLOTS, dtype=bool)
    while whole_steps < target:
        drawn = [slot.drawn[:, min(len(slot.rewards), slot.limit - 1)] for slot in slots]
        normals, noise = np.stack(drawn, axis=1)  # (SLOTS, action_dim) each
        seen = observations[:, : policy.observation_dim]
        actions = policy.act(seen, normals, part.noise * noise)
        if opening is not None:
            actions = envs.behavior_actions(opening.act(seen, normals, part.noise * noise), actions)
        with named_failure(environment, "a step"):
            observations, rewards, terminations, truncations, _ = envs.step(actions)
        for i in np.flatnonzero(active).tolist():
            slots[i].observations.append(observations[i])
            slots[i].actions.append(actions[i])
            slots[i].rewards.append(float(rewards[i]))
        taken, all_steps = int(active.sum()), all_steps + int(active.sum())
        progress.update(max(0, min(taken, target - (all_steps - taken))))

        ended = active & (terminations | truncations)
        for i in np.flatnonzero(ended).tolist():
            finished[slots[i].number] = slots[i].episode(part.policy, bool(terminations[i]))
        while whole in finished and whole_steps < target:
            whole, whole_steps = whole + 1, whole_steps + len(finished[whole].rewards)
        if all_steps >= target:
            active &= ~ended
        elif ended.any():
            for i in np.flatnonzero(ended).tolist():
                slots[i] = next(episodes)
            with named_failure(environment, "reset"):
                seeds = [slot.seed for slot in slots]
                observations, _ = envs.reset(seed=seeds, options={"reset_mask": ended})
            for i in np.flatnonzero(ended).tolist():
                slots[i].observations.append(observations[i])
    return [finished[number] for number in range(whole)]
