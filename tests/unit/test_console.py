"""What people see of a run: plain lines, a live display, and nothing if quiet."""

import io
import re

import pytest

from edt_diffusion.training.console import Console

VALUES = {
    "loss": 0.5, "loss_full": 0.2, "loss_masked": 0.3, "grad_norm": 0.125, "lr": 1e-3, "images_per_second": 512.0,
    "mfu": 0.41, "data_wait_share": 0.02, "memory_gib": 11.25, "loss_full_t0": 9.0, "seconds": 3.0,
}  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_plain_line_every_fifteen_seconds_and_at_the_end(clock, capsys):
    console = Console(100, 40, clock=clock, memory="GPU memory")
    for step in range(41, 101):  # a second each, logged every second step
        clock.now += 1
        console.step(step, VALUES if step % 2 == 0 else None)
    console.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 56/100", "step 72/100", "step 88/100", "step 100/100",
    ]  # fmt: skip
    assert lines[0] == (
        "step 56/100  loss 0.5000  full 0.2000  masked 0.3000  gradient norm 0.125  lr 1.00e-03  512 images/s  "
        "MFU 41 %  data wait 2 %  GPU memory 11.2 GiB  0.7 min left"
    )
    assert lines[-1].endswith("  0.0 min left")


def test_the_time_left_is_by_the_steps_of_this_process(clock, capsys):
    console = Console(1_000_000, 900_000, clock=clock)
    clock.now += 3600
    console.step(910_000, {"loss": 0.5})
    assert capsys.readouterr().err == "step 910000/1000000  loss 0.5000  9.0 h left\n"


def test_messages_come_at_once_and_validation_keeps_its_step(clock, capsys):
    console = Console(100, clock=clock)
    console.step(10, {"val_loss": 0.25})
    console.message("left out: the loss became nan")
    clock.now += 20
    console.step(12, {"loss": 2e-5})
    assert capsys.readouterr().err.splitlines() == [
        "step 10/100  left out: the loss became nan",
        "step 12/100  loss 2.000e-05  validation 0.2500 at step 10  2.4 min left",
    ]


def test_quiet_says_nothing(clock, capsys):
    console = Console(10, quiet=True, clock=clock)
    clock.now += 99
    console.step(10, VALUES)
    console.message("saved")
    console.close()
    assert capsys.readouterr() == ("", "")


def test_a_listener_that_has_gone_does_not_end_the_run(clock, monkeypatch):
    class Closed(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed())
    console = Console(10, clock=clock)
    console.message("saved")
    console.step(10, VALUES)


def test_a_live_display_in_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    console = Console(10, 2)
    console.step(3, VALUES)
    console.message("[red]3 steps[/red] left out")  # no markup
    console.step(6, {"loss": 0.4, "val_loss": 0.33})
    console.close()
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "step 3: [red]3 steps[/red] left out" in text
    last = text[text.rindex("training") :]
    assert "6/10" in last
    for fact in ("loss 0.4000  full 0.2000  masked 0.3000", "512 images/s  MFU 41 %", "validation 0.3300 at step 6"):
        assert fact in last
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    Console(10, clock=clock).step(10, {"loss": 0.4})
    assert terminal.getvalue() == "step 10/10  loss 0.4000  0.0 min left\n"
