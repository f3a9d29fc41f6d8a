"""Show what a dataset holds, and what training would refuse or change. The same as ``flowrl info``.

Examples: python scripts/info.py hopper-medium
          python scripts/info.py my_file.hdf5 --env Hopper-v4
"""

import sys

from flowrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["info", *sys.argv[1:]]))
