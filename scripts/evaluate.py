"""Evaluate a trained run: returns and normalised scores per target return, optionally a video.

Examples:
    python scripts/evaluate.py runs/hopper-medium/flow-seed0-20260101-120000
    python scripts/evaluate.py RUN --targets 3600 1800 --episodes 100 --json results.json
    python scripts/evaluate.py RUN --acting window --video hopper.mp4
"""

import tyro

from flowrl.errors import exit_on_user_error
from flowrl.evaluation.evaluate import EvaluateConfig, evaluate_run


def main() -> None:
    """Parse the command line and evaluate; exits with 2 on bad input, 130 or 143 when a signal came."""
    config = tyro.cli(EvaluateConfig)
    with exit_on_user_error():
        evaluate_run(config)


if __name__ == "__main__":
    main()
