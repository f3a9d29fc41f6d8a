"""What an environment raises, as one line, with its traceback kept in a file."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowrl.atomic import write_text
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError, one_line


class EnvironmentFailure(UserError):
    """An environment raised an exception, which is the cause of this one."""


@contextmanager
def named_failure(environment: EnvironmentSpec, when: str) -> Iterator[None]:
    """Turn any exception of an environment into an :class:`EnvironmentFailure`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # an environment may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise EnvironmentFailure(f"environment {environment.env_id} failed at {when}: {reason}") from error


@contextmanager
def failures_kept(folder: Path) -> Iterator[None]:
    """Write the traceback of an :class:`EnvironmentFailure` to ``environment-error.txt`` in ``folder``."""
    try:
        yield
    except EnvironmentFailure as failure:
        path = folder / "environment-error.txt"
        try:
            write_text(path, "".join(traceback.format_exception(failure.__cause__)))
        except OSError:
            raise failure from failure.__cause__  # what went wrong first
        raise UserError(f"{failure}; its traceback is in {path}") from failure
