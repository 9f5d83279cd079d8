"""The stream of batches outlives its loader processes."""

import os
import signal
import subprocess
import sys

import pytest
from test_trainer import assert_same_run, trainer_in

from edt_diffusion.data.loader import WorkerLost
from edt_diffusion.training.feed import Feed
from edt_diffusion.training.log import read_events
from edt_diffusion.util.errors import UserError


class Numbers:
    """Micro-batch m of step s is the number 2 s + m; dies before the places given, once each."""

    def __init__(self, dies: list[int]) -> None:
        self.dies, self.made = list(dies), []

    def __call__(self, step: int):
        self.made.append(step)
        place = 2 * step
        while True:
            if place in self.dies:
                self.dies.remove(place)
                raise WorkerLost("killed")
            yield place
            place += 1


def test_no_batch_is_lost_and_none_comes_twice():
    numbers, told = Numbers([3, 6, 6]), []
    feed = Feed(numbers, 1, 2, told.append)
    assert [next(feed) for _ in range(8)] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert numbers.made == [1, 1, 3, 3]
    assert len(told) == 3
    assert "nothing is lost" in told[0]
    feed.restart(2)
    assert next(feed) == 4
    feed.close()


def test_a_loader_that_dies_while_it_catches_up():
    numbers, told = Numbers([]), []
    feed = Feed(numbers, 2, 2, told.append)
    assert next(feed) == 4
    numbers.dies = [5, 4]  # before the second half of step 2, and again before its first
    assert [next(feed) for _ in range(3)] == [5, 6, 7]
    assert len(told) == 2


def test_a_loader_that_keeps_dying_is_given_up():
    feed = Feed(Numbers([0] * 10), 0, 2, lambda _message: None)
    with pytest.raises(UserError, match=r"killed 4 times in a row \(killed\): set data.workers=0, or lower it"):
        next(feed)


@pytest.mark.slow
def test_a_killed_loader_process_costs_nothing(tmp_path):
    import multiprocessing

    train = {"steps": 8, "micro_batches": 2}
    assert trainer_in(tmp_path / "whole", train=train, data={"workers": 2}).fit()

    def kill_one(_pipeline):
        def call(step):
            if step == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

        return [(1, call)]

    assert trainer_in(tmp_path / "hurt", callbacks=kill_one, train=train, data={"workers": 2}).fit()
    assert_same_run(tmp_path / "hurt", tmp_path / "whole", 8)
    (event,) = read_events(tmp_path / "hurt")
    assert event["event"] == "loader"
    assert "a loader process was killed" in event["message"]


HANDLER = """
import os, signal, time
import numpy as np, torch
from edt_diffusion.data import training_loader
from multiprocessing import active_children

class Rows:
    labels = None
    def __len__(self): return 8
    def batch(self, indices, epochs, seed, flip): return torch.zeros(len(indices), 1, 2, 2)

if __name__ == "__main__":
    before = signal.getsignal(signal.SIGCHLD)
    loader = training_loader(Rows(), seed=0, global_batch=4, workers=1)
    next(loader)
    assert signal.getsignal(signal.SIGCHLD) is before
    os.kill(active_children()[0].pid, signal.SIGKILL)
    for _ in range(50):  # the training is somewhere else now, half-way through an update perhaps
        time.sleep(0.01)
    print("undisturbed", flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_the_death_of_a_loader_process_does_not_break_into_the_training(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(HANDLER)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "undisturbed\n", done.stderr
