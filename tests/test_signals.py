"""SIGINT and SIGTERM: noted, raised where that is allowed, and final the second time."""

import os
import signal
import subprocess
import sys

import pytest

from flowrl.signals import Stopped, StopSignals

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_is_only_noted_outside_interruptible(number, code):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert signals.received == number
        with pytest.raises(Stopped) as caught:
            signals.stop()
    assert caught.value.code == code
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_interrupts_where_it_may(number, code):
    with StopSignals() as signals:
        with pytest.raises(Stopped) as caught, signals.interruptible():
            signal.raise_signal(number)
        assert caught.value.code == code
        assert signals.received == number


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_that_came_before_interrupts_at_the_door(number, code):
    with StopSignals() as signals:
        signal.raise_signal(number)
        with pytest.raises(Stopped) as caught, signals.interruptible():
            pytest.fail("went in")
    assert caught.value.code == code


def test_after_an_interruptible_part_a_signal_is_noted_again():
    with StopSignals() as signals:
        with signals.interruptible():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_no_signal_falls_between_the_question_and_the_door(monkeypatch):
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
import signal, time
from flowrl.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if signals.received:
            print("received", flush=True)
            time.sleep(60)
"""


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)]
)
def test_a_second_signal_stops_at_once(first, second):
    """Even a program that never looks at what it received."""
    process = subprocess.Popen(
        [sys.executable, "-c", PATIENT], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == "received\n"
    process.send_signal(second)
    assert process.wait(timeout=10) == -second
    process.stdout.close()
