"""Draw learning curves: ``python scripts/plot_curves.py RUN [RUN ...] --output curves.png``."""

import tyro

from flowrl.errors import exit_on_user_error
from flowrl.report.plots import CurvesConfig, draw_curves

if __name__ == "__main__":
    with exit_on_user_error():
        config = tyro.cli(CurvesConfig)
        draw_curves(config)
        print(f"curves in {config.output}")
