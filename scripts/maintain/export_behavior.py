"""Ship snapshots of a behaviour training run: float16 weights and an index of what each is worth.

Example: python scripts/export_behavior.py --run-dir runs/behavior/hopper --levels random=0 medium=200000
"""

import tyro

from flowrl.behavior.shipped import BehaviorExport, export_behavior
from flowrl.errors import exit_on_user_error


def main() -> None:
    """Parse the command line, export, and print the ladder with its scores."""
    export = tyro.cli(BehaviorExport, description=__doc__)
    with exit_on_user_error():
        assets = export_behavior(export)
        for asset in assets:
            print(
                f"{asset.env_id} {asset.name}: step {asset.training_steps}, return {asset.return_mean:.1f} "
                f"+- {asset.return_std:.1f}, normalised {asset.normalized_score:.1f}, {asset.dtype}"
            )


if __name__ == "__main__":
    main()
