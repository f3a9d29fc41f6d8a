"""Fine-tune a run online: ``python scripts/finetune.py RUN``. The same as ``flowrl finetune``."""

import sys

from flowrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
