"""Does a training's memory grow? A real one for hours, measured from outside."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import tyro
from tqdm import tqdm

from flowrl.atomic import write_text
from flowrl.errors import UserError, exit_on_user_error
from flowrl.training.metrics import METRICS_FILE

ENDLESS = 1_000_000_000  # updates; the run is stopped by a signal
# Tiny, so that hours hold many evaluations, checkpoints and lines of metrics.
OPTIONS = [
    *("--embed-dim", "32", "--num-layers", "2", "--context-length", "10", "--batch-size", "16"),
    *("--schedule", "constant", "--warmup-steps", "100", "--log-every", "20", "--checkpoint-every", "200"),
    *("--eval-every", "200", "--eval-episodes", "4"),
]


@dataclass(frozen=True)
class SoakConfig:
    """Train and evaluate for hours on tiny settings; report how much the process grew."""

    hours: float = 2.0
    """How long to train."""
    settle_minutes: float = 10.0
    """Minutes at the beginning whose growth does not count; the length of both compared stretches."""
    interval: float = 5.0
    """Seconds between samples."""
    env: str = "hopper-medium"
    """Embedded dataset to train on."""
    output: Path = Path("results/soak.json")
    """Where the figures and all samples go."""


class Sample(NamedTuple):
    """What the process holds at a moment."""

    seconds: float  # since its start
    resident: int  # bytes
    open_files: int
    threads: int


def soak(config: SoakConfig) -> dict[str, float]:
    """Run a training for ``config.hours``, stop it with SIGTERM, and return the figures.

    ``growth`` is the median resident memory of the last ``settle_minutes`` over that of as many minutes
    after the first ``settle_minutes``, minus 1; evaluations and checkpoints lie in both stretches.

    Raises:
        UserError: no /proc to read, too short for two stretches, or a training that ends by itself.
    """
    if not Path("/proc/self/status").exists():
        raise UserError("a soak run reads /proc, which this system lacks")
    settle = config.settle_minutes * 60
    if not config.hours * 3600 >= 3 * settle > 0:
        raise UserError(f"--hours {config.hours}: must last three times --settle-minutes, which is above 0")
    with tempfile.TemporaryDirectory(prefix="flowrl-soak-") as folder:
        run = Path(folder) / "run"
        words = ["--env", config.env, "--dataset", "flowrl", "--steps", str(ENDLESS), "--run-dir", str(run)]
        with (Path(folder) / "output").open("w+", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "flowrl", "train", *words, *OPTIONS], stdout=output, stderr=output
            )
            try:
                samples = _watch(process, config)
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
            finally:
                process.kill()
            if code != 128 + signal.SIGTERM:
                output.seek(0)
                raise UserError(f"the training ended with code {code}: {output.read()[-500:]}")
        lines = [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    early = [sample for sample in samples if settle <= sample.seconds < 2 * settle]
    late = [sample for sample in samples if sample.seconds >= samples[-1].seconds - settle]
    figures = {
        "hours": samples[-1].seconds / 3600,
        "updates": max(line["step"] for line in lines),
        "evaluations": len({line["step"] for line in lines if line["kind"] == "evaluation"}),
        "resident_early_mib": median(sample.resident for sample in early) / 2**20,
        "resident_late_mib": median(sample.resident for sample in late) / 2**20,
        "growth": median(s.resident for s in late) / median(s.resident for s in early) - 1,
        "open_files_growth": late[-1].open_files - early[0].open_files,
        "threads_growth": late[-1].threads - early[0].threads,
    }
    document = {
        "figures": figures,
        "config": asdict(config) | {"output": str(config.output)},
        "samples": samples,
    }
    write_text(config.output, json.dumps(document) + "\n")
    return figures


def _watch(process: subprocess.Popen, config: SoakConfig) -> list[Sample]:
    start, samples = time.monotonic(), []
    with tqdm(total=round(config.hours * 3600), unit="s", desc="soak", disable=None) as progress:
        while (seconds := time.monotonic() - start) < config.hours * 3600 and process.poll() is None:
            samples.append(sample_process(process.pid, seconds))
            progress.update(round(seconds) - progress.n)
            progress.set_postfix(MiB=samples[-1].resident >> 20, refresh=False)
            time.sleep(config.interval)
    return samples


def sample_process(pid: int, seconds: float) -> Sample:
    """Read a living process' resident memory, open files and threads."""
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) * 1024
    return Sample(seconds, resident, len(list((folder / "fd").iterdir())), int(status["Threads"]))


def main() -> None:
    """Parse the command line, run, print the figures; exits with 2 on bad input."""
    config = tyro.cli(SoakConfig, description=__doc__)
    with exit_on_user_error():
        for name, value in soak(config).items():
            print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
