"""Options as dataclasses: each field's type declares its bounds, which are checked here."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from reprlib import repr as short_repr
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from flowrl.errors import UserError, did_you_mean

LARGEST_DIMENSION = 1 << 20  # a larger one is damage or a mistake, not a model
LARGEST_COUNT = 1 << 53  # beyond this, floating point skips whole numbers
MOST_EPISODES = 100_000  # of an evaluation: each has an environment of its own
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Size = Annotated[int, Field(ge=1, le=LARGEST_DIMENSION)]
NumLayers = Annotated[int, Field(ge=1, le=1000)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
PositiveCount = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Episodes = Annotated[int, Field(ge=0, le=MOST_EPISODES)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
ConvolutionWidth = Annotated[int, Field(ge=0, le=64)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Target = Annotated[float, Field(ge=-3e38, le=3e38)]  # a return, in float32 while acting
Share = Annotated[float, Field(gt=0, le=1)]
SourceClamp = Annotated[float, Field(gt=0, le=40)]  # the exponential and its sum stay finite in float32


def checked(kind: type, values: Mapping[str, Any], label: Callable[[str], str]) -> dict[str, Any]:
    """Return the values after checking each against the type of the field of its name in a dataclass.

    Numbers must be finite and lists stand for tuples; no other type is converted.

    Args:
        kind: the dataclass.
        values: some of its fields, by name.
        label: how messages refer to a field, such as ``--steps``.

    Raises:
        UserError: no field of this name, or a value that its type does not take.
    """
    adapters = _adapters(kind)
    result = {}
    for name, value in values.items():
        if name not in adapters:
            given = short_repr(name).strip("'")
            raise UserError(f"{label(given)}: unknown option{did_you_mean(given, adapters)}")
        try:
            result[name] = adapters[name].validate_python(tuple(value) if isinstance(value, list) else value)
        except ValidationError as error:
            reasons = dict.fromkeys(
                e["msg"].removeprefix("Input ").replace("valid tuple", "list") for e in error.errors()
            )
            raise UserError(f"{label(name)} {short_repr(value)}: {' or '.join(reasons)}") from error
    return result


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return f"--{name.replace('_', '-')}"


@cache
def _adapters(kind: type) -> dict[str, TypeAdapter[Any]]:
    """What checks each field."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name], config=STRICT) for field in fields(kind)}
