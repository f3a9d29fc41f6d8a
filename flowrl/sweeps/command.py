"""The command line of a sweep."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flowrl.atomic import sole_user
from flowrl.errors import UserError, did_you_mean
from flowrl.model.transformer import MixerName, TokenLayout
from flowrl.signals import StopSignals
from flowrl.sweeps.local import local_slots, run_local
from flowrl.sweeps.plan import PlannedRun, Sweep, plan_runs, product_methods, read_sweep, write_plan
from flowrl.sweeps.process import is_finished, train_arguments
from flowrl.sweeps.ray_cluster import check_ray, run_on_ray
from flowrl.training.config import parse_train_config
from flowrl.training.setup import DEFAULT_BATCH_SIZE

EXIT_FAILED_RUNS = 1


@dataclass(frozen=True)
class SweepConfig:
    """Train every method on every dataset with every seed, one run folder each; run it again to resume.

    Options of `flowrl train` may be given too; they hold for all runs.
    """

    sweep: str | None = None
    """Sweep file to start from: a name in configs/sweeps/, such as embedded, or a YAML file."""
    datasets: tuple[str, ...] = ()
    """Names such as hopper-medium, minari:ID or PATH.hdf5; instead of the file's."""
    methods: tuple[str, ...] = ()
    """Only these methods of the sweep."""
    seeds: tuple[int, ...] = ()
    """Seeds, instead of the file's; by default 0."""
    attention: tuple[MixerName, ...] = ()
    """Without a sweep file: methods are attention x token_layout x context_length; by default flow."""
    token_layout: tuple[TokenLayout, ...] = ()
    """By default interleaved."""
    context_length: tuple[int | Literal["episode"], ...] = ()
    """By default 20."""
    runs_dir: Path | None = None
    """Folder of the runs, <dataset>/<method>/seed<k> each; by default runs/<name of the sweep>."""
    on: Literal["local", "ray"] = "local"
    """local: on this machine's cores or GPUs; ray: on a Ray cluster, run folders on shared storage."""
    address: str | None = None
    """With --on ray: HOST:PORT of the cluster; by default one is started on this machine."""
    jobs: int | None = None
    """Runs at a time on a machine like this one; by default one per GPU, or per core."""
    dry_run: bool = False
    """Print the plan and train nothing."""


def run_sweep(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the sweep; return the exit code, 1 when a run failed.

    Raises:
        UserError: bad input, or another sweep at work in the same folder.
        Stopped: SIGINT or SIGTERM came; all runs have saved a checkpoint.
    """
    config, train_options = tyro.cli(SweepConfig, args=arguments, return_unknown_args=True)
    runs_dir = config.runs_dir or Path("runs") / (Path(config.sweep).stem if config.sweep else "sweep")
    with StopSignals() as signals:
        with signals.interruptible():
            if config.on == "ray":
                check_ray(config.address)
            runs = plan_runs(_sweep_of(config), runs_dir.absolute(), train_options)
            unfinished = [run for run in runs if not is_finished(run)]
            for run in runs:
                parse_train_config(train_arguments(run))  # refuses a folder of a run with other options
            if config.dry_run:
                print(_format_plan(runs, unfinished))
                return 0
            slots = local_slots(config.jobs, runs[0].config.device)
        try:
            runs_dir.mkdir(parents=True, exist_ok=True)
            with sole_user(runs_dir, f"--runs-dir {runs_dir}: another sweep is at work in this folder"):
                write_plan(runs, runs_dir)
                if config.on == "ray":
                    ended = run_on_ray(unfinished, slots, config.address, signals)
                else:
                    ended = run_local(unfinished, slots, signals)
                failures, finished = [], len(runs) - len(unfinished)
                for run, failure in ended:
                    if failure is None:
                        finished += 1
                    else:
                        failures.append(failure)
                    outcome = f"finished {run.name}" if failure is None else f"failed {failure}"
                    print(f"{outcome}; {finished} of {len(runs)} finished", flush=True)
        except BrokenPipeError:  # of the output, not of a file
            raise
        except OSError as error:
            raise UserError(f"--runs-dir {runs_dir}: cannot be written: {error}") from error
    print(f"{finished} of {len(runs)} runs finished in {runs_dir}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return EXIT_FAILED_RUNS if failures else 0


def _sweep_of(config: SweepConfig) -> Sweep:
    if config.address is not None and config.on != "ray":
        raise UserError(f"--address {config.address}: only --on ray has one")
    if config.jobs is not None and config.jobs < 1:
        raise UserError(f"--jobs {config.jobs}: must be at least 1")
    attention, layouts, contexts = config.attention, config.token_layout, config.context_length
    if config.sweep is None:
        layouts, contexts = layouts or ("interleaved",), contexts or (20,)
        sweep = Sweep(methods=product_methods(attention or ("flow",), layouts, contexts))
    elif attention or layouts or contexts:
        raise UserError(f"--sweep {config.sweep} has its own methods: choose of them by --methods")
    else:
        sweep = read_sweep(config.sweep)
    methods = sweep.methods
    for method in config.methods:
        if method not in methods:
            raise UserError(f"--methods {method}: no such method{did_you_mean(method, methods)}")
    return Sweep(
        datasets=config.datasets or sweep.datasets,
        methods={name: methods[name] for name in config.methods or methods},
        seeds=config.seeds or sweep.seeds,
        common=sweep.common,
    )


def _format_plan(runs: list[PlannedRun], unfinished: list[PlannedRun]) -> str:
    """A line per run and a line of totals."""
    lines = []
    for run in runs:
        state = "finished" if run not in unfinished else "started" if run.run_dir.exists() else "new"
        size = f"batch size {run.config.batch_size or DEFAULT_BATCH_SIZE}"
        if run.config.batch_size is None and run.config.timesteps_per_update is not None:
            size = f"about {run.config.timesteps_per_update} timesteps"
        lines.append(f"{run.name}: {state}, {run.config.steps} updates of {size}")
    total = sum(run.config.steps for run in unfinished)
    lines.append(f"{len(runs)} runs, {len(unfinished)} of them to train: at most {total} updates")
    return "\n".join(lines)
