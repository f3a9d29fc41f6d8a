"""Write tables and pictures of finished runs. The same as ``flowrl report``.

Examples:
    python scripts/report.py runs/embedded --output results/embedded
    python scripts/report.py runs/embedded runs/embedded-attention --methods flow-20 softmax-20 linear-20
"""

import sys

from flowrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
