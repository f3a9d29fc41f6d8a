"""Collect data with the policies that flowrl ships: an embedded dataset by name, or a mixture of one's own.

Examples: python scripts/collect.py hopper-medium
          python scripts/collect.py hopper --policies medium expert --steps 50000 --id mine/hopper/mixed-v0
"""

import sys

import tyro

from flowrl.data.command import CollectCommand, run_collect
from flowrl.errors import exit_on_user_error


def main() -> int:
    """Parse the command line and collect; the exit code is 130 or 143 when a signal ended it."""
    command = tyro.cli(CollectCommand, description=__doc__)
    with exit_on_user_error():
        run_collect(command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
