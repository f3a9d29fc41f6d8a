"""Write tables and pictures of finished runs.

Examples:
    python scripts/report.py runs/embedded --output results/embedded
    python scripts/report.py runs/embedded runs/embedded-attention --methods flow-20 softmax-20 linear-20
"""

import tyro

from flowrl.errors import exit_on_user_error
from flowrl.report.command import ReportConfig, write_report


def main() -> None:
    """Parse the command line, write the report and print it; exits with 2 on bad input."""
    config = tyro.cli(ReportConfig, description=__doc__)
    with exit_on_user_error():
        print(write_report(config))


if __name__ == "__main__":
    main()
