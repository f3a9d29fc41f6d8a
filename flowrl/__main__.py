"""The command line: ``flowrl train``, ``flowrl evaluate`` and so on; ``python -m flowrl`` is the same."""

import io
import os
import sys
from collections.abc import Callable

from flowrl.errors import exit_on_user_error
from flowrl.process import prepare_threads

EXIT_BROKEN_PIPE = 141  # as of a process that SIGPIPE ended

# Each command imports what it needs when it runs: `flowrl report` does not load what only training needs.


def train() -> int:
    """Train an agent, or resume a run."""
    from flowrl.training.config import parse_train_config
    from flowrl.training.run import train as run

    run(parse_train_config())
    return 0


def evaluate() -> int:
    """Evaluate a trained run in its environment."""
    import tyro

    from flowrl.evaluation.command import EvaluateConfig, evaluate_run

    evaluate_run(tyro.cli(EvaluateConfig))
    return 0


def collect() -> int:
    """Collect a dataset with the behaviour policies of the package."""
    import tyro

    from flowrl.data.command import CollectCommand, run_collect

    run_collect(tyro.cli(CollectCommand))
    return 0


def info() -> int:
    """Show what a dataset holds, and what training would refuse or change."""
    import tyro

    from flowrl.data.info import InfoConfig, describe_dataset

    print(describe_dataset(tyro.cli(InfoConfig)))
    return 0


def sweep() -> int:
    """Train many runs: datasets x methods x seeds."""
    from flowrl.sweeps.command import run_sweep

    return run_sweep()


def report() -> int:
    """Write tables and pictures of finished runs."""
    import tyro

    from flowrl.report.command import ReportConfig, write_report

    print(write_report(tyro.cli(ReportConfig)))
    return 0


def compare() -> int:
    """Compare two agents on the same starts."""
    import tyro

    from flowrl.report.compare import CompareConfig
    from flowrl.report.compare import compare as run

    print(run(tyro.cli(CompareConfig)))
    return 0


def export() -> int:
    """Write the recurrent step of an agent as one file for torch or ONNX."""
    import tyro

    from flowrl.sharing.export import ExportConfig, run_export

    run_export(tyro.cli(ExportConfig))
    return 0


def push() -> int:
    """Put an agent on the Hugging Face Hub, with a model card."""
    import tyro

    from flowrl.sharing.push import PushConfig
    from flowrl.sharing.push import push as run

    run(tyro.cli(PushConfig))
    return 0


def pull() -> int:
    """Download an agent from the Hugging Face Hub."""
    import tyro

    from flowrl.sharing.push import PullConfig
    from flowrl.sharing.push import pull as run

    run(tyro.cli(PullConfig))
    return 0


def check() -> int:
    """Show what runs on this machine, and why."""
    import tyro

    from flowrl.check import describe_device

    print(tyro.cli(describe_device))
    return 0


COMMANDS: dict[str, Callable[[], int]] = {
    command.__name__: command
    for command in (train, evaluate, collect, info, sweep, report, compare, export, push, pull, check)
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names, by default of ``sys.argv``; return the exit code.

    Bad input is one line on stderr and code 2. Output that stdout's encoding lacks is replaced, and a reader
    that closes the pipe ends the command without a word.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if name not in COMMANDS:
        lines = [f"  {known:10}{command.__doc__}" for known, command in COMMANDS.items()]
        known_flag = name in ("-h", "--help")
        usage = "\n".join(["usage: flowrl COMMAND [--help] ...", "", *lines])
        print(usage, file=sys.stdout if known_flag else sys.stderr)
        return 0 if known_flag else 2
    sys.argv = [f"flowrl {name}", *arguments[1:]]
    prepare_threads()
    try:
        try:
            with exit_on_user_error():
                return COMMANDS[name]()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
