"""D4RL's reference returns: what counts as 0 and as 100 when a return is normalised."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReferenceScores:
    """Returns (undiscounted sums of rewards) of a random policy and of an expert on one environment."""

    minimum: float
    maximum: float

    def normalized_score(self, episode_return: float) -> float:
        """Return ``100 * (episode_return - minimum) / (maximum - minimum)``; also works on NumPy arrays."""
        return 100.0 * (episode_return - self.minimum) / (self.maximum - self.minimum)


# Source: D4RL (Fu et al., 2020), the reference minimum and maximum of its Gym-MuJoCo tasks.
REFERENCE_SCORES = {
    "hopper": ReferenceScores(-20.272305, 3234.3),
    "halfcheetah": ReferenceScores(-280.178953, 12135.0),
    "walker2d": ReferenceScores(1.629008, 4592.3),
    "ant": ReferenceScores(-325.6, 3879.7),
    "flowrl/tmaze": ReferenceScores(0.0, 1.0),  # the share of episodes that succeed, in percent
    # Cued speed, in the data: the best policy for all cues, and for each cue the policy of that speed.
    "flowrl/halfcheetahcued": ReferenceScores(82.6, 207.9),
    "flowrl/walker2dcued": ReferenceScores(103.1, 149.4),
    "flowrl/hoppercued": ReferenceScores(122.3, 162.2),
}


def reference_scores(env_id: str) -> ReferenceScores | None:
    """Return D4RL's reference scores for a Gymnasium id such as ``"Hopper-v4"``, or None when it has none.

    The version is ignored: all versions of one environment share its table row.
    """
    name = env_id.rsplit("-v", 1)[0]
    return REFERENCE_SCORES.get(name.lower())
