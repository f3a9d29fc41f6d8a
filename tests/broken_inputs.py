"""How every broken input must end: in one line and exit code 2, or a result; in little memory."""

import copy
import io
import json
import pickle
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any

from flowrl.errors import EXIT_BAD_INPUT, exit_on_user_error

MOST_MEMORY = 2 << 20  # KiB, of the whole process at any moment
NOISE = 1 << 16  # KiB, that small calls may add to what the process has
LONGEST_LINE = 1500
MARKER = "exploded"


class Bomb:
    """Makes a folder in the current one when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path(MARKER).mkdir, ()


PICKLES = (pickle.dumps(Bomb()), pickle.dumps(Bomb(), protocol=0))


def ending(call: Callable[[], Any]) -> str | None:
    """Do ``call`` as scripts do; return the error's line, or None where there was a result.

    Any exception that the scripts would let through passes here too, and fails the test.
    """
    peak, errors, code = _peak(), io.StringIO(), 0
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(errors), exit_on_user_error():
            call()
    except SystemExit as stop:
        code = stop.code
    # The peak never falls: what earlier tests of this process took is not held against this one.
    assert _peak() < max(MOST_MEMORY, peak + NOISE)
    if code == 0:
        return None
    assert code == EXIT_BAD_INPUT
    (line,) = errors.getvalue().splitlines()
    assert line.startswith("error: ")
    assert len(line) < LONGEST_LINE
    return line


def refusal(call: Callable[[], Any], *patterns: str) -> str:
    """The line of an input that must be refused, in which these regular expressions must be found."""
    line = ending(call)
    assert line is not None, "it was taken"
    for pattern in patterns:
        assert re.search(pattern, line), line
    return line


def reseal(checkpoint: Path) -> None:
    """Make a checkpoint's manifest agree with whatever its files now hold, as an attacker would."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def with_value(data: Any, place: tuple, value: Any) -> Any:
    """A copy of a JSON document with another value at this place."""
    changed = copy.deepcopy(data)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return changed


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes: a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
