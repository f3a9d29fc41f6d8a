"""Put trained agents into the package, in 8 bits, and measure them as they are there.

Example:
    python scripts/maintain/pretrained.py --runs runs/default runs/memory runs/cued-speed
"""

import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from flowrl.atomic import write_text
from flowrl.errors import UserError, exit_on_user_error
from flowrl.evaluation.evaluate import TargetResult, evaluate, standard_error
from flowrl.model.agent import Agent, Conditioning
from flowrl.model.checkpoint import save_agent
from flowrl.model.loading import load_agent
from flowrl.model.pretrained import PREFIX, PRETRAINED_DIR, ROW_SCALE, pretrained_names
from flowrl.report.table import markdown_table


class Choice(NamedTuple):
    """Which run of a dataset is in the package; of the sweeps' three seeds the best, see TEXT."""

    method: str
    seed: int
    conditioning: Conditioning


CHOSEN = {
    "halfcheetah-medium": Choice("flow-episode", 1, "target"),
    "halfcheetah-medium-replay": Choice("flow-episode", 2, "target"),
    "halfcheetah-medium-expert": Choice("flow-episode", 2, "target"),
    "hopper-medium": Choice("guided", 0, "target"),
    "hopper-medium-replay": Choice("flow-episode", 0, "target"),
    "hopper-medium-expert": Choice("flow-episode", 0, "target"),
    "walker2d-medium": Choice("guided", 2, "target"),
    "walker2d-medium-replay": Choice("guided", 1, "target"),
    "walker2d-medium-expert": Choice("flow-episode", 2, "target"),
    "halfcheetah-cued": Choice("flow", 0, "return-to-go"),
    "hopper-cued": Choice("flow", 1, "return-to-go"),
    "walker2d-cued": Choice("flow", 1, "return-to-go"),
    "hopper-hidden": Choice("flow", 2, "return-to-go"),
    "walker2d-hidden": Choice("flow", 0, "return-to-go"),
    "tmaze-500": Choice("flow", 0, "return-to-go"),
}
MEASURED_SEED = 1_000_000  # of no evaluation that agents or settings were chosen by

TEXT = """# Agents of the package

`flowrl.load_agent("pretrained:NAME")`, trained on flowrl's own data (collected by the policies of the
package, not D4RL's) and stored in 8 bits. Each is the best of three training seeds: for the nine sets by
100 episodes at `--conditioning target` and evaluation seed 0, for the cued and hidden robots by the 200
episodes at the end of training; for `tmaze-500` the first seed was taken. Those of `hopper-medium`,
`walker2d-medium` and `walker2d-medium-replay` had value guidance (`--q-weight 0.1`). So each score is that of
one chosen training; what to expect of a training is in `results/default/report.md`, `results/guidance.md`
and `results/memory/report.md` of the repository.

Scores are measured from the files here with an evaluation seed that chose nothing, at the first target:
`flowrl evaluate pretrained:NAME --episodes {episodes} --seed {seed}`. Mean ± standard deviation over
{episodes} episodes, in brackets the standard error of the mean; {versions}.

{table}
"""


@dataclass(frozen=True)
class PretrainedConfig:
    """Put trained agents into the package, in 8 bits, and measure them as they are there."""

    runs: tuple[Path, ...] = ()
    """Folders of sweeps, RUNS/<dataset>/<method>/seed<k>; without any the agents there are measured."""
    episodes: int = 100
    """Episodes of each agent."""


def quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store each matrix as integers from -127 to 127, and one float32 per row that they are multiples of."""
    stored = dict(tensors)
    for name, matrix in tensors.items():
        if matrix.ndim == 2:
            scale = (matrix.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
            stored[name] = (matrix / scale).round().to(torch.int8)
            stored[name + ROW_SCALE] = scale
    return stored


def make_agent(name: str, choice: Choice, runs: tuple[Path, ...]) -> None:
    """Write the agent of the first folder in ``runs`` that has its run.

    Raises:
        UserError: none has it.
    """
    path = Path(name, choice.method, f"seed{choice.seed}")
    run = next((folder / path for folder in runs if (folder / path).is_dir()), None)
    if run is None:
        raise UserError(f"--runs {' '.join(map(str, runs))}: {path} is in none of them")
    agent = load_agent(run)
    config = replace(agent.config, conditioning=choice.conditioning)
    shutil.rmtree(PRETRAINED_DIR / name, ignore_errors=True)
    tensors = quantized({key: value.contiguous() for key, value in agent.model.state_dict().items()})
    save_agent(PRETRAINED_DIR / name, agent.checkpoint_step or 0, config.to_dict(), tensors)


def measure_agents(episodes: int) -> str:
    """Evaluate every agent of the package at its first target; write and return the table."""
    rows = []
    for name in pretrained_names():
        agent = load_agent(f"{PREFIX}{name}")
        assert agent.environment is not None
        targets, reference = agent.config.targets[:1], agent.config.reference
        (result,) = evaluate(agent, agent.environment, targets, episodes, MEASURED_SEED, reference)
        rows.append(table_row(name, agent, result))
        print(" | ".join(rows[-1]))
    header = ("name", "data", "environment", "training seed", "target", "return", "normalised score")
    packages = ", ".join(f"{package} {version(package)}" for package in ("gymnasium", "mujoco", "torch"))
    return TEXT.format(
        episodes=episodes, seed=MEASURED_SEED, versions=packages, table=markdown_table(header, rows)
    )


def table_row(name: str, agent: Agent, result: TargetResult) -> tuple[str, ...]:
    """One agent's line of the table."""
    assert agent.environment is not None
    assert result.normalized_scores is not None
    scores = result.normalized_scores
    return (
        f"`{name}`",
        f"`{agent.config.dataset_id}`",
        f"`{agent.environment.env_id}`",
        str(CHOSEN[name].seed),
        f"{result.target_return:.0f}",
        f"{result.returns.mean():.1f} ± {result.returns.std(ddof=1):.1f}",
        f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f} ({standard_error(scores):.1f})",
    )


def main() -> None:
    """Parse the command line, make the agents, measure those of the package."""
    config = tyro.cli(PretrainedConfig, description=__doc__)
    with exit_on_user_error():
        for name, choice in CHOSEN.items() if config.runs else ():
            make_agent(name, choice, config.runs)
        write_text(PRETRAINED_DIR / "scores.md", measure_agents(config.episodes))


if __name__ == "__main__":
    main()
