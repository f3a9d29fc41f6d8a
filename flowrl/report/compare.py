"""Two trained agents on the same starts: paired differences with an interval."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from flowrl.envs.failures import failures_kept
from flowrl.envs.options import EvaluationOptions
from flowrl.envs.reference_scores import reference_scores
from flowrl.errors import UserError
from flowrl.evaluation.command import acting_environment
from flowrl.evaluation.evaluate import TargetResult, evaluate, short_number, standard_error
from flowrl.model.loading import load_agent
from flowrl.options import Episodes, Seed, Target
from flowrl.report.statistics import CONFIDENCE, difference_interval
from flowrl.report.table import markdown_table, with_error

FEWEST_EPISODES = 10  # the interval of fewer is far too narrow


@dataclass(frozen=True)
class CompareConfig(EvaluationOptions):
    """Compare two trained agents of one environment, episode by episode from the same starts."""

    first: tyro.conf.Positional[Path]
    """Run folder, pretrained:NAME, or hf:OWNER/NAME."""
    second: tyro.conf.Positional[Path]
    """Another one."""
    episodes: Episodes = 100
    """Episodes of each agent."""
    target: Target | None = None
    """Target return of both; by default each one's own first."""
    seed: Seed = 0
    """Seed of the episodes."""


@failures_kept(Path())
def compare(config: CompareConfig) -> str:
    """Evaluate both and return a table of their means and of the difference.

    Raises:
        UserError: an unusable run or flag, or agents of different environments or numbers of observations.
    """
    if config.episodes < FEWEST_EPISODES:
        raise UserError(f"--episodes {config.episodes}: an interval takes at least {FEWEST_EPISODES}")
    runs = (config.first, config.second)
    agents = [load_agent(run, device="auto") for run in runs]
    environments = [
        acting_environment(agent, run, None, config) for agent, run in zip(agents, runs, strict=True)
    ]
    environment, other = (each.without_registered_options() for each in environments)
    if environment != other:
        raise UserError(
            f"{config.first} and {config.second} act in different environments, {environment} and {other}"
        )
    reference = config.reference() or agents[0].config.reference or reference_scores(environment.env_id)
    results: list[TargetResult] = []
    for agent in agents:
        target = agent.config.targets[0] if config.target is None else config.target
        results += evaluate(agent, environments[0], [target], config.episodes, config.seed, reference)
    unit = "return" if reference is None else "normalised score"
    values = [
        result.returns if result.normalized_scores is None else result.normalized_scores for result in results
    ]
    difference = values[0] - values[1]
    low, high = difference_interval(difference)
    rows = [
        [str(run), f"{result.target_return:g}", with_error(scores.mean(), standard_error(scores))]
        for run, result, scores in zip(runs, results, values, strict=True)
    ]
    verdict = "within the noise" if low <= 0 <= high else "apart from 0"
    interval = f"{CONFIDENCE:.0%} interval {short_number(low)} to {short_number(high)}"
    return (
        f"{markdown_table(['run', 'target return', unit], rows)}\n\n"
        f"{environment}, {config.episodes} episodes from the same starts, mean ± standard error.\n"
        f"First - second: {short_number(difference.mean())}, {interval}: {verdict}.\n"
        "Trainings of other seeds may differ by more."
    )
