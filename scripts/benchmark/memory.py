"""How far agents remember: success in T-Mazes of growing length, and what acting costs on the way.

``python scripts/benchmark/memory.py --runs RUN ... --output results/memory`` acts with trained runs in
corridors far longer than those they were trained on. Results are added to ``OUTPUT/acting.json``, one entry
for a run, a length and a clamp; the picture ``OUTPUT/success.png`` is drawn from all of them.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from flowrl import Agent, load_agent
from flowrl.atomic import write_text
from flowrl.data.sources import environment_named
from flowrl.envs.vector import make_vector_env
from flowrl.errors import UserError, exit_on_user_error
from flowrl.model.transformer import ModelConfig


@dataclass(frozen=True)
class MemoryConfig:
    """Act with runs that were trained on a T-Maze in longer ones; without runs, only draw the picture."""

    output: Path
    """Folder of acting.json and success.png."""
    runs: tuple[Path, ...] = ()
    """Run folders; a sweep's, <dataset>/<method>/seed<k>, are named by their method."""
    lengths: tuple[int, ...] = (500, 1_000, 2_000, 5_000, 20_000, 100_000)
    """Timesteps of the corridors."""
    source_clamps: tuple[float, ...] = (10.0, 20.0)
    """Flow-Attention's, for acting; other kinds of attention take the first."""
    episodes: int = 20
    """Episodes in each corridor."""
    seed: int = 1_000
    """Of the first episode's environment; the following ones have the following numbers."""


@dataclass(frozen=True)
class Acted:
    """What an agent did in corridors of one length."""

    method: str
    run: str
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


def method_of(run: Path) -> str:
    """The method's name in a sweep's folder, else the run's."""
    return run.parent.name if run.name.startswith("seed") else run.name


def draw(acted: list[Acted], path: Path) -> None:
    """Success, and milliseconds of acting at the end, against length: means over each method's runs."""
    from matplotlib.figure import Figure  # an extra: only drawing needs it

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    success, cost = figure.subplots(1, 2)
    for method, clamp in sorted({(entry.method, entry.source_clamp) for entry in acted}):
        entries = [entry for entry in acted if (entry.method, entry.source_clamp) == (method, clamp)]
        lengths = sorted({entry.length for entry in entries})
        by_length = [[entry for entry in entries if entry.length == length] for length in lengths]
        label = method if clamp == 10.0 else f"{method}, acting with source clamp {clamp:g}"
        style = "o-" if clamp == 10.0 else "s--"
        successes = [100 * float(np.mean([entry.success for entry in some])) for some in by_length]
        success.plot(lengths, successes, style, label=label, alpha=0.7)
        cost.plot(
            lengths, [float(np.mean([e.last_ms for e in some])) for some in by_length], style, alpha=0.7
        )
    success.axhline(50, color="grey", linewidth=1, linestyle=":")
    success.set(
        xscale="log", xlabel="timesteps between cue and decision", ylabel="success (%)", ylim=(0, 105)
    )
    success.set_title("T-Maze: trained on 500 timesteps, acting in longer ones")
    success.legend(fontsize="small")
    cost.set(xscale="log", yscale="log", xlabel="timestep", ylabel=f"ms for {acted[0].episodes} episodes")
    cost.set_title("acting and stepping once, at the end")
    for axes in (success, cost):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(config: MemoryConfig) -> None:
    """Act, save and draw.

    Raises:
        UserError: an unusable run, or nothing to draw.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    file = config.output / "acting.json"
    acted = [Acted(**entry) for entry in json.loads(file.read_text())] if file.is_file() else []
    for run in config.runs:
        model = load_agent(run).config.model
        is_flow = isinstance(model, ModelConfig) and model.attention == "flow"
        for clamp in config.source_clamps if is_flow else config.source_clamps[:1]:
            for length in config.lengths:
                agent = load_agent(run, source_clamp=clamp)
                figures = act(agent, length, config.episodes, config.seed)
                entry = Acted(method_of(run), str(run), length, clamp, **figures)
                print(entry, flush=True)
                same = (entry.run, entry.length, entry.source_clamp)
                acted = [old for old in acted if (old.run, old.length, old.source_clamp) != same] + [entry]
                write_text(file, json.dumps([asdict(each) for each in acted], indent=1) + "\n")
    if not acted:
        raise UserError(f"{file}: nothing to draw; give --runs")
    draw(acted, config.output / "success.png")


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(MemoryConfig))
