"""The command line: ``flowrl train``, ``flowrl evaluate`` and so on; ``python -m flowrl`` is the same."""

import sys
from collections.abc import Callable

from flowrl.errors import exit_on_user_error

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

    from flowrl.evaluation.evaluate import EvaluateConfig, evaluate_run

    evaluate_run(tyro.cli(EvaluateConfig))
    return 0


def collect() -> int:
    """Collect a dataset with the behaviour policies of the package."""
    import tyro

    from flowrl.data.command import CollectCommand, run_collect

    run_collect(tyro.cli(CollectCommand))
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


COMMANDS: dict[str, Callable[[], int]] = {
    command.__name__: command for command in (train, evaluate, collect, sweep, report)
}


def main() -> int:
    """Run the command named by the first argument; the exit code is 2 on bad input."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        lines = [f"  {known:10}{command.__doc__}" for known, command in COMMANDS.items()]
        known_flag = name in ("-h", "--help")
        usage = "\n".join(["usage: flowrl COMMAND [--help] ...", "", *lines])
        print(usage, file=sys.stdout if known_flag else sys.stderr)
        return 0 if known_flag else 2
    sys.argv = [f"flowrl {name}", *sys.argv[2:]]
    with exit_on_user_error():
        return COMMANDS[name]()


if __name__ == "__main__":
    sys.exit(main())
