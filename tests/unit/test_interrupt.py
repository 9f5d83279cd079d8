"""Signals and the clock ask a run to stop."""

import signal
import subprocess
import sys

import pytest

from edt_diffusion.training.interrupt import StopRequest
from edt_diffusion.util.durations import parse_duration
from edt_diffusion.util.errors import UserError


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_the_first_signal_is_a_request(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert stop.reason == f"{name} came"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_the_second_signal_ends_the_process_as_it_would_have(name):
    code = (
        "import signal\nfrom edt_diffusion.training.interrupt import StopRequest\n"
        f"with StopRequest():\n    [signal.raise_signal(signal.{name}) for _ in range(2)]\nprint('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -getattr(signal, name)
    assert done.stdout == ""


def test_a_signal_after_the_clock_does_not_end_the_save():
    now = [0.0]
    with StopRequest(60.0, clock=lambda: now[0]) as stop:
        now[0] = 61.0
        stop.check_clock()
        signal.raise_signal(signal.SIGTERM)  # the scheduler's, while the run saves
        assert stop.reason == "the time allowed, 60 s, is used up"
        signal.signal(signal.SIGTERM, stop._before[signal.SIGTERM])
    with StopRequest() as stop:  # and a new request begins anew
        assert not stop.requested


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    now = [10.0]
    with StopRequest(clock=lambda: now[0]) as stop:
        signal.raise_signal(signal.SIGTERM)
        now[0] += 2.9
        signal.raise_signal(signal.SIGINT)  # else a KeyboardInterrupt
        assert stop.reason == "SIGTERM came"
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_hang_up_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_clock_asks_when_what_is_left_is_needed_for_the_save():
    now = [100.0]
    stop = StopRequest(60.0, clock=lambda: now[0])
    now[0] = 149.0
    stop.check_clock(reserve=10.0)
    assert not stop.requested
    now[0] = 150.0
    stop.check_clock(reserve=10.0)
    assert stop.requested
    assert stop.reason == "the time allowed, 60 s, is used up"
    without = StopRequest(clock=lambda: now[0])
    without.check_clock()
    assert not without.requested


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1h30m", 5400), ("1h 30m 5s", 5405), ("2d", 172800),
     ("1:30:00", 5400), ("0:45", 2700), ("10:00:01", 36001)],
)  # fmt: skip
def test_lengths_of_time(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5", "0", "3x", "1:2:3:4", "h", "1h30", "0s"])
def test_no_lengths_of_time(text):
    with pytest.raises(UserError, match=r"time .*: expected such as 90s, 30m"):
        parse_duration(text)
