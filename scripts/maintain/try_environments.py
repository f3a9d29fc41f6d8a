"""Train and score agents in other people's environments, by the command line alone, and write a table of it.

    python scripts/maintain/try_environments.py --output results/environments.md

The data is flowrl's own, of random or scripted episodes, as a Minari dataset or a file in D4RL's layout; it
is no benchmark's. Needs gymnasium-robotics, shimmy[dm-control], gymnasium[box2d], minigrid and popgym.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer

STEPS_OF_DATA = 2_000
TRAINING = (
    *("--embed-dim", "64", "--num-layers", "2", "--num-heads", "2", "--batch-size", "32"),
    *("--steps", "100", "--eval-episodes", "0"),
)
EPISODES = 5
LIMIT = 1000  # steps of an episode where the environment has no limit
PACKAGES = (
    "gymnasium",
    "gymnasium-robotics",
    "mujoco",
    "dm-control",
    "shimmy",
    "box2d",
    "minigrid",
    "popgym",
)
Policy = Callable[[Any, gym.Env, np.random.Generator], Any]  # (observation, environment, random) -> action


def at_random(observation: Any, env: gym.Env, random: np.random.Generator) -> Any:
    return env.action_space.sample()


def to_the_goal(observation: Any, env: gym.Env, random: np.random.Generator) -> np.ndarray:
    """Mazes of points and Fetch: straight towards the goal, noisily."""
    action = random.normal(0, 0.5, env.action_space.shape)
    towards = observation["desired_goal"] - observation["achieved_goal"]
    action[: len(towards)] += 5 * towards
    return action.clip(-1, 1).astype(np.float32)


def swing_up(observation: Any, env: gym.Env, random: np.random.Generator) -> np.ndarray:
    """Pendulum: pump energy, then balance."""
    cosine, sine, speed = observation
    torque = -8 * sine - 2 * speed if cosine > 0.7 else 2 * np.sign(speed)
    return np.array([torque + random.normal(0, 0.5)], np.float32).clip(-2, 2)


def land(observation: Any, env: gym.Env, random: np.random.Generator) -> np.ndarray:
    """LunarLander: its own heuristic, noisily."""
    from gymnasium.envs.box2d.lunar_lander import heuristic

    return (heuristic(env.unwrapped, observation) + random.normal(0, 0.3, 2)).clip(-1, 1).astype(np.float32)


def balance(observation: Any, env: gym.Env, random: np.random.Generator) -> int:
    """CartPole: towards the falling side, at random half of the time."""
    return (
        int(random.integers(2)) if random.random() < 0.5 else int(observation[2] + 0.3 * observation[3] > 0)
    )


@dataclass(frozen=True)
class Trial:
    """An environment and where its data comes from."""

    env_id: str
    module: str = ""
    policy: Policy = at_random
    in_minari: bool = True
    recorded: bool = True  # in the Minari dataset; shimmy registers functions, which Minari cannot write
    flags: tuple[str, ...] = ()


TRIALS = (
    Trial("PointMaze_Open-v3", "gymnasium_robotics", to_the_goal),
    Trial("PointMaze_UMaze-v3", "gymnasium_robotics", to_the_goal),
    Trial("AntMaze_UMaze-v5", "gymnasium_robotics"),
    Trial("AdroitHandPen-v1", "gymnasium_robotics"),
    Trial("AdroitHandDoor-v1", "gymnasium_robotics", in_minari=False),
    Trial("FrankaKitchen-v1", "gymnasium_robotics"),
    Trial("FetchReach-v4", "gymnasium_robotics", to_the_goal),
    Trial("dm_control/walker-walk-v0", "shimmy", recorded=False),
    Trial("Pendulum-v1", policy=swing_up, in_minari=False),
    Trial("LunarLanderContinuous-v3", policy=land, in_minari=False),
    Trial("BipedalWalker-v3", in_minari=False),
    Trial("CartPole-v1", policy=balance, in_minari=False),
    Trial("MiniGrid-Empty-5x5-v0", "minigrid"),
    Trial("popgym-RepeatFirstEasy-v0", "popgym", in_minari=False),
    Trial("popgym-PositionOnlyCartPoleEasy-v0", "popgym"),
)


def try_environments(output: Path, only: tuple[str, ...] = ()) -> None:
    """Write the table to ``output``; ``only`` keeps the trials whose environment's id has one of these."""
    rows = []
    for trial in TRIALS:
        if not only or any(part in trial.env_id for part in only):
            rows.append(_row(trial))
            print(rows[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    output.write_text(
        "# Other people's environments\n\n"
        "Trained and scored by the command line alone, with `scripts/maintain/try_environments.py`. The\n"
        "data is flowrl's own, of random or scripted episodes: no benchmark's. Trainings this short\n"
        f"show that everything works, not how well. {versions}.\n\n"
        f"Training: `{' '.join(TRAINING)}`. Return and success rate: `flowrl evaluate`, {EPISODES} episodes\n"
        "at the best return in the data.\n\n"
        "| environment | data | transitions | its mean return | return | success |\n"
        "|---|---|---:|---:|---:|---:|\n" + "\n".join(rows) + "\n"
    )


def _row(trial: Trial) -> str:
    with TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
        if trial.module:
            importlib.import_module(trial.module)
        source, described = _write_data(trial, folder)
        imports = ["--env-import", trial.module] if trial.module else []
        env = [] if trial.in_minari and trial.recorded else ["--env", trial.env_id]
        run = str(folder / "run")
        commands = (
            ["train", "--dataset", source, *env, *imports, "--run-dir", run, *TRAINING, *trial.flags],
            ["evaluate", run, "--episodes", str(EPISODES), "--json", str(folder / "scores.json")],
        )
        kind = "Minari" if trial.in_minari else "HDF5"
        beginning = f"| {trial.env_id} | {kind}, {(trial.policy.__name__).replace('_', ' ')} | {described} |"
        for command in commands:
            done = subprocess.run(
                [sys.executable, "-m", "flowrl", *command], capture_output=True, text=True, timeout=1800
            )
            if done.returncode:
                return f"{beginning} {command[0]}: {done.stderr.strip().splitlines()[-1]} | |"
        best = json.loads((folder / "scores.json").read_text())["targets"][0]
        success = f"{best['success_rate']:.2f}" if "success_rate" in best else ""
        return f"{beginning} {best['return_mean']:.3g} | {success} |"


def _write_data(trial: Trial, folder: Path) -> tuple[str, str]:
    """Write episodes of the trial's policy; what --dataset takes, and a description."""
    env, random = gym.make(trial.env_id, disable_env_checker=True), np.random.default_rng(0)
    env.action_space.seed(0)
    limit = (env.spec and env.spec.max_episode_steps) or LIMIT
    episodes: list[EpisodeBuffer] = []
    steps = 0
    while steps < STEPS_OF_DATA:
        observation, _ = env.reset(seed=len(episodes))
        observations, ended = [observation], False
        taken: list[tuple[Any, float, bool, bool]] = []
        while not ended:
            action = trial.policy(observation, env, random)
            observation, reward, terminated, truncated, _ = env.step(action)
            steps += 1
            ended = bool(terminated or truncated or len(taken) + 1 == limit)
            observations.append(observation)
            taken.append((action, float(np.asarray(reward).item()), terminated, ended and not terminated))
        actions, rewards, terminations, truncations = map(np.array, zip(*taken, strict=True))
        buffer = EpisodeBuffer(
            len(episodes), None, None, _stacked(observations), actions, rewards, terminations, truncations, {}
        )
        episodes.append(buffer)
    described = f"{steps} | {np.mean([sum(episode.rewards) for episode in episodes]):.3g}"
    if trial.in_minari:
        space = env.observation_space
        if isinstance(space, gym.spaces.Dict):  # Minari has no form for MiniGrid's missions
            texts = {key: gym.spaces.Text(200) for key, part in space.items() if part.dtype == np.dtype(str)}
            space = gym.spaces.Dict({**space.spaces, **texts})
        minari.create_dataset_from_buffers(
            "own/trial-v0",
            episodes,
            env=env if trial.recorded else None,
            observation_space=space,
            action_space=env.action_space,
        )
        return "minari:own/trial-v0", described
    path = folder / "trial.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([episode.observations[:-1] for episode in episodes])
        for key, name in (
            ("actions", "actions"),
            ("rewards", "rewards"),
            ("terminals", "terminations"),
            ("timeouts", "truncations"),
        ):
            file[key] = np.concatenate([getattr(episode, name) for episode in episodes])
    return str(path), described


def _stacked(values: list[Any]) -> Any:
    """Observations one after another, in the form that Minari takes."""
    if isinstance(values[0], dict):
        return {key: _stacked([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*values, strict=True))
    return values if isinstance(values[0], str) else np.array(values)


if __name__ == "__main__":
    tyro.cli(try_environments)
