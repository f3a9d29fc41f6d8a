"""Collect data with the policies of the package. The same as ``flowrl collect``.

Examples: python scripts/collect.py hopper-medium
          python scripts/collect.py hopper --policies medium expert --steps 50000 --id mine/hopper/mixed-v0
"""

import sys

from flowrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["collect", *sys.argv[1:]]))
