"""One training run from its configuration: the folder, the data, the processes, then the loop."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowrl.atomic import remove_temporaries, sole_user
from flowrl.data import EpisodeDataset
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import TargetResult
from flowrl.model.agent import Agent
from flowrl.model.loading import load_agent, pick_device
from flowrl.options import checked
from flowrl.process import prepare_process
from flowrl.ranks import Ranks, joined_ranks
from flowrl.signals import StopSignals
from flowrl.training.callbacks import Callback
from flowrl.training.config import FINETUNE_FILE, TrainConfig, dataset_folder, method_name, parse_train_config
from flowrl.training.metrics import METRICS_FILE
from flowrl.training.setup import batch_size, load_dataset
from flowrl.training.trainer import Trainer

_OWN_FILES = ("config.yaml", FINETUNE_FILE, METRICS_FILE, "nonfinite.json", "environment-error.txt")


@dataclass(frozen=True)
class Run:
    """A training that has ended or was stopped by a callback.

    ``train(resume=folder)`` continues it; with data in memory ``train(dataset, resume=folder)``.
    """

    folder: Path
    step: int
    """Updates so far."""
    results: list[TargetResult]
    """The last evaluation, one for each target return; empty if there was none."""

    def load_agent(self) -> Agent:
        """The agent of the last checkpoint."""
        return load_agent(self.folder)


def run_train(arguments: Sequence[str] | None = None) -> Run:
    """The command: train what the arguments (``sys.argv`` by default) describe.

    Raises:
        UserError, NonFiniteLossError: see :func:`train`.
        Stopped: after SIGINT or SIGTERM, once a checkpoint is saved.
    """
    config = parse_train_config(arguments)
    with StopSignals() as signals:
        return run_training(config, signals)


def train(
    dataset: str | Sequence[str] | EpisodeDataset = (),
    *,
    env: str | None = None,
    callbacks: Sequence[Callback] = (),
    progress_bar: bool = True,
    **options: Any,
) -> Run:
    """Train an agent as ``flowrl train`` does, without the command's lines and without handlers of signals.

    Under ``torchrun`` the processes share every batch and every evaluation; see :mod:`flowrl.ranks`.

    Args:
        dataset: as ``--dataset``: "minari:ID", the path of an HDF5 file, or several; or the data itself. Not
            needed beside an ``env`` that names data, such as "hopper-medium".
        env: as ``--env``: data with its preset, such as "hopper-medium", or the Gymnasium environment to
            evaluate in, such as "Hopper-v5".
        callbacks: see :class:`Callback`; one that returns True stops the training.
        progress_bar: whether updates are counted on stderr.
        **options: the other options of ``flowrl train`` by name, which are the fields of TrainConfig, such as
            ``steps=3000``; ``config="paper"`` takes a preset, ``resume="runs/x"`` continues a run, with
            ``dataset`` again if it was data in memory.

    Raises:
        UserError: unusable input, a run folder in use, not empty or damaged, or a callback's OSError.
        NonFiniteLossError: see there; the last checkpoint is from before it.
    """
    episodes = dataset if isinstance(dataset, EpisodeDataset) else None
    sources = (episodes.dataset_id,) if episodes is not None else dataset
    given = {"dataset": sources, "env": env}
    options |= {name: value for name, value in given.items() if value is not None and value != ()}
    options = checked(TrainConfig, options, lambda name: f"train: {name}")
    config = parse_train_config([], options)
    return run_training(config, StopSignals(), episodes, callbacks, lambda line: None, not progress_bar)


def run_training(
    config: TrainConfig,
    signals: StopSignals,
    episodes: EpisodeDataset | None = None,
    callbacks: Sequence[Callback] = (),
    say: Callable[[str], None] = tqdm.write,
    no_bar: bool | None = None,  # None: a bar only on a terminal
) -> Run:
    """Run or continue a training, its options checked; only the first process writes and calls back."""
    prepare_process()
    run_dir = config.resume or config.run_dir or default_run_dir(config)
    _check_run_dir(config, run_dir)
    with signals.interruptible():  # the first use of a dataset may collect or download it
        device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
        dataset = load_dataset(config, episodes)
    with joined_ranks() as ranks, open(os.devnull, "w") as nowhere:
        config = replace(config, batch_size=batch_size(config, dataset))
        if batch_size(config, dataset) < ranks.size:
            raise UserError(f"--batch-size {config.batch_size}: fewer windows than {ranks.size} processes")
        with nullcontext() if ranks.is_first else redirect_stdout(nowhere):
            describe(dataset, say)
            run_dir = ranks.first(run_dir)
            with run_folder(config, run_dir, ranks):
                trainer = Trainer(config, run_dir, dataset, device, signals, ranks, callbacks, say, no_bar)
                results = trainer.run()
                return Run(run_dir, trainer.step, results)


@contextmanager
def run_folder(config: TrainConfig, run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Make the folder and keep other trainings out of it; without files it is removed again."""
    in_use, is_new = f"{run_dir}: another process is training in this folder", not run_dir.exists()
    try:
        if ranks.is_first:
            run_dir.mkdir(parents=True, exist_ok=True)
        with sole_user(run_dir, in_use) if ranks.is_first else nullcontext():
            if ranks.is_first:
                _check_run_dir(config, run_dir)  # again: loading took a while
                remove_temporaries(run_dir, _OWN_FILES)
            try:
                yield
            finally:
                with suppress(OSError):  # Windows keeps a file that is open
                    if is_new and ranks.is_first and [path.name for path in run_dir.iterdir()] == [".lock"]:
                        (run_dir / ".lock").unlink()
                        run_dir.rmdir()
    except BrokenPipeError:  # of the output, not of a file
        raise
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written: {error}") from error


def _check_run_dir(config: TrainConfig, run_dir: Path) -> None:
    """Refuse to start a new run where there is something; a hidden file is what a killed start leaves."""
    if config.resume is not None or not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: a file is there; give a new folder")
    if any(not path.name.startswith(".") for path in run_dir.iterdir()):
        raise UserError(
            f"--run-dir {run_dir}: already there and not empty; continue it with --resume {run_dir}"
        )


def default_run_dir(config: TrainConfig) -> Path:
    """runs/<env or dataset>/<method>-seed<k>-<time>: runs/hopper-medium/flow-fused-episode-seed0-..."""
    folder = dataset_folder(config.env or "+".join(config.dataset))
    name = f"{method_name(asdict(config))}-seed{config.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path("runs") / folder / name


def describe(dataset: EpisodeDataset, say: Callable[[str], None]) -> None:
    """Print which data this is."""
    returns, environment = dataset.episode_returns, dataset.environment
    scores = ""
    if dataset.reference is not None:
        scores = f" (normalised {dataset.reference.normalized_score(float(returns.mean())):.1f})"
    say(
        f"dataset {dataset.dataset_id} sha256 {dataset.sha256[:12]}: {dataset.num_transitions} transitions, "
        f"{dataset.num_episodes} episodes, mean return {returns.mean():.1f}{scores}, "
        f"environment {environment.without_registered_options() if environment else 'unknown'}"
    )
    if dataset.reference is None:
        say("note: there are no reference scores: returns are not normalised")
    for note in dataset.notes:
        say(f"note: {note}")
