"""Train many runs: datasets x methods x seeds; run it again to go on after a stop.

Examples:
    python scripts/sweep.py --sweep embedded --dry-run
    python scripts/sweep.py --sweep embedded --seeds 0 --jobs 2
    python scripts/sweep.py --datasets hopper-medium --attention flow softmax --seeds 0 1 --steps 2000
"""

import sys

from flowrl.errors import exit_on_user_error
from flowrl.sweeps.command import run_sweep


def main() -> int:
    """Run the sweep; the exit code is 1 when a run failed, 130 or 143 when a signal ended it."""
    with exit_on_user_error():
        return run_sweep()


if __name__ == "__main__":
    sys.exit(main())
