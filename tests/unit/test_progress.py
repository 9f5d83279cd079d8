import io

import pytest

from edt_diffusion.util import progress
from edt_diffusion.util.progress import CountProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = CountProgress("encoding", "images")
    for done in range(0, 101, 4):  # 4 images and 2 seconds each
        told(done, 100, "3 unreadable" if done > 40 else "")
        clock.now += 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "encoding 24/100 images  2.0 images/s  0.6 min left",
        "encoding 48/100 images  2.0 images/s  3 unreadable  0.4 min left",
        "encoding 72/100 images  2.0 images/s  3 unreadable  0.2 min left",
        "encoding 96/100 images  2.0 images/s  3 unreadable  0.0 min left",
        "encoding 100/100 images  2.0 images/s  3 unreadable  0.0 min left",
    ]
    assert told.rate == pytest.approx(2.0)


def test_what_was_done_before_says_nothing_about_the_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = CountProgress("encoding", "images")
    told(900, 1000)
    clock.now += 20
    told(910, 1000)
    assert told.rate == pytest.approx(0.5)
    assert capsys.readouterr().err == "encoding 910/1000 images  0.5 images/s  3.0 min left\n"


def test_another_stage_has_a_speed_of_its_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = CountProgress("judging", "pictures")
    for done in (0, 50, 100):
        told(done, 100)
        clock.now += 10
    for done in (10, 40):
        told(done, 40)
        clock.now += 10
    assert told.rate == pytest.approx(3.0)
    assert capsys.readouterr().err.splitlines() == [
        "judging 100/100 pictures  5.0 pictures/s  0.0 min left",
        "judging 40/40 pictures  3.0 pictures/s  0.0 min left",
    ]


def test_no_total(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = CountProgress("encoding", "images")
    told(0, None)
    clock.now += 11
    told(33, None)
    assert capsys.readouterr().err == "encoding 33 images  3.0 images/s\n"


def test_nothing_to_do_and_quiet(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    told = CountProgress("encoding", "images")
    told(5, 5)
    quiet = CountProgress("encoding", "images", quiet=True)
    quiet(0, 10)
    clock.now += 50
    quiet(10, 10)
    assert quiet.rate == pytest.approx(0.2)  # known all the same
    assert capsys.readouterr() == ("", "")


def test_a_bar_in_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with CountProgress("encoding", "images") as told:
        told(0, 8)
        clock.now += 2
        told(6, 8, "1 unreadable")
        assert told._bar is not None
        assert told._bar.tasks[0].completed == 6
        assert told._bar.tasks[0].fields["facts"] == "3.0 images/s  1 unreadable"
    text = terminal.getvalue()
    assert "encoding" in text
    assert "6/8" in text
    assert "3.0 images/s" in text
