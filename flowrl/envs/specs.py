"""Which Gymnasium environment an agent is evaluated in, as plain data that fits in a JSON file."""

import importlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium

from flowrl.errors import UserError, did_you_mean, one_line

# Names that gymnasium.make takes for itself. As a stored keyword argument they would change what is
# made instead of how the environment behaves.
_RESERVED_KWARGS = frozenset(
    ("id", "max_episode_steps", "disable_env_checker", "render_mode", "entry_point", "additional_wrappers")
)
# Wrappers of a recording that change neither observations nor actions nor rewards.
_WATCHING_WRAPPERS = frozenset(("DataCollector", "RecordEpisodeStatistics", "RecordVideo", "HumanRendering"))
# Packages that register environments when they are imported: module, what to install, how their ids begin.
_PACKAGES = (
    (
        "gymnasium_robotics",
        "gymnasium-robotics",
        ("AntMaze_", "PointMaze_", "AdroitHand", "FrankaKitchen", "Fetch", "HandManipulate", "HandReach"),
    ),
    ("shimmy", "shimmy[dm-control]", ("dm_control/",)),
    ("minigrid", "minigrid", ("MiniGrid-", "BabyAI-")),
    ("popgym", "popgym", ("popgym-",)),
    ("ale_py", "ale-py", ("ALE/",)),
    ("panda_gym", "panda-gym", ("Panda",)),
    ("metaworld", "metaworld", ("Meta-World/",)),
    ("highway_env", "highway-env", ("highway-", "merge-", "roundabout-", "parking-", "intersection-")),
)


@dataclass(frozen=True)
class EnvironmentSpec:
    """A registered Gymnasium environment, and how it is made."""

    env_id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    """None keeps the limit that the environment is registered with."""
    imports: tuple[str, ...] = ()
    """Modules that register environments; imported when one is made, not when this is read."""
    wrappers: tuple[tuple[str, dict[str, Any] | None], ...] = ()
    """Names and arguments of the wrappers to apply, innermost first; see :mod:`flowrl.envs.vector`."""

    def __str__(self) -> str:
        """The id, and in parentheses what differs from the environment as it is registered."""
        parts = [f"{key}={value!r}" for key, value in self.kwargs.items()]
        if self.max_episode_steps is not None:
            parts.append(f"max_episode_steps={self.max_episode_steps}")
        parts += [name for name, _ in self.wrappers]
        return f"{self.env_id}({', '.join(parts)})" if parts else self.env_id

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, the inverse of :meth:`from_dict`."""
        return {
            "env_id": self.env_id,
            "kwargs": dict(self.kwargs),
            "max_episode_steps": self.max_episode_steps,
            "imports": list(self.imports),
            "wrappers": [list(wrapper) for wrapper in self.wrappers],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EnvironmentSpec":
        """Build from :meth:`to_dict`'s form; the environment need not be registered here.

        Raises:
            UserError: a key is missing or has the wrong type.
        """
        if not isinstance(data, dict) or not isinstance(data.get("env_id"), str):
            raise UserError("environment: expected a mapping with 'env_id', 'kwargs' and 'max_episode_steps'")
        env_id, kwargs, limit = data["env_id"], data.get("kwargs") or {}, data.get("max_episode_steps")
        imports, wrappers = data.get("imports") or [], data.get("wrappers") or []
        where = f"environment {env_id}"
        if not re.fullmatch(r"([\w.-]+/)*[\w.-]+", env_id, re.ASCII):  # no module:Name, which imports
            raise UserError(f"{where}: not the id of an environment")
        check_kwargs(where, kwargs)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0):
            raise UserError(f"{where}: 'max_episode_steps' must be a positive integer or null")
        if not isinstance(imports, list) or not all(isinstance(name, str) for name in imports):
            raise UserError(f"{where}: 'imports' must be a list of module names")
        if not isinstance(wrappers, list) or not all(map(_is_wrapper, wrappers)):
            raise UserError(f"{where}: 'wrappers' must be a list of names with arguments")
        pairs = tuple((name, arguments) for name, arguments in wrappers)
        return cls(env_id, dict(kwargs), limit, tuple(imports), pairs)

    @classmethod
    def from_gymnasium_json(cls, json_string: str) -> "EnvironmentSpec":
        """Build from the JSON of a Gymnasium ``EnvSpec``, the form in which Minari stores one.

        Only the id, the keyword arguments, the time limit and the wrappers' names and arguments are taken.
        Entry points named in the file (the environment's, its wrappers') are never imported.

        Raises:
            UserError: not such JSON.
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
        recorded = data.get("additional_wrappers")
        wrappers = [
            [str(wrapper.get("name")), wrapper.get("kwargs")]
            for wrapper in (recorded if isinstance(recorded, list) else [])
            if isinstance(wrapper, dict) and wrapper.get("name") not in _WATCHING_WRAPPERS
        ]
        limit = data.get("max_episode_steps")
        return cls.from_dict(
            {"env_id": data["id"], "kwargs": kwargs, "max_episode_steps": limit, "wrappers": wrappers}
        )


def named_environment(
    name: str, imports: Iterable[str] = (), also_known: Mapping[str, EnvironmentSpec] | None = None
) -> EnvironmentSpec:
    """Return the environment that ``name`` stands for, with its own defaults.

    Args:
        name: a key of ``also_known``, a Gymnasium id such as Hopper-v4, or module:Name-v0, of which the
            module is imported first.
        imports: further modules to import first.
        also_known: environments with names of their own.

    Raises:
        UserError: a module that cannot be imported, or a name that is not known; the message suggests the
            closest one, or the package that registers such environments.
    """
    if also_known and name in also_known:
        return replace(also_known[name], imports=tuple(imports))
    module, _, env_id = name.rpartition(":")
    modules = tuple(dict.fromkeys((*imports, module) if module else imports))
    import_modules(modules)
    check_registered(env_id, tuple(also_known or ()))
    return EnvironmentSpec(env_id, imports=modules)


def import_modules(modules: Iterable[str]) -> None:
    """Import modules for the environments that they register; a UserError names one that fails."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a module may raise anything
            raise UserError(f"--env-import {module}: cannot be imported: {one_line(error)}") from error


def check_registered(env_id: str, also_known: tuple[str, ...] = ()) -> None:
    """Raise UserError unless Gymnasium's registry has ``env_id``; the message suggests what may help."""
    if env_id in gymnasium.registry:
        return
    for module, package, beginnings in _PACKAGES:
        if env_id.startswith(beginnings):
            raise UserError(
                f"environment '{env_id}' is not registered with Gymnasium: the package {package} registers "
                f"it; install that and give --env-import {module}"
            )
    hint = did_you_mean(env_id, (*gymnasium.registry, *also_known))
    if "did you mean" not in hint:  # the whole registry is too long to list
        hint = f"; known: {', '.join(also_known)}, and Gymnasium's ids" if also_known else ""
    raise UserError(
        f"environment '{env_id}' is not registered with Gymnasium{hint}; one of another package needs "
        "--env-import MODULE"
    )


def check_kwargs(where: str, kwargs: object) -> None:
    """Raise UserError unless these can be an environment's keyword arguments."""
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise UserError(f"{where}: 'kwargs' must be a mapping from names to values")
    reserved = sorted(_RESERVED_KWARGS.intersection(kwargs))
    if reserved:
        raise UserError(f"{where}: '{reserved[0]}' is not allowed in 'kwargs'")


def _is_wrapper(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], dict | None)
    )
