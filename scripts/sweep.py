"""Train many runs: datasets x methods x seeds; run it again to resume it. The same as ``flowrl sweep``.

Examples:
    python scripts/sweep.py --sweep embedded --dry-run
    python scripts/sweep.py --sweep embedded --seeds 0 --jobs 2
    python scripts/sweep.py --datasets hopper-medium --attention flow softmax --seeds 0 1 --steps 2000
"""

import sys

from flowrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
