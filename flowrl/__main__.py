"""The command line: ``flowrl train``, ``flowrl evaluate`` and so on; ``python -m flowrl`` is the same."""

import io
import os
import sys
from dataclasses import asdict
from importlib import import_module
from typing import Any, NamedTuple

from flowrl.errors import did_you_mean, exit_on_user_error
from flowrl.process import prepare_threads
from flowrl.signals import StopSignals, ended_by_interrupts

EXIT_BROKEN_PIPE = 141  # as of a process that SIGPIPE ended


class Command(NamedTuple):
    """What a command does, imported when it runs: `flowrl report` does not load what only training needs."""

    description: str
    module: str
    function: str
    options: str = ""
    """The dataclass of its options, the function's argument; without one the function parses them itself."""

    def run(self) -> int:
        """Run it with the options in ``sys.argv`` and print what it returns; the result is the exit code."""
        import tyro

        module = import_module(f"flowrl.{self.module}")
        if self.options:
            result = self.call(tyro.cli(getattr(module, self.options)))
        else:
            result = getattr(module, self.function)()
        if isinstance(result, str):
            print(result)
        return result if isinstance(result, int) else 0

    def call(self, config: Any) -> object:
        """Run it with these options, interrupted at once by SIGINT and SIGTERM.

        Raises:
            UserError: bad input.
            Stopped: a signal came; no file is left half-written.
        """
        from flowrl.options import checked, flag

        with StopSignals() as signals, signals.interruptible():
            checked(type(config), asdict(config), flag)
            return getattr(import_module(f"flowrl.{self.module}"), self.function)(config)


COMMANDS = {
    "train": Command("Train an agent, or resume a run.", "training.run", "run_train"),
    "finetune": Command(
        "Fine-tune a trained run online, in its environment.", "finetuning.command", "run_finetune"
    ),
    "evaluate": Command(
        "Evaluate a trained run in its environment.", "evaluation.command", "evaluate_run", "EvaluateConfig"
    ),
    "estimate": Command(
        "Estimate an agent's return from data alone.",
        "report.estimate", "estimate_run", "EstimateConfig",
    ),
    "collect": Command(
        "Collect a dataset with the behaviour policies of the package.",
        "data.command", "run_collect", "CollectCommand",
    ),
    "info": Command(
        "Show what a dataset holds, and what training would refuse or change.",
        "data.info", "describe_dataset", "InfoConfig",
    ),
    "sweep": Command("Train many runs: datasets x methods x seeds.", "sweeps.command", "run_sweep"),
    "report": Command(
        "Write tables and pictures of finished runs.", "report.command", "write_report", "ReportConfig"
    ),
    "compare": Command(
        "Compare two agents on the same starts.", "report.compare", "compare", "CompareConfig"
    ),
    "export": Command(
        "Write the recurrent step of an agent as one file for torch or ONNX.",
        "sharing.export", "run_export", "ExportConfig",
    ),
    "push": Command(
        "Put an agent on the Hugging Face Hub, with a model card.", "sharing.push", "push", "PushConfig"
    ),
    "pull": Command("Download an agent from the Hugging Face Hub.", "sharing.push", "pull", "PullConfig"),
    "check": Command("Show what runs on this machine, and why.", "check", "run_check"),
}  # fmt: skip


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
        lines = [f"  {known:10}{command.description}" for known, command in COMMANDS.items()]
        known_flag = name in ("-h", "--help")
        unknown = [] if known_flag else [f"error: unknown command '{name}'{did_you_mean(name, COMMANDS)}"]
        usage = "\n".join(["usage: flowrl COMMAND [--help] ...", "", *lines, *unknown])
        print(usage, file=sys.stdout if known_flag else sys.stderr)
        return 0 if known_flag else 2
    sys.argv = [f"flowrl {name}", *arguments[1:]]
    prepare_threads()
    if "" not in sys.path:
        sys.path.append("")  # the current folder, for modules of the user's own environments
    try:
        try:
            with ended_by_interrupts(), exit_on_user_error():
                return COMMANDS[name].run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
