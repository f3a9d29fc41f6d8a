"""Functions of one's own that a training calls: to draw, to track, to stop early."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowrl.evaluation.evaluate import TargetResult
from flowrl.training.metrics import tags


class Callback:
    """Override what is of use. A method that returns True stops the training cleanly, after a checkpoint.

    Under ``torchrun`` the first process alone calls them. A resumed run calls them again for the updates
    after its last checkpoint.
    """

    def on_start(self, folder: Path, options: dict[str, Any]) -> bool | None:
        """Training begins or is resumed in this run folder, with these options (TrainConfig's fields)."""

    def on_log(self, step: int, figures: dict[str, float]) -> bool | None:
        """After every ``log_every`` updates: loss, gradient_norm, learning_rate, ... since the last time."""

    def on_validation(self, step: int, loss: float) -> bool | None:
        """With ``validation_fraction``, when an evaluation is due: the loss on the episodes held out."""

    def on_evaluation(self, step: int, results: Sequence[TargetResult]) -> bool | None:
        """After every evaluation: one result for each target return, in their order."""

    def on_checkpoint(self, step: int, folder: Path) -> bool | None:
        """After every checkpoint, which is this folder; ``load_agent(folder)`` reads it."""


class TrackerCallback(Callback):
    """Send figures to a run of Weights & Biases or Trackio, by the names that they have in TensorBoard.

    Args:
        run: what ``wandb.init(...)`` or ``trackio.init(...)`` returned; finishing it is up to its owner.
    """

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_start(self, folder: Path, options: dict[str, Any]) -> None:
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        config = self.run.config
        # wandb refuses options that changed at resume without the argument, which a dict does not take.
        config.update(shown) if isinstance(config, dict) else config.update(shown, allow_val_change=True)

    def on_log(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(tags("train", figures), step=step)

    def on_validation(self, step: int, loss: float) -> None:
        self.run.log({"validation/loss": loss}, step=step)

    def on_evaluation(self, step: int, results: Sequence[TargetResult]) -> None:
        for number, result in enumerate(results, start=1):
            self.run.log(tags(f"evaluation/target{number}", result.to_dict()), step=step)
