"""Train and evaluate for hours and report the growth of the process: ``python scripts/soak.py --hours 2``."""

import tyro

from flowrl.benchmarks.soak import SoakConfig, soak
from flowrl.errors import exit_on_user_error


def main() -> None:
    """Parse the command line, run, print the figures; exits with 2 on bad input."""
    config = tyro.cli(SoakConfig, description=__doc__)
    with exit_on_user_error():
        for name, value in soak(config).items():
            print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
