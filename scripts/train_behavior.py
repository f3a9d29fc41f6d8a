"""Train a behaviour policy with soft actor-critic, keeping snapshots from random to expert.

Example: python scripts/train_behavior.py --env Hopper-v5 --steps 1000000 --run-dir runs/behavior/hopper
"""

import sys

import tyro

from flowrl.behavior.train import BehaviorTraining, train_behavior
from flowrl.errors import exit_on_user_error


def main() -> int:
    """Parse the command line and train; the exit code is 130 or 143 when a signal ended the run."""
    training = tyro.cli(BehaviorTraining, description=__doc__)
    with exit_on_user_error():
        return train_behavior(training)


if __name__ == "__main__":
    sys.exit(main())
