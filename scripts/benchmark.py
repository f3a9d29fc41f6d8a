"""Measure everything that speed is claimed of, in one run: ``python scripts/benchmark.py``.

Examples:
    python scripts/benchmark.py                                        # everything, about ten minutes
    python scripts/benchmark.py --only attention --repetitions 15
    python scripts/benchmark.py --output results/benchmarks/my-machine
"""

from flowrl.benchmarks.run import parse_benchmark_config, run_benchmarks
from flowrl.errors import exit_on_user_error


def main() -> None:
    """Parse the command line and measure; exits with 2 on bad input."""
    config = parse_benchmark_config()
    with exit_on_user_error():
        run_benchmarks(config)


if __name__ == "__main__":
    main()
