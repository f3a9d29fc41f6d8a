"""One training run from its configuration: the folder, the data, the processes, then the loop."""

import os
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch

from flowrl.atomic import remove_temporaries, sole_user
from flowrl.data import EpisodeDataset
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import TargetResult
from flowrl.model.loading import pick_device
from flowrl.process import prepare_process
from flowrl.ranks import Ranks, joined_ranks
from flowrl.signals import StopSignals
from flowrl.training.config import TrainConfig, check_values, dataset_folder, method_name, parse_train_config
from flowrl.training.setup import batch_size, load_dataset
from flowrl.training.trainer import Trainer


def run_train() -> None:
    """The command: train what ``sys.argv`` describes."""
    train(parse_train_config())


def train(config: TrainConfig) -> list[TargetResult]:
    """Run or continue the training that ``config`` describes; return the last evaluation.

    Under ``torchrun`` its processes share every batch and every evaluation; see :mod:`flowrl.ranks`.

    Raises:
        UserError: unusable input, or a run folder that is in use, not empty, or damaged.
        NonFiniteLossError: see there; the last checkpoint is from before it.
        Stopped: after SIGINT or SIGTERM, once a checkpoint is saved.
    """
    check_values(config)
    prepare_process()
    run_dir = config.resume or config.run_dir or default_run_dir(config)
    _check_run_dir(config, run_dir)
    with StopSignals() as signals:
        with signals.interruptible():  # the first use of a dataset may collect or download it
            device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
            dataset = load_dataset(config)
        with joined_ranks() as ranks, open(os.devnull, "w") as nowhere:
            config = replace(config, batch_size=batch_size(config, dataset))
            if batch_size(config, dataset) < ranks.size:
                raise UserError(
                    f"--batch-size {config.batch_size}: fewer windows than {ranks.size} processes"
                )
            with redirect_stdout(sys.stdout if ranks.is_first else nowhere):
                describe(dataset)
                return _train(config, ranks.first(run_dir), dataset, device, signals, ranks)


def _train(
    config: TrainConfig,
    run_dir: Path,
    dataset: EpisodeDataset,
    device: torch.device,
    signals: StopSignals,
    ranks: Ranks,
) -> list[TargetResult]:
    """Only the first process writes files."""
    in_use = f"{run_dir}: another process is training in this folder"
    try:
        if ranks.is_first:
            run_dir.mkdir(parents=True, exist_ok=True)
        with sole_user(run_dir, in_use) if ranks.is_first else nullcontext():
            if ranks.is_first:
                _check_run_dir(config, run_dir)  # again: loading took a while
                remove_temporaries(run_dir)
            trainer = Trainer(config, run_dir, dataset, device, signals, ranks)
            try:
                return trainer.run()
            finally:
                trainer.close()
    except BrokenPipeError:  # of the output, not of a file
        raise
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written: {error}") from error


def _check_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Refuse to start a new run where there is something; a hidden file is what a killed start leaves."""
    if config.resume is not None or not run_dir.exists():
        return
    if not run_dir.is_dir() or any(not path.name.startswith(".") for path in run_dir.iterdir()):
        raise UserError(
            f"--run-dir {run_dir}: already there and not empty; continue it with --resume {run_dir}"
        )


def default_run_dir(config: TrainConfig) -> Path:
    """runs/<dataset>/<method>-seed<k>-<time>, such as runs/hopper-medium/flow-interleaved-20-seed0-..."""
    folder = dataset_folder(config.env or "+".join(config.dataset))
    name = f"{method_name(asdict(config))}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path("runs") / folder / name


def describe(dataset: EpisodeDataset) -> None:
    """Say which data this is."""
    returns = dataset.episode_returns
    scores = ""
    if dataset.reference is not None:
        scores = f" (normalised {dataset.reference.normalized_score(float(returns.mean())):.1f})"
    print(
        f"dataset {dataset.dataset_id} sha256 {dataset.sha256[:12]}: {dataset.num_transitions} transitions, "
        f"{dataset.num_episodes} episodes, mean return {returns.mean():.1f}{scores}, "
        f"environment {dataset.environment.env_id if dataset.environment else 'unknown'}"
    )
    for note in dataset.notes:
        print(f"note: {note}")
