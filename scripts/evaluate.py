"""Evaluate a trained run: returns and normalised scores per target return. The same as ``flowrl evaluate``.

Examples:
    python scripts/evaluate.py runs/hopper-medium/flow-fused-episode-seed0-20260101-120000
    python scripts/evaluate.py RUN --targets 3600 1800 --episodes 100 --json results.json
    python scripts/evaluate.py RUN --acting window --video hopper.mp4
"""

import sys

from flowrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
