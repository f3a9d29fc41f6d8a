"""D4RL's reference returns: what counts as 0 and as 100 when a return is normalised."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Returns = TypeVar("_Returns", float, np.ndarray)


@dataclass(frozen=True)
class ReferenceScores:
    """Returns (undiscounted sums of rewards) of a random policy and of an expert on one environment."""

    minimum: float
    maximum: float

    def normalized_score(self, returns: _Returns) -> _Returns:
        """Return ``100 * (returns - minimum) / (maximum - minimum)`` of one return or an array of them."""
        return 100.0 * (returns - self.minimum) / (self.maximum - self.minimum)


# Source: REF_MIN_SCORE and REF_MAX_SCORE of D4RL (Fu et al., 2020). Its tasks by the names that they have in
# Gymnasium and Gymnasium-Robotics, in lower case and without a version.
REFERENCE_SCORES = {
    "hopper": ReferenceScores(-20.272305, 3234.3),
    "halfcheetah": ReferenceScores(-280.178953, 12135.0),
    "walker2d": ReferenceScores(1.629008, 4592.3),
    "ant": ReferenceScores(-325.6, 3879.7),
    "adroithandpen": ReferenceScores(96.262799, 3076.8331017826877),
    "adroithandhammer": ReferenceScores(-274.856578, 12794.134825156867),
    "adroithanddoor": ReferenceScores(-56.512833, 2880.5693087298737),
    "adroithandrelocate": ReferenceScores(-6.425911, 4233.877797728884),
    "frankakitchen": ReferenceScores(0.0, 4.0),
    "antmaze_umaze": ReferenceScores(0.0, 1.0),
    "antmaze_medium": ReferenceScores(0.0, 1.0),
    "antmaze_large": ReferenceScores(0.0, 1.0),
    "antmaze_medium_diverse_gr": ReferenceScores(0.0, 1.0),
    "antmaze_large_diverse_gr": ReferenceScores(0.0, 1.0),
    "flowrl/tmaze": ReferenceScores(0.0, 1.0),  # the share of episodes that succeed, in percent
    # Cued speed, in the data: the best policy for all cues, and for each cue the policy of that speed.
    "flowrl/halfcheetahcued": ReferenceScores(82.9, 205.4),
    "flowrl/walker2dcued": ReferenceScores(102.0, 146.8),
    "flowrl/hoppercued": ReferenceScores(122.0, 163.3),
    # Hidden dynamics: the expert, with the best one wiring assumed in all worlds, and given the world.
    "flowrl/halfcheetahhidden": ReferenceScores(716.7, 2281.6),
    "flowrl/walker2dhidden": ReferenceScores(234.0, 787.7),
    "flowrl/hopperhidden": ReferenceScores(222.1, 778.9),
}


def reference_scores(env_id: str) -> ReferenceScores | None:
    """Return D4RL's reference scores for a Gymnasium id such as ``"Hopper-v4"``, or None when it has none.

    The version is ignored: all versions of one environment have the same.
    """
    return REFERENCE_SCORES.get(env_id.rsplit("-v", 1)[0].lower())
