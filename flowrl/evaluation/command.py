"""The command line of an evaluation: load a run, evaluate it, write a table, a JSON file and a video."""

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from flowrl.atomic import write_text
from flowrl.data.sources import environment_named
from flowrl.envs.failures import failures_kept
from flowrl.envs.options import EvaluationOptions
from flowrl.envs.reference_scores import ReferenceScores, reference_scores
from flowrl.envs.spaces import check_environment
from flowrl.envs.specs import EnvironmentSpec, recorded_or_named
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import evaluate, format_table
from flowrl.evaluation.video import check_rendering, check_video, write_video
from flowrl.model.agent import Acting, Agent, Conditioning
from flowrl.model.checkpoint import BEST, CHECKPOINTS, CheckpointName
from flowrl.model.loading import load_agent
from flowrl.options import Episodes, NotNegative, Seed, SourceClamp, Target
from flowrl.plain_yaml import read_yaml_mapping


@dataclass(frozen=True)
class EvaluateConfig(EvaluationOptions):
    """Evaluate a trained run in its environment: returns and normalised scores for each target return."""

    run: tyro.conf.Positional[Path]
    """Run folder that training wrote, pretrained:NAME, or hf:OWNER/NAME."""
    episodes: Episodes = 20
    """Episodes per target return."""
    env: str | None = None
    """Environment to evaluate in, by default the run's own: such as tmaze-20000, forty times as long as the
    tmaze-500 that a run was trained on."""
    targets: tuple[Target, ...] | Literal["sweep"] = ()
    """Target returns; by default those of the run's configuration. sweep: a curve of achieved over target
    returns, from the reference score 0 (or the smallest of the run's targets) to a quarter of this
    range beyond the run's largest target."""
    acting: Acting | None = None
    """recurrent: constant cost per timestep over the whole episode so far; window: recompute the last
    context_length steps. By default the way that the run was trained for."""
    conditioning: Conditioning | None = None
    """return-to-go: on the target less what was earned; target: on the target itself at every timestep. By
    default as the run was configured."""
    source_clamp: SourceClamp | None = None
    """Flow-Attention's, in place of the run's own: 20 where episodes are of more than 20,000 timesteps."""
    temperature: NotNegative = 0.0
    """Discrete actions are drawn from the distribution of the logits divided by this; 0: the likeliest."""
    checkpoint: CheckpointName | None = None
    """Step of the checkpoint to evaluate, or best: the one that --keep-best kept; by default the last one."""
    seed: Seed = 0
    """Seed of the episodes, the same for every target. Training's own evaluations have the one that is in
    their lines of metrics.jsonl."""
    device: str = "auto"
    """Where the agent runs: auto, cpu, cuda, cuda:1, ..."""
    video: Path | None = None
    """Also render one episode per target, side by side, into this .mp4 file."""
    json: Path | None = None
    """Also write the results, every episode included, to this JSON file."""


def evaluate_run(config: EvaluateConfig) -> None:
    """Load, evaluate, print the table, write the files.

    The JSON file holds ``config`` (the options of the run), ``environment``, ``dataset_id``,
    ``dataset_sha256``, ``acting``, ``conditioning``, ``checkpoint_step``, ``chosen_by``
    (:class:`AgentConfig`), ``seed``, ``temperature``, ``versions``, and in ``targets`` what
    :meth:`flowrl.evaluation.evaluate.TargetResult.to_dict` gives for each target.
    ``flowrl report`` reads it as ``evaluation.json`` in the run folder.

    Raises:
        UserError: the run, a flag or the environment is unusable.
    """
    if config.json is not None:
        _check_writable("--json", config.json)
    if config.video is not None:
        _check_writable("--video", config.video)
        check_video(config.video)
    agent = load_agent(
        config.run,
        checkpoint=config.checkpoint,
        acting=config.acting,
        conditioning=config.conditioning,
        device=config.device,
        source_clamp=config.source_clamp,
        temperature=config.temperature,
    )
    torch.manual_seed(config.seed)  # of actions that are drawn
    environment = acting_environment(agent, config.run, config.env, config)
    reference = config.reference() or agent.config.reference or reference_scores(environment.env_id)
    if config.targets == "sweep":
        targets = _swept_targets(agent.config.targets, reference)
    else:
        targets = config.targets or agent.config.targets
    print(
        f"environment {environment.without_registered_options()}, dataset {agent.config.dataset_id} "
        f"sha256 {agent.config.dataset_sha256[:12]}, acting {agent.acting}, conditioned on the "
        f"{agent.conditioning}, checkpoint {agent.checkpoint_step}, seed {config.seed}"
    )
    if agent.config.chosen_by:
        print(f"this checkpoint was chosen by {agent.config.chosen_by}")
    folder = config.run if config.run.is_dir() else Path()
    with failures_kept(folder):
        if config.video is not None:
            check_rendering(environment)
        results = evaluate(agent, environment, targets, config.episodes, config.seed, reference)
    print(format_table(results))
    if config.targets == "sweep":
        best = max(results, key=lambda result: result.returns.mean())
        print(f"highest mean return at target {best.target_return:g}: chosen with hindsight, optimistic")
    if config.json is not None:
        options = options_of(config.run)
        if options and config.source_clamp is not None:
            options["source_clamp"] = config.source_clamp
        document = {
            "config": options,
            "environment": asdict(environment),
            "dataset_id": agent.config.dataset_id,
            "dataset_sha256": agent.config.dataset_sha256,
            "acting": agent.acting,
            "conditioning": agent.conditioning,
            "checkpoint_step": agent.checkpoint_step,
            "chosen_by": agent.config.chosen_by,
            "seed": config.seed,
            "temperature": config.temperature,
            "versions": {name: version(name) for name in ("flowrl", "torch", "gymnasium", "mujoco")},
            "targets": [result.to_dict() for result in results],
        }
        try:
            write_text(config.json, json.dumps(document, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"--json {config.json}: cannot be written: {error.strerror}") from error
        print(f"results in {config.json}")
    if config.video is not None:
        with failures_kept(folder):
            write_video(config.video, agent, environment, [r.target_return for r in results], config.seed)
        print(f"video in {config.video}")


def acting_environment(
    agent: Agent, run: Path, env: str | None, options: EvaluationOptions
) -> EnvironmentSpec:
    """Return what an agent acts in: what ``env`` names or its own environment, with these options over it.

    What the run recorded of its environment holds where ``env`` names it by its id alone.

    Raises:
        UserError: there is none, it has no time limit, or it does not fit the agent.
    """
    named = None if env is None else environment_named(env, options.env_import)
    environment = recorded_or_named(agent.environment, named)
    if environment is None:
        raise UserError(f"{run}: its dataset names no environment; give one with --env")
    environment = options.apply(environment)
    if environment.imports:
        print(f"importing {', '.join(environment.imports)} for {environment.env_id}")
    model = agent.config.model
    facts = check_environment(environment, model.observation_dim, model.action_dim, model.action_choices)
    if facts.max_episode_steps is None:
        raise UserError(f"environment {environment.env_id} has no time limit: give --max-episode-steps")
    return environment


def _swept_targets(targets: tuple[float, ...], reference: ReferenceScores | None) -> tuple[float, ...]:
    """Eleven target returns between the lowest that makes sense and more than the data reaches."""
    low = min(targets) if reference is None else min(reference.minimum, min(targets))
    high = max(targets)
    return tuple(np.linspace(low, high + (high - low) / 4, 11).round(6).tolist())


def options_of(run: Path) -> dict[str, Any]:
    """The options of a run, from its folder or that of one of its checkpoints; none without it."""
    folders = [run.absolute()]
    if run.absolute().parent.name == CHECKPOINTS:
        folders.append(run.absolute().parent.parent)
    if folders[-1].name == BEST:
        folders.append(folders[-1].parent)
    path = next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)
    return {} if path is None else read_yaml_mapping(path)


def _check_writable(name: str, path: Path) -> None:
    """Refuse, before hours of work, a file that could not be written after them."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{name} {path}: cannot be written there; give a file name in a writable folder")
