"""The one exception that means "your input is wrong", and how the command line shows it."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input: the message is one line naming the file, key, flag or value and what would be right."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest option, or the list of options when none is close."""
    known = sorted(options)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, or its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a :class:`UserError` into one line on stderr and exit code 2; other exceptions pass.

    An error of the operating system that names a file is treated alike: a name too long, a folder without
    permission, a disk that fails.
    """
    try:
        yield
    except UserError as error:
        _exit_with(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _exit_with(f"{error.filename}: {error.strerror}")


def _exit_with(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)
