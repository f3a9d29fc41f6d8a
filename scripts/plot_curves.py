"""Draw learning curves: ``python scripts/plot_curves.py RUN [RUN ...] --output curves.png``."""

import tyro

from flowrl.errors import exit_on_user_error
from flowrl.training.curves import CurvesConfig, draw_curves

if __name__ == "__main__":
    with exit_on_user_error():
        draw_curves(tyro.cli(CurvesConfig))
