"""Where the time of an update and of an evaluation goes: the profiles that explain the ratios."""

import cProfile
import pstats
from pathlib import Path

import torch
from rollouts import evaluate_batch, record_episodes
from tables import Section
from torch.profiler import ProfilerActivity, profile
from workload import Sizes, make_agent, open_trainer, paper_config, training_data

LINES = 14  # of each table: the rest is small
WARM_UP_UPDATES = 12  # until no update takes new memory from the system any more
PROFILED_UPDATES = 3


def measure_profile(sizes: Sizes, repetitions: int) -> Section:
    """Profile both kinds of update and an evaluation, once each: a profile needs no repetitions."""
    section = Section("profile")
    section.profiles["update, windows of 20 timesteps"] = profile_update(sizes, full_episodes=False)
    section.profiles["update, full episodes"] = profile_update(sizes, full_episodes=True)
    section.profiles[f"evaluation, {sizes.episodes} episodes, recurrent"] = profile_evaluation(sizes)
    section.notes.append("Profiling slows things down: read the shares, not the times.")
    return section


def profile_update(sizes: Sizes, *, full_episodes: bool) -> str:
    """Operations of an update by their own time, of the CPU or, where there is one, of the GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    config = paper_config(sizes, full_episodes=full_episodes)
    with open_trainer(config, training_data(sizes, config), device) as trainer:
        for _ in range(WARM_UP_UPDATES):
            trainer.update()
        with profile(activities=activities) as recorded:
            for _ in range(PROFILED_UPDATES):
                trainer.update()
            if device == "cuda":
                torch.cuda.synchronize()
    own_time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    operations = sorted(recorded.key_averages(), key=lambda entry: -getattr(entry, own_time))
    total = sum(getattr(entry, own_time) for entry in operations)
    rows = [
        (entry.key, entry.count / PROFILED_UPDATES, getattr(entry, own_time) / PROFILED_UPDATES / 1e6)
        for entry in operations[:LINES]
    ]
    return _table(rows, total / PROFILED_UPDATES / 1e6)


def profile_evaluation(sizes: Sizes) -> str:
    """Functions of an evaluation by their own time; waiting for threads is the physics."""
    episodes = record_episodes(sizes.episodes, sizes.behavior)
    agent = make_agent(sizes, paper_config(sizes))
    agent.acting = "recurrent"
    recorded = cProfile.Profile()
    recorded.runcall(evaluate_batch, agent, episodes)
    entries = pstats.Stats(recorded).stats  # type: ignore[attr-defined]
    slowest = sorted(entries.items(), key=lambda item: -item[1][2])
    rows = []
    for (file, line, function), (_, calls, own_seconds, _, _) in slowest[:LINES]:
        where = f"{Path(file).name}:{line} " if line else ""
        rows.append((where + function, float(calls), own_seconds))
    return _table(rows, sum(entry[2] for entry in entries.values()))


def _table(rows: list[tuple[str, float, float]], total_seconds: float) -> str:
    lines = [f"{'own time':>12}  {'share':>6}  {'calls':>9}"]
    for name, calls, seconds in rows:
        share = 100 * seconds / total_seconds
        lines.append(f"{1e3 * seconds:>9,.2f} ms  {share:>5.1f}%  {calls:>9,.0f}  {name[:70]}")
    return "\n".join([*lines, f"{1e3 * total_seconds:>9,.2f} ms  100.0%             all"])
