"""Train an agent: ``python scripts/train.py --env hopper-medium``. The same as ``flowrl train``."""

import sys

from flowrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
