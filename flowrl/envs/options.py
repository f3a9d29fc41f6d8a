"""Options about the environment that several commands have."""

from dataclasses import dataclass, replace

from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec, parse_kwargs
from flowrl.errors import UserError
from flowrl.options import PositiveCount


@dataclass(frozen=True, kw_only=True)
class EnvironmentOptions:
    """What differs from the environment as it is registered or recorded."""

    env_import: tuple[str, ...] = ()
    """Modules to import for the environments that they register, such as gymnasium_robotics."""
    env_kwargs: str | None = None
    """JSON object of keyword arguments for the environment, such as '{"continuing_task": false}'."""
    max_episode_steps: PositiveCount | None = None
    """Time limit of an episode in timesteps; by default the environment's or, in training, where it has none,
    twice the longest episode of the data."""

    def apply(self, environment: EnvironmentSpec) -> EnvironmentSpec:
        """Return the environment with these options over its own.

        Raises:
            UserError: keyword arguments that are not a JSON object or are gymnasium.make's own.
        """
        return replace(
            environment,
            kwargs={**environment.kwargs, **parse_kwargs(self.env_kwargs or "{}")},
            max_episode_steps=self.max_episode_steps or environment.max_episode_steps,
            imports=tuple(dict.fromkeys((*environment.imports, *self.env_import))),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(EnvironmentOptions):
    """The same, and how returns are normalised."""

    reference_scores: tuple[float, float] | None = None
    """Returns that normalised scores count as 0 and 100; by default the data's own or D4RL's."""

    def reference(self) -> ReferenceScores | None:
        """Return the reference scores given here; a UserError unless the second is the higher one."""
        if self.reference_scores is None:
            return None
        low, high = self.reference_scores
        if not low < high:
            raise UserError(f"--reference-scores {low:g} {high:g}: the second must be the higher return")
        return ReferenceScores(low, high)
