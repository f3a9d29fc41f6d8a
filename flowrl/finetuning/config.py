"""The options of a fine-tuning, and those of its training that follow from them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BeforeValidator

from flowrl.envs.options import EvaluationOptions
from flowrl.errors import UserError
from flowrl.model.agent import Conditioning
from flowrl.model.checkpoint import CheckpointName
from flowrl.options import (
    Count,
    Episodes,
    NotNegative,
    Positive,
    PositiveCount,
    Seed,
    Size,
    Target,
    checked,
    flag,
)
from flowrl.plain_yaml import read_yaml_mapping
from flowrl.training.config import (
    FINETUNE_FILE,
    FilePath,
    TrainConfig,
    check_resumable,
    check_values,
    read_options,
    refuse_run_dir,
    several,
)


@dataclass(frozen=True)
class FinetuneConfig(EvaluationOptions):
    """Fine-tune a trained run online: rounds of episodes collected in its environment, and of updates."""

    run: tyro.conf.Positional[FilePath | None] = None
    """Run folder that training wrote."""
    checkpoint: CheckpointName | None = None
    """Step of the checkpoint to start from, or best; by default the last one."""
    env: str | None = None
    """Environment to act in, by default the run's own."""
    dataset: Annotated[tuple[str, ...], BeforeValidator(several)] = ()
    """Where the run's data is now, if it was moved."""
    run_dir: FilePath | None = None
    """Folder of the fine-tuning; by default RUN-online-seed<k>."""
    resume: FilePath | None = None
    """Folder of a fine-tuning to continue from its last checkpoint, exactly; other flags may only change how
    long, where and how often to evaluate, log and save."""

    steps: PositiveCount = 2_000
    """Gradient updates."""
    updates_per_round: PositiveCount = 100
    """Updates after each round of collecting."""
    episodes_per_round: Size = 10
    """Episodes that are collected side by side in a round."""
    replay_timesteps: PositiveCount = 100_000
    """Timesteps in the replay, which holds whole episodes: those of highest return of the run's data and of
    what was collected."""
    noise: NotNegative = 0.05
    """Standard deviation of the exploration's normal noise on continuous actions, whose bounds count as -1
    and 1. Discrete actions are drawn from their distribution."""
    target: Target | None = None
    """Target return while collecting; by default the highest in the replay."""
    conditioning: Conditioning | None = None
    """return-to-go or target, see flowrl train; by default as the run was configured."""
    learning_rate: Positive = 1e-4
    """AdamW's learning rate, which is constant."""
    batch_size: Size | None = None
    """Windows per update; by default the run's."""
    seed: Seed = 0
    """Seed of episodes, exploration, batches and dropout."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""

    targets: tuple[Target, ...] = ()
    """Target returns to evaluate at; by default the run's."""
    eval_every: Count = 500
    """Updates between evaluations, the first of which is before any update; 0 evaluates after the last one
    alone."""
    eval_episodes: Episodes = 20
    """Episodes per target return; 0: no evaluation."""
    eval_seed: Seed | None = None
    """Seed of evaluation episodes; by default one drawn from --seed."""
    log_every: PositiveCount = 50
    """Updates between lines of metrics."""
    checkpoint_every: PositiveCount = 500
    """Updates between checkpoints, which hold the replay."""
    keep_checkpoints: PositiveCount = 2
    """Newest checkpoints to keep."""
    keep_best: Literal["normalized_score_mean", "return_mean", "success_rate"] | None = None
    """As in training: also keep the checkpoint of the best evaluation, labelled so."""


# Options of training that a fine-tuning has too; --env and --dataset of a run name its data.
_SHARED = {field.name for field in fields(FinetuneConfig)} & {field.name for field in fields(TrainConfig)}
_SHARED -= {"env", "dataset", "run_dir", "resume"}


def parse_finetune_config(arguments: Sequence[str] | None = None) -> FinetuneConfig:
    """Parse the command line (``sys.argv`` by default), with the resumed fine-tuning underneath.

    Raises:
        UserError: an unusable value, or a folder that holds no fine-tuning.
    """
    config = tyro.cli(FinetuneConfig, args=arguments)
    resume = config.resume
    if (config.run is None) == (resume is None):
        raise UserError("give a run folder to start from, or --resume and the folder of a fine-tuning")
    refuse_run_dir(resume, config.run_dir)
    if resume is not None:
        path = resume / FINETUNE_FILE
        if not path.is_file():
            raise UserError(f"--resume {resume}: not the folder of a fine-tuning, it has no {FINETUNE_FILE}")
        saved = checked(FinetuneConfig, read_yaml_mapping(path), lambda name: f"{path}: '{name}'")
        before = FinetuneConfig(**saved)
        config = tyro.cli(FinetuneConfig, args=arguments, default=before)
        check_resumable(before, config, resume)
        if config.conditioning != before.conditioning:  # which collecting depends on
            raise UserError(f"--conditioning {config.conditioning}: --resume cannot change it")
    checked(FinetuneConfig, asdict(config), flag)
    return config


def trained_with(run: Path) -> TrainConfig:
    """The options that a run was trained with; a UserError where the folder is not that of a run."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run folder, it has no config.yaml")
    return TrainConfig(**read_options(path))


def training_of(config: FinetuneConfig, run: Path) -> TrainConfig:
    """The training that fine-tuning is: the options of ``run``, and over them those given here.

    Raises:
        UserError: not a run folder, or one of behaviour cloning.
    """
    below = trained_with(run)
    if below.agent == "bc":
        raise UserError(f"{run}: behaviour cloning aims at no return, so that there is nothing to fine-tune")
    given = {name: getattr(config, name) for name in sorted(_SHARED)}
    given = {name: value for name, value in given.items() if value not in (None, ())}
    given |= {"eval_seed": config.eval_seed, "keep_best": config.keep_best}  # not those of the run
    if config.dataset:
        given["dataset"] = config.dataset
    fixed = {"schedule": "constant", "warmup_steps": 0, "validation_fraction": 0.0, "q_weight": 0.0}
    training = replace(below, **{**given, **fixed}, resume=config.resume)
    check_values(training)
    return training
