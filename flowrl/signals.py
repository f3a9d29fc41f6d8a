"""SIGINT and SIGTERM: finish what must be whole, then leave with exit code 130 or 143."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Stopped(SystemExit):
    """Raised where a signal may interrupt at once; its exit code is 128 plus the signal's number."""


@contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """Let SIGINT end the process at once: while a module in C++ is imported, KeyboardInterrupt may be lost.

    Only the main thread can do so. :class:`StopSignals` takes over while entered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class StopSignals:
    """While entered, the first signal only sets :attr:`received`; a second one kills the process.

    Inside :meth:`interruptible` the first signal raises :class:`Stopped` right there. Only the main thread
    can handle signals: entered in another one, this changes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interruptible = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        in_main_thread = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread else ():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal that has come or comes now raise :class:`Stopped`."""
        self._interruptible = True  # before the question: a signal in between must not be missed
        try:
            if self.received is not None:
                self.stop()
            yield
        except Exception:  # some libraries turn an interruption into an error of their own
            if self.received is not None:
                self.stop()
            raise
        finally:
            self._interruptible = False

    def stop(self) -> NoReturn:
        """Raise :class:`Stopped` for the signal that was received."""
        raise Stopped(128 + (self.received or 0))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        if self._interruptible:
            self.stop()
