"""Show what runs on this machine, and why. The same as ``flowrl check``."""

import sys

from flowrl.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
