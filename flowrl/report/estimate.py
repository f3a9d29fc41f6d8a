"""The command ``flowrl estimate``: a trained agent's return, estimated from data alone."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from flowrl.data import load_episodes
from flowrl.errors import UserError
from flowrl.evaluation.command import options_of
from flowrl.evaluation.evaluate import short_number, standard_error
from flowrl.evaluation.off_policy import ROUNDS, estimate
from flowrl.model.agent import Conditioning
from flowrl.model.checkpoint import CheckpointName
from flowrl.model.loading import load_agent
from flowrl.options import PositiveCount, Seed, Target
from flowrl.training.config import TrainConfig, checked_options


@dataclass(frozen=True)
class EstimateConfig:
    """Estimate the return of a trained agent from data alone, without its environment."""

    run: tyro.conf.Positional[Path]
    """Run folder, pretrained:NAME, or hf:OWNER/NAME."""
    dataset: tuple[str, ...] = ()
    """The data, as in flowrl train; by default the run's. How it is read is in the run's options."""
    env: str | None = None
    """Likewise: the name of the data, such as hopper-medium."""
    target: Target | None = None
    """Target return; by default the run's first."""
    conditioning: Conditioning | None = None
    """return-to-go or target, as in flowrl evaluate."""
    checkpoint: CheckpointName | None = None
    """Step of the checkpoint, or best; by default the last one."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the episodes that is held out from the critics; the return is estimated on it."""
    timesteps: PositiveCount = 50_000
    """Timesteps of data to use at most: a random sample of whole episodes."""
    updates: Annotated[int, Field(ge=2 * ROUNDS)] = 1_000
    """Gradient updates of the critics, half of them for each estimate."""
    seed: Seed = 0
    """Of the sample and the critics."""


def estimate_run(config: EstimateConfig) -> str:
    """Return a table of the estimates of a run.

    Raises:
        UserError: an unusable run, flag or dataset.
    """
    agent = load_agent(config.run, checkpoint=config.checkpoint, conditioning=config.conditioning)
    if agent.model.action_choices:
        raise UserError(f"{config.run}: estimates need continuous actions, this agent's are discrete")
    options = TrainConfig(**checked_options(options_of(config.run), where=str(config.run)))
    sources = config.dataset or (() if config.env else options.dataset)
    env = config.env or options.env
    if not sources and env is None:
        raise UserError(f"{config.run}: names no data; give --dataset or --env")
    # All episodes, also of a run that was trained on the best ones alone.
    data = load_episodes(
        sources or env or "", env if sources else None, options, options.split_at_timeouts, options.memory_map
    )
    target = agent.config.targets[0] if config.target is None else config.target
    estimates = estimate(agent, data, target, config.held_out, config.timesteps, config.updates, config.seed)
    reference = agent.config.reference or data.reference
    lines = [f"{data.dataset_id}, target {target:g}, {len(estimates.data)} episodes held out"]
    for name, returns in asdict(estimates).items():
        mean = float(returns.mean())
        score = f", normalised score {short_number(reference.normalized_score(mean))}" if reference else ""
        error = f" ({short_number(standard_error(returns))})" if len(returns) > 1 else ""
        lines.append(f"{name.replace('_', ' '):12}return {short_number(mean)}{error}{score}")
    lines.append("mean (standard error of the mean) over episodes; estimates can be off by far more")
    return "\n".join(lines)
