"""Data for the T-Maze: made from its name, and compared with the corridor of the environment."""

import numpy as np

from flowrl.data.dataset import EpisodeDataset, build_episodes
from flowrl.envs.memory import TMAZE_ID, TMazeVectorEnv, cue_size
from flowrl.envs.reference_scores import reference_scores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import check_limit
from flowrl.errors import UserError

TRANSITIONS = 200_000  # of a dataset, if that many episodes fit
FEWEST_EPISODES, MOST_EPISODES = 256, 2_000
LONGEST_DATA = 100_000  # timesteps of a corridor: 256 of them take 1 GB
WALKING_NOISE = 0.1  # standard deviation of the actions in the corridor, which do nothing


def tmaze_dataset(name: str, environment: EnvironmentSpec) -> EpisodeDataset:
    """Return the data of the T-Maze ``name``; the same for the same name, everywhere.

    Its episodes take a random arm, so that the return is 1 where it happened to be the right one.

    Raises:
        UserError: a corridor too long to hold its data.
    """
    length, arms, distractors = (environment.kwargs[key] for key in ("length", "arms", "distractors"))
    if length > LONGEST_DATA:
        raise UserError(
            f"{name}: data is made for corridors of up to {LONGEST_DATA} timesteps; train on a shorter one, "
            f"then evaluate with --env {name}"
        )
    episodes = min(max(TRANSITIONS // length, FEWEST_EPISODES), MOST_EPISODES)
    generator = np.random.default_rng([length, arms, distractors])
    envs = TMazeVectorEnv(episodes, length, arms, distractors)
    observations = np.empty((episodes, length, cue_size(arms) + 3), dtype=np.float32)
    actions = generator.normal(0, WALKING_NOISE, (episodes, length, 1)).clip(-1, 1).astype(np.float32)
    actions[:, -1, 0] = 2 * generator.integers(arms, size=episodes) / (arms - 1) - 1  # the middle of an arm
    rewards = np.zeros((episodes, length), dtype=np.float32)
    seeds = generator.integers(2**31, size=episodes).tolist()
    observations[:, 0], _ = envs.reset(seed=seeds)
    for timestep in range(length):
        following, rewards[:, timestep], _, _, _ = envs.step(actions[:, timestep])
        if timestep + 1 < length:
            observations[:, timestep + 1] = following
    envs.close()
    return build_episodes(
        observations=observations.reshape(episodes * length, -1),
        actions=actions.reshape(episodes * length, 1),
        rewards=rewards.reshape(-1),
        episode_lengths=np.full(episodes, length),
        terminated=np.ones(episodes, dtype=bool),
        dataset_id=f"flowrl/{name}",
        where=name,
        environment=environment,
        reference=reference_scores(environment.env_id),
    )


def check_corridor(dataset: EpisodeDataset) -> None:
    """Raise a UserError if the environment's corridor is not as long as the data's, or ends too early."""
    if dataset.environment is None or dataset.environment.env_id != TMAZE_ID:
        return
    expected, longest = dataset.environment.kwargs.get("length", 500), dataset.max_episode_length
    if longest != expected:
        raise UserError(
            f"{dataset.dataset_id}: its longest episode has {longest} timesteps, the environment's corridor "
            f"{expected}: give --env tmaze-{longest}"
        )
    check_limit(dataset.environment, expected)
