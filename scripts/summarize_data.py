"""Write the table and the return histograms of the embedded datasets, collecting those that are missing.

Example: python scripts/summarize_data.py --results-dir results
"""

import tyro

from flowrl.data.summary import DataSummary, summarize_data
from flowrl.errors import exit_on_user_error


def main() -> None:
    """Parse the command line, write the results and print the table."""
    summary = tyro.cli(DataSummary, description=__doc__)
    with exit_on_user_error():
        print(summarize_data(summary))


if __name__ == "__main__":
    main()
