"""Which Gymnasium environment an agent is evaluated in, as plain data that fits in a JSON file."""

import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from reprlib import repr as short_repr
from typing import Annotated, Any

import gymnasium
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from flowrl.errors import UserError, did_you_mean, one_line
from flowrl.options import STRICT, PositiveCount

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


def _own_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    reserved = sorted(_RESERVED_KWARGS.intersection(kwargs))
    if reserved:
        raise ValueError(f"'{reserved[0]}' is not an argument of an environment")
    return kwargs


Kwargs = Annotated[dict[str, Any], AfterValidator(_own_kwargs)]


@dataclass(frozen=True, config=STRICT)
class EnvironmentSpec:
    """A Gymnasium environment, which need not be registered here, and how it is made."""

    env_id: Annotated[str, Field(pattern=r"^([A-Za-z0-9_.-]+/)*[A-Za-z0-9_.-]+$")]
    """Without a module before it, which would be imported."""
    kwargs: Kwargs = field(default_factory=dict)
    max_episode_steps: PositiveCount | None = None
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

    @property
    def time_limit(self) -> int | None:
        """Timesteps of an episode at most, as given here or registered; None where neither says."""
        registered = gymnasium.registry.get(self.env_id)
        return self.max_episode_steps or (registered.max_episode_steps if registered else None)

    def without_registered_options(self) -> "EnvironmentSpec":
        """Return the same environment, without imports and what it is registered with anyway."""
        registered = gymnasium.registry.get(self.env_id)
        own = {} if registered is None else registered.kwargs
        kwargs = {k: v for k, v in self.kwargs.items() if k not in own or repr(own[k]) != repr(v)}
        plain = replace(self, kwargs=kwargs, max_episode_steps=None, imports=())
        limit = None if plain.time_limit == self.time_limit else self.max_episode_steps
        return replace(plain, max_episode_steps=limit)

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
        fields = {"env_id": data["id"], "kwargs": kwargs, "max_episode_steps": limit, "wrappers": wrappers}
        try:
            return TypeAdapter(cls).validate_json(json.dumps(fields, allow_nan=False))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise UserError(f"environment {short_repr(data['id'])}: '{name}': {first['msg']}") from error
        except ValueError as error:  # infinity or NaN, which no file of a run can hold
            raise UserError(f"environment {short_repr(data['id'])}: {error}") from error


def recorded_or_named(
    recorded: EnvironmentSpec | None, named: EnvironmentSpec | None
) -> EnvironmentSpec | None:
    """Return what is named, but what was recorded, with the imports of both, where its id alone is named."""
    if recorded is None or (named is not None and (named.env_id != recorded.env_id or named.kwargs)):
        return named
    imports = (*recorded.imports, *(named.imports if named else ()))
    return replace(recorded, imports=tuple(dict.fromkeys(imports)))


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
            raise UserError(f"module '{module}' cannot be imported: {one_line(error)}") from error


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
        f"environment '{env_id}' is not registered with Gymnasium{hint} (one of another package needs "
        "--env-import MODULE)"
    )


def parse_kwargs(text: str) -> dict[str, Any]:
    """Read the JSON object that ``--env-kwargs`` gives; a UserError when it cannot be keyword arguments."""
    try:
        kwargs = TypeAdapter(Kwargs, config=STRICT).validate_json(text)
        json.dumps(kwargs, allow_nan=False)
    except ValidationError as error:
        raise UserError(f"--env-kwargs {text}: {error.errors()[0]['msg']}") from error
    except ValueError as error:  # infinity or NaN, which no file of a run can hold
        raise UserError(f"--env-kwargs {text}: {error}") from error
    return kwargs
