"""How fast agents learn T-Mazes, how far they remember, and what acting and training cost on the way.

``python scripts/benchmark/memory.py --runs runs/memory/tmaze-500/*/seed* --output results/memory`` acts with
the runs of the sweep ``memory`` in corridors far longer than those they were trained on. Results are added to
``OUTPUT/acting.json``, one entry for a run, a length and a clamp, and what the runs' own evaluations found on
the way to ``OUTPUT/learning.json``. From all of them come the picture ``OUTPUT/success.png`` and the tables
that are printed. ``--training-lengths 1000 10000 100000`` measures updates on sequences of these lengths.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from timing import interleaved, peak_memory
from workload import Sizes, open_trainer, paper_config, training_data

from flowrl import Agent, load_agent
from flowrl.atomic import write_text
from flowrl.attention.kinds import SOURCE_CLAMP
from flowrl.data.sources import environment_named
from flowrl.envs.vector import make_vector_env
from flowrl.errors import UserError, exit_on_user_error
from flowrl.model.transformer import ModelConfig
from flowrl.report.table import markdown_table
from flowrl.training.config import TrainConfig
from flowrl.training.metrics import METRICS_FILE

COST_TICKS = (0.5, 1, 2, 5, 10)  # milliseconds


@dataclass(frozen=True)
class MemoryConfig:
    """Act with runs that were trained on a T-Maze in longer ones; without runs, only draw the picture."""

    output: Path
    """Folder of acting.json, learning.json and success.png."""
    runs: tuple[Path, ...] = ()
    """Run folders of a sweep, <dataset>/<method>/seed<k>."""
    lengths: tuple[int, ...] = (500, 1_000, 2_000, 5_000, 20_000, 100_000)
    """Timesteps of the corridors."""
    source_clamps: tuple[float, ...] = (10.0,)
    """Flow-Attention's, for acting; other kinds of attention take the first."""
    episodes: int = 20
    """Episodes in each corridor."""
    seed: int = 1_028
    """Of the first episode's environment; the following ones have the following numbers. Of these 20 episodes
    each cue has a half, so that an agent that ignores it is at 50%."""
    training_lengths: tuple[int, ...] = ()
    """Timesteps of the sequences on which updates are measured, one sequence each, width 64, 2 layers."""


@dataclass(frozen=True)
class Acted:
    """What an agent did in corridors of one length."""

    run: str
    """<dataset>/<method>/seed<k>."""
    length: int
    source_clamp: float
    episodes: int
    success: float
    """Share of the episodes that ended in the right arm."""
    margin: float
    """Mean of the junction's action towards the right arm, -1 to 1."""
    first_ms: float
    """Milliseconds of acting and stepping all episodes once, in the first tenth of the corridor."""
    last_ms: float
    """The same in the last tenth."""
    state_bytes: int
    """Of an episode's memory at the end."""


def act(agent: Agent, length: int, episodes: int, seed: int) -> dict[str, Any]:
    """Run whole episodes at target return 1; return Acted's figures by name."""
    envs = make_vector_env(environment_named(f"tmaze-{length}"), episodes)
    observations, _ = envs.reset(seed=[seed + episode for episode in range(episodes)])  # type: ignore[arg-type]
    cues = observations[:, 0]
    agent.reset(episodes, 1.0)
    rewards, seconds = np.zeros(episodes), np.zeros(length)
    for timestep in range(length):
        started = time.perf_counter()
        actions = agent.act(observations, rewards)
        observations, rewards, *_ = envs.step(actions)
        seconds[timestep] = time.perf_counter() - started
    envs.close()
    tenth = max(length // 10, 1)
    assert agent._state is not None
    tensors = [tensor for layer in agent._state.layers if layer is not None for tensor in layer]
    return {
        "episodes": episodes,
        "success": float(rewards.mean()),
        "margin": float((actions[:, 0] * cues).mean()),
        "first_ms": 1e3 * float(np.median(seconds[:tenth])),
        "last_ms": 1e3 * float(np.median(seconds[-tenth:])),
        "state_bytes": sum(tensor.nbytes for tensor in tensors) // episodes,
    }


@dataclass(frozen=True)
class Learned:
    """How a run learned, by its own evaluations."""

    run: str
    updates_to_95: int | None
    """Of the first evaluation with a success of at least 95%; None: there was none."""
    minutes_to_95: float | None
    """Of training alone, without evaluations."""
    success: float
    """Of the last evaluation."""
    updates: int
    ms_per_update: float


def learned(run: Path) -> Learned:
    """Read a run's metrics."""
    entries = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    evaluations = [entry for entry in entries if entry["kind"] == "evaluation"]
    seconds = float(np.median([1 / e["updates_per_second"] for e in entries if e["kind"] == "train"]))
    updates = next((entry["step"] for entry in evaluations if entry["return_mean"] >= 0.95), None)
    minutes = None if updates is None else updates * seconds / 60
    last = evaluations[-1]
    return Learned(name_of(run), updates, minutes, last["return_mean"], last["step"], 1e3 * seconds)


def name_of(run: Path) -> str:
    """<dataset>/<method>/seed<k>."""
    return "/".join(run.absolute().parts[-3:])


def method_of(entry: Acted | Learned) -> str:
    """The method, and the dataset where it is not the one of most runs."""
    dataset, method, _ = entry.run.split("/")
    return method if dataset == "tmaze-500" else f"{method}, {dataset}"


def learning_table(entries: list[Learned]) -> str:
    """A line for a method: all its seeds."""
    rows = []
    for method in sorted({method_of(entry) for entry in entries}):
        runs = [entry for entry in entries if method_of(entry) == method]
        reached = [entry for entry in runs if entry.updates_to_95 is not None]
        updates = sorted(entry.updates_to_95 for entry in reached if entry.updates_to_95 is not None)
        minutes = sorted(entry.minutes_to_95 for entry in reached if entry.minutes_to_95 is not None)
        rows.append(
            [
                method,
                f"{len(reached)} of {len(runs)}",
                ", ".join(f"{100 * entry.success:.0f}" for entry in sorted(runs, key=lambda e: e.run)),
                ", ".join(map(str, updates)) or "-",
                f"{minutes[0]:.1f} to {minutes[-1]:.1f}" if minutes else "-",
                f"{np.median([entry.ms_per_update for entry in runs]):.0f}",
            ]
        )
    header = (
        "method",
        "seeds at 95%",
        "success of each seed, %",
        "updates to 95%",
        "minutes",
        "ms an update",
    )
    return markdown_table(header, rows)


def acting_table(entries: list[Acted]) -> str:
    """A line for a method, a column for a length: mean success, and its range over the seeds."""
    lengths = sorted({entry.length for entry in entries})
    rows = []
    for method, clamp in sorted({(method_of(entry), entry.source_clamp) for entry in entries}):
        row = [method if clamp == SOURCE_CLAMP else f"{method}, clamp {clamp:g}"]
        for length in lengths:
            some = [
                100 * entry.success
                for entry in entries
                if (method_of(entry), entry.source_clamp, entry.length) == (method, clamp, length)
            ]
            spread = f" ({min(some):.0f} to {max(some):.0f}; {len(some)})" if some else ""
            row.append(f"{np.mean(some):.0f}{spread}" if some else "-")
        rows.append(row)
    return markdown_table(("method", *(f"{length:,}" for length in lengths)), rows)


def measure_training(length: int) -> str:
    """Time and memory of updates on one sequence of this length."""
    sizes = Sizes(num_layers=2, embed_dim=64, episode_batch_size=1, episode_length=length)
    config = paper_config(sizes, full_episodes=True, token_layout="fused")
    memory = peak_memory(update_twice, sizes, config, warm_up=(replace(sizes, episode_length=30), config))
    with open_trainer(config, training_data(sizes, config)) as trainer:
        timing = interleaved({"update": trainer.update}, 3)["update"]
    return (
        f"{length:,} timesteps: {timing.median:.2f} s an update ({timing.low:.2f} to {timing.high:.2f}), "
        f"{1e6 * timing.median / length:.1f} us a timestep, peak memory {memory / 2**20:,.0f} MiB"
    )


def update_twice(sizes: Sizes, config: TrainConfig) -> None:
    """The second time with the optimiser's state: what a process is measured on."""
    with open_trainer(config, training_data(sizes, config)) as trainer:
        for _ in range(2):
            trainer.update()


def draw(acted: list[Acted], path: Path) -> None:
    """Success, mean and range over the seeds, and the fastest seed's time of acting at the end, by length."""
    from matplotlib.figure import Figure  # an extra: only drawing needs it

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    success, cost = figure.subplots(1, 2)
    for method, clamp in sorted({(method_of(entry), entry.source_clamp) for entry in acted}):
        entries = [entry for entry in acted if (method_of(entry), entry.source_clamp) == (method, clamp)]
        lengths = sorted({entry.length for entry in entries})
        by_length = [[entry for entry in entries if entry.length == length] for length in lengths]
        label = method if clamp == SOURCE_CLAMP else f"{method}, acting with source clamp {clamp:g}"
        style = "o-" if clamp == SOURCE_CLAMP else "s--"
        successes = [[100 * entry.success for entry in some] for some in by_length]
        means = [float(np.mean(values)) for values in successes]
        (line,) = success.plot(
            lengths, means, style, label=f"{label}, seeds: {max(map(len, by_length))}", alpha=0.8
        )
        lowest, highest = map(min, successes), map(max, successes)
        success.fill_between(lengths, list(lowest), list(highest), color=line.get_color(), alpha=0.12)
        milliseconds = [min(entry.last_ms for entry in some) for some in by_length]
        cost.plot(lengths, milliseconds, style, color=line.get_color(), alpha=0.8)
    success.axhline(50, color="grey", linewidth=1, linestyle=":")
    success.set(
        xscale="log", xlabel="timesteps between cue and decision", ylabel="success (%)", ylim=(0, 105)
    )
    success.set_title("T-Maze: trained on 500 timesteps, acting in longer ones")
    success.legend(fontsize="small")
    cost.set(xscale="log", yscale="log", xlabel="timestep", ylabel=f"ms for {acted[0].episodes} episodes")
    cost.set_yticks(COST_TICKS, [f"{tick:g}" for tick in COST_TICKS])
    cost.minorticks_off()
    cost.set_title("acting and stepping once, at the end; fastest seed")
    for axes in (success, cost):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(config: MemoryConfig) -> None:
    """Act, save, draw and print.

    Raises:
        UserError: an unusable run, or nothing to draw.
    """
    for length in config.training_lengths:
        print(measure_training(length), flush=True)
    config.output.mkdir(parents=True, exist_ok=True)
    acting, learning = config.output / "acting.json", config.output / "learning.json"
    acted = [Acted(**entry) for entry in _read(acting)]
    known = [Learned(**entry) for entry in _read(learning)]
    for run in config.runs:
        known = [old for old in known if old.run != name_of(run)] + [learned(run)]
        _write(learning, known)
        model = load_agent(run).config.model
        is_flow = isinstance(model, ModelConfig) and model.attention == "flow"
        for clamp in config.source_clamps if is_flow else config.source_clamps[:1]:
            for length in config.lengths:
                agent = load_agent(run, source_clamp=clamp)
                entry = Acted(name_of(run), length, clamp, **act(agent, length, config.episodes, config.seed))
                print(entry, flush=True)
                same = (entry.run, entry.length, entry.source_clamp)
                acted = [old for old in acted if (old.run, old.length, old.source_clamp) != same] + [entry]
                _write(acting, acted)
    if known:
        print(learning_table(known))
    if acted:
        print(acting_table(acted))
        draw(acted, config.output / "success.png")
    elif not known and not config.training_lengths:
        raise UserError(f"{acting}: nothing to draw; give --runs")


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.is_file() else []


def _write(path: Path, entries: Sequence[Acted | Learned]) -> None:
    entries = sorted(entries, key=lambda entry: (entry.run, entry.length if isinstance(entry, Acted) else 0))
    write_text(path, json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(MemoryConfig))
