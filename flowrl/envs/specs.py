"""Which Gymnasium environment an agent is evaluated in, as plain data that fits in a JSON file."""

import json
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from flowrl.errors import UserError, did_you_mean

# Names that gymnasium.make takes for itself. As a stored keyword argument they would change what is
# made instead of how the environment behaves.
_RESERVED_KWARGS = frozenset(
    ("id", "max_episode_steps", "disable_env_checker", "render_mode", "entry_point", "additional_wrappers")
)


@dataclass(frozen=True)
class EnvironmentSpec:
    """A registered Gymnasium environment: its id, keyword arguments and time limit.

    ``max_episode_steps=None`` keeps the limit that the environment is registered with.
    """

    env_id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, the inverse of :meth:`from_dict`."""
        return {
            "env_id": self.env_id,
            "kwargs": dict(self.kwargs),
            "max_episode_steps": self.max_episode_steps,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EnvironmentSpec":
        """Build from :meth:`to_dict`'s form.

        Raises:
            UserError: a key is missing or has the wrong type, or the id is not registered.
        """
        if not isinstance(data, dict) or not isinstance(data.get("env_id"), str):
            raise UserError("environment: expected a mapping with 'env_id', 'kwargs' and 'max_episode_steps'")
        env_id, kwargs, limit = data["env_id"], data.get("kwargs") or {}, data.get("max_episode_steps")
        _check_registered(env_id)
        if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
            raise UserError(f"environment {env_id}: 'kwargs' must be a mapping from names to values")
        reserved = sorted(_RESERVED_KWARGS.intersection(kwargs))
        if reserved:
            raise UserError(f"environment {env_id}: '{reserved[0]}' is not allowed in 'kwargs'")
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0):
            raise UserError(f"environment {env_id}: 'max_episode_steps' must be a positive integer or null")
        return cls(env_id, dict(kwargs), limit)

    @classmethod
    def from_gymnasium_json(cls, json_string: str) -> "EnvironmentSpec":
        """Build from the JSON of a Gymnasium ``EnvSpec``, the form in which Minari stores one.

        Only the id, the keyword arguments and the time limit are taken. Entry points named in the file
        (the environment's, its wrappers') are never imported: the id selects Gymnasium's own.

        Raises:
            UserError: not such JSON, or the id is not registered with Gymnasium.
        """
        try:
            data = json.loads(json_string)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"environment specification is not JSON: {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("id"), str):
            raise UserError("environment specification is not a Gymnasium EnvSpec: no 'id'")
        kwargs = data.get("kwargs") or {}
        if isinstance(kwargs, dict):
            # render_mode is about watching the recording, not about what was recorded.
            kwargs = {key: value for key, value in kwargs.items() if key != "render_mode"}
        return cls.from_dict(
            {"env_id": data["id"], "kwargs": kwargs, "max_episode_steps": data.get("max_episode_steps")}
        )


def registered_environment(env_id: str, also_known: tuple[str, ...] = ()) -> EnvironmentSpec:
    """Return the environment registered with Gymnasium as ``env_id``, with its own defaults.

    Raises:
        UserError: not registered; the message suggests the closest id or name in ``also_known``.
    """
    _check_registered(env_id, also_known)
    return EnvironmentSpec(env_id)


def wrappers_in_gymnasium_json(json_string: str) -> tuple[str, ...]:
    """Return the names of the wrappers that a Gymnasium ``EnvSpec``'s JSON lists (they are not applied)."""
    wrappers = json.loads(json_string).get("additional_wrappers")
    if not isinstance(wrappers, list):
        return ()
    return tuple(str(wrapper.get("name")) for wrapper in wrappers if isinstance(wrapper, dict))


def _check_registered(env_id: str, also_known: tuple[str, ...] = ()) -> None:
    """Refuse ids outside Gymnasium's registry, ``module:id`` forms included (they import ``module``)."""
    if env_id in gymnasium.registry:
        return
    hint = did_you_mean(env_id, (*gymnasium.registry, *also_known))
    if "did you mean" not in hint:  # the whole registry is too long to list
        hint = f"; known: {', '.join(also_known)}, and Gymnasium's ids" if also_known else ""
    raise UserError(f"environment '{env_id}' is not registered with Gymnasium{hint}")
