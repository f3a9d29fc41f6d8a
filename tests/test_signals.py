"""SIGINT and SIGTERM: noted, raised where that is allowed, and final the second time."""

import signal
import sys

import pytest
from processes import Command, finish, wait_for

from flowrl.signals import Stopped, StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_outside_interruptible_and_raised_inside_or_on_entering(number, code):
    handler = signal.getsignal(number)
    for before in (True, False):
        with StopSignals() as signals:
            assert signals.received is None
            if before:
                signal.raise_signal(number)
                assert signals.received == number
            with pytest.raises(Stopped) as caught, signals.interruptible():
                signal.raise_signal(pytest.fail("went in") if before else number)
            assert signals.received == number
            with pytest.raises(Stopped) as again:
                signals.stop()
        assert caught.value.code == again.value.code == code
        assert signal.getsignal(number) == handler


def test_no_signal_is_lost_while_entering_interruptible(monkeypatch):
    """One that comes at any line while interruptible() is entered must raise there, or have been seen."""
    for arrival in range(1, 12):
        with StopSignals() as signals:
            lines = 0

            def trace(frame, event, argument, signals=signals, arrival=arrival):
                nonlocal lines
                if frame.f_code.co_name == "interruptible" and event == "line":
                    lines += 1
                    if lines == arrival and signals.received is None:
                        signals._handle(signal.SIGTERM, None)
                return trace

            entered = False
            sys.settrace(trace)
            try:
                with signals.interruptible():
                    entered = True
                    sys.settrace(None)
            except Stopped:
                pass
            finally:
                sys.settrace(None)
            assert not (entered and signals.received), f"signal at line {arrival} was missed"


PATIENT = """
import time
from flowrl.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.01)
    print("received", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_a_program_that_ignores_the_first(first):
    process = Command([], PATIENT)
    wait_for(lambda: "ready" in process.output, process)
    process.send_signal(first)
    wait_for(lambda: "received" in process.output, process)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == -signal.SIGINT
