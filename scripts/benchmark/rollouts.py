"""Evaluation in Hopper: all episodes in one batch against one at a time, and against the bare physics.

Untrained agents fall at once, so the agents compute their actions but the robots take recorded ones, of the
medium behaviour policy: every contender steps through the very same episodes, as long as hopper-medium's.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import mujoco
import numpy as np
from tables import Goal, Measurement, Row, Section
from timing import interleaved, spread
from torch import Tensor
from workload import HOPPER, OBSERVATION_DIM, Sizes, make_agent, paper_config

from flowrl.behavior.policy import BehaviorPolicy
from flowrl.behavior.shipped import load_behavior
from flowrl.envs.vector import make_env
from flowrl.evaluation.rollout import rollout
from flowrl.machine import available_cores
from flowrl.model.agent import Agent

TARGET_RETURN = 3600.0
EARLY_STEP = 10


@dataclass(frozen=True)
class RecordedEpisodes:
    """Episode e starts from environment seed e and takes ``actions[e, : lengths[e]]``."""

    actions: np.ndarray  # (episodes, longest, action_dim) float32
    lengths: np.ndarray  # (episodes,) int64

    @property
    def num_steps(self) -> int:
        return int(self.lengths.sum())


class RecordingPolicy:
    """Acts with a behaviour policy and remembers what it did in which slot."""

    def __init__(self, policy: BehaviorPolicy) -> None:
        self._policy, self._generator = policy, np.random.default_rng(0)

    def reset(self, num_envs: int, target_return: float | np.ndarray) -> None:
        self.slots = np.arange(num_envs)
        self.actions: list[list[np.ndarray]] = [[] for _ in range(num_envs)]

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        normals = self._generator.standard_normal((len(observations), self._policy.action_dim))
        acted = self._policy.act(observations, normals)
        for slot, action in zip(self.slots.tolist(), acted, strict=True):
            self.actions[slot].append(action)
        return acted

    def keep(self, indices: np.ndarray) -> None:
        self.slots = self.slots[indices]


class ScriptedAgent:
    """Lets an agent compute its actions, and answers with recorded ones."""

    def __init__(self, agent: Agent | None, episodes: RecordedEpisodes) -> None:
        """Without an agent nothing is computed: what remains is the environment's share."""
        self._agent, self._episodes = agent, episodes

    def reset(self, num_envs: int, target_return: float | np.ndarray) -> None:
        self._slots, self._step = np.arange(num_envs), 0
        if self._agent is not None:
            self._agent.reset(num_envs, target_return)

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        if self._agent is not None:
            self._agent.act(observations, rewards)
        self._step += 1
        return self._episodes.actions[self._slots, self._step - 1]

    def keep(self, indices: np.ndarray) -> None:
        self._slots = self._slots[indices]
        if self._agent is not None:
            self._agent.keep(indices)


def record_episodes(num_episodes: int, behavior: str) -> RecordedEpisodes:
    """Run a shipped policy and keep its actions."""
    policy = RecordingPolicy(load_behavior("hopper", behavior))
    rollouts = rollout(policy, HOPPER, np.zeros(num_episodes), np.arange(num_episodes))
    actions = np.zeros((num_episodes, int(rollouts.lengths.max()), 3), dtype=np.float32)
    for slot, taken in enumerate(policy.actions):
        actions[slot, : len(taken)] = taken
    return RecordedEpisodes(actions, rollouts.lengths)


def evaluate_batch(agent: Agent | None, episodes: RecordedEpisodes) -> np.ndarray:
    """All episodes in one batch, by the evaluator's own loop; return their lengths."""
    number = len(episodes.lengths)
    scripted = ScriptedAgent(agent, episodes)
    return rollout(scripted, HOPPER, np.full(number, TARGET_RETURN), np.arange(number)).lengths


def evaluate_one_by_one(agent: Agent, episodes: RecordedEpisodes, num_episodes: int) -> np.ndarray:
    """The first episodes in a single Gymnasium environment, one after another; return their lengths."""
    env = make_env(HOPPER)
    lengths = np.zeros(num_episodes, dtype=np.int64)
    for episode in range(num_episodes):
        observation, _ = env.reset(seed=episode)
        agent.reset(1, TARGET_RETURN)
        rewards, finished = None, False
        while not finished:
            agent.act(observation[None], rewards)
            action = episodes.actions[episode, lengths[episode]]
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards, finished = np.array([reward]), terminated or truncated
            lengths[episode] += 1
    env.close()
    return lengths


class RawPhysics:
    """The same episodes as nothing but ``mj_step`` calls, on all cores; MuJoCo's timers are off here, too."""

    def __init__(self, episodes: RecordedEpisodes) -> None:
        env = make_env(HOPPER)
        base: Any = env.unwrapped
        self._model, self._frame_skip, self._episodes = base.model, base.frame_skip, episodes
        self._starts = []
        for seed in range(len(episodes.lengths)):
            env.reset(seed=seed)
            self._starts.append((base.data.qpos.copy(), base.data.qvel.copy()))
        env.close()
        self._cores = available_cores()

    def run(self) -> list[np.ndarray]:
        """Simulate to the end; return every episode's last (nq,) positions."""
        final: list[np.ndarray] = [np.empty(0)] * len(self._starts)
        remaining = iter(range(len(self._starts)))
        with ThreadPoolExecutor(self._cores) as pool:
            for future in [pool.submit(self._run_each, remaining, final) for _ in range(self._cores)]:
                future.result()
        return final

    def _run_each(self, remaining: Iterator[int], final: list[np.ndarray]) -> None:
        model, data = self._model, mujoco.MjData(self._model)
        control = data.ctrl
        for episode in remaining:
            mujoco.mj_resetData(model, data)
            data.qpos[:], data.qvel[:] = self._starts[episode]
            mujoco.mj_forward(model, data)
            for action in self._episodes.actions[episode, : self._episodes.lengths[episode]]:
                control[:] = action
                mujoco.mj_step(model, data, self._frame_skip)  # lets the other threads run meanwhile
            final[episode] = data.qpos.copy()


def measure_rollouts(sizes: Sizes, repetitions: int) -> Section:
    """Evaluation against both baselines, then the cost of acting late in an episode."""
    section = Section("rollouts")
    episodes = record_episodes(sizes.episodes, sizes.behavior)
    alone = min(sizes.baseline_episodes, sizes.episodes)
    config = paper_config(sizes)
    recurrent, window = make_agent(sizes, config), make_agent(sizes, config)
    fused = make_agent(sizes, paper_config(sizes, token_layout="fused"))
    recurrent.acting, fused.acting, window.acting = "recurrent", "recurrent", "window"
    names = (
        *("batch, recurrent", "batch, recurrent, fused"),
        *("one at a time, window", "environments alone", "raw physics"),
    )
    contenders = (
        partial(evaluate_batch, recurrent, episodes),
        partial(evaluate_batch, fused, episodes),
        partial(evaluate_one_by_one, window, episodes, alone),
        partial(evaluate_batch, None, episodes),
        RawPhysics(episodes).run,
    )
    timings = interleaved(dict(zip(names, contenders, strict=True)), repetitions)
    steps = dict.fromkeys(names, episodes.num_steps)
    steps["one at a time, window"] = int(episodes.lengths[:alone].sum())
    for name, timing in timings.items():
        section.measurements.append(Measurement(name, "Hopper episodes", steps[name], timing))

    interleaved_tokens, fused_tokens, one, environments, physics = (timings[name] for name in names)
    what = f"evaluation, {sizes.episodes} Hopper episodes, recurrent"
    baseline = "one environment at a time, recomputed 20-step window"
    for layout, batch in ((what, interleaved_tokens), (f"{what}, fused layout", fused_tokens)):
        faster = one.ratio_to(batch, factor=steps["batch, recurrent"] / steps["one at a time, window"])
        share = physics.ratio_to(batch, factor=100)
        section.rows += [
            Row(layout, baseline, "x", faster, Goal(30.0)),
            Row(layout, "raw physics, all cores", "%", share, Goal(60.0)),
        ]
    section.rows += [
        Row(
            "the vector environment alone",
            "raw physics, all cores",
            "%",
            physics.ratio_to(environments, factor=100),
        ),
    ]
    section.rows += _acting_rows(section, sizes, repetitions)
    section.notes += [
        f"{episodes.num_steps:,} environment steps, mean length {episodes.lengths.mean():.0f}, 4 mj_step "
        f"calls each; the baseline's rate is that of the first {alone} episodes.",
        "Times of the Hopper episodes are per evaluation, rates in environment steps per second.",
    ]
    return section


def state_bytes(agent: Agent) -> int:
    """Bytes of the tensors that an agent remembers its episodes in, its model not counted."""
    return sum(_tensor_bytes(value) for name, value in vars(agent).items() if name != "model")


def _acting_rows(section: Section, sizes: Sizes, repetitions: int) -> list[Row]:
    generator = np.random.default_rng(0)
    observations = generator.standard_normal((sizes.episodes, OBSERVATION_DIM))
    rewards = np.ones(sizes.episodes)
    agents, memory = {}, {}
    for step in (EARLY_STEP, sizes.late_step):
        agents[step] = agent = make_agent(sizes, paper_config(sizes))
        agent.acting = "recurrent"
        agent.reset(sizes.episodes, TARGET_RETURN)
        for _ in range(step):
            agent.act(observations, rewards)
        memory[step] = state_bytes(agent)
    contenders = {
        f"step {step:,}": partial(agent.act, observations, rewards) for step, agent in agents.items()
    }
    timings = interleaved(contenders, repetitions)
    for step, (name, timing) in zip(agents, timings.items(), strict=True):
        case = f"acting in {sizes.episodes} environments"
        section.measurements.append(Measurement(name, case, sizes.episodes, timing, memory[step]))
    early, late = timings.values()
    what, against = f"acting at episode step {sizes.late_step:,}", f"at step {EARLY_STEP}"
    growth = spread([memory[sizes.late_step] / memory[EARLY_STEP]])
    return [
        Row(f"{what}: time", against, "x", late.ratio_to(early), Goal(1.1, at_least=False)),
        Row(f"{what}: memory of the episodes", against, "x", growth, Goal(1.0, at_least=False)),
    ]


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(part) for part in value)
    if is_dataclass(value):
        return sum(_tensor_bytes(getattr(value, field.name)) for field in fields(value))
    return 0
