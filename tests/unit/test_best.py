"""The best weights by a metric: what is better, what a resume keeps, what is on the disk."""

import errno
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import assert_same_run, trainer_in

from edt_diffusion.training.best import Best
from edt_diffusion.util.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def reached(folder, mode: str, values) -> list[int]:
    """Steps (1, 2, ...) whose value of "fid" is better than all before."""
    best, kept = Best(folder, "fid", mode), []
    for step, value in enumerate(values, start=1):
        told = {"fid": value, "loss": -float(step)}
        if best.is_better(told):
            assert best.taken(step, told) == {"metric": "fid", "value": value, "step": step}
            kept.append(step)
    assert (best.value, best.step) == (values[kept[-1] - 1], kept[-1])
    return kept


def test_equal_is_not_better_and_what_is_no_number_never(tmp_path):
    values = [math.nan, math.inf, 3.0, 3.0, math.nan, 4.0, -math.inf, 2.0, 2.5]
    assert reached(tmp_path, "min", values) == [3, 8]


def test_the_greatest_may_be_best(tmp_path):
    assert reached(tmp_path, "max", [-1.0, -1.0, -2.0, math.inf, math.nan, 0.0, 5.0, 4.0]) == [1, 6, 7]


def test_another_metric_or_none_is_not_better(tmp_path):
    assert not Best(tmp_path, "fid").is_better({"loss": 1.0})
    assert not Best(tmp_path, None).is_better({"fid": 1.0})


def test_the_state_goes_from_one_to_the_next_of_the_same_metric(tmp_path):
    best = Best(tmp_path, "fid")
    assert best.state() is None
    best.taken(7, {"fid": 3.0})
    state = json.loads(json.dumps(best.state()))
    same, other = Best(tmp_path, "fid"), Best(tmp_path, "loss")
    same.load(state)
    assert (same.value, same.step) == (3.0, 7)
    assert not same.is_better({"fid": 3.0})
    assert same.is_better({"fid": 2.9})
    other.load(state)
    assert (other.value, other.step) == (None, 0)
    assert other.is_better({"loss": 1e9})
    same.load(None)  # a state from before the first value
    assert same.value is None


# ---- in a run ----


def run_with(folder, values, steps, **train):
    """A run whose callback gives `values` one after the other, at every step; the trainer."""

    def given(_pipeline):
        return [(1, lambda step: {"score": values[step - 1], "other": 100.0 - step})]

    settings = {"steps": steps, "save_every": 2, "best_metric": "score", "best_mode": "max", **train}
    trainer = trainer_in(folder, callbacks=given, train=settings)
    assert trainer.fit()
    return trainer


def exported(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_resumed_run_keeps_the_best_value_and_another_metric_starts_anew(tmp_path):
    values = [0.1, 0.9, 0.9, 0.5, math.nan, 0.8]
    assert run_with(tmp_path, values, 4).saving.best.state() == {"metric": "score", "value": 0.9, "step": 2}
    at_two = exported(tmp_path / "best")
    assert run_with(tmp_path, values, 6).saving.best.step == 2  # 0.8 at step 6 is less than what the run began with
    kept = exported(tmp_path / "best")
    assert all(torch.equal(kept[name], tensor) for name, tensor in at_two.items())
    last = exported(tmp_path / "model")
    assert any(not torch.equal(kept[name], tensor) for name, tensor in last.items())
    resumed = run_with(tmp_path, [0.0] * 8, 8, best_metric="other", best_mode="min")
    assert resumed.saving.best.state() == {"metric": "other", "value": 92.0, "step": 8}
    assert json.loads((tmp_path / "best" / "best.json").read_text())["metric"] == "other"


def test_a_run_that_goes_back_forgets_what_it_reached_after_the_state_it_returns_to(tmp_path):
    values = [0.1, 0.5, 0.9, 0.3]
    assert run_with(tmp_path, values, 2).saving.best.step == 2
    killed = run_with(tmp_path, values, 3, save_every=100)  # step 3 is saved, as the last one is
    assert (killed.saving.best.value, killed.saving.best.step) == (0.9, 3)
    shutil.rmtree(killed.saving.store.path(3))
    back = trainer_in(tmp_path, train={"steps": 4, "best_metric": "score", "best_mode": "max"})
    assert (back.step, back.saving.best.value, back.saving.best.step) == (2, 0.5, 2)
    back.lock.release()
    again = run_with(tmp_path, values, 4)
    assert (again.saving.best.value, again.saving.best.step) == (0.9, 3)
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 3


def test_a_disk_full_while_the_best_is_written_leaves_the_one_before(tmp_path):
    values = [0.1, 0.5, 0.9, 0.3]
    assert run_with(tmp_path / "whole", values, 4).saving.best.step == 3
    run_with(tmp_path / "hurt", values, 2)
    before = exported(tmp_path / "hurt" / "best")
    hurt = trainer_in(
        tmp_path / "hurt",
        callbacks=lambda _: [(1, lambda step: {"score": values[step - 1]})],
        train={"steps": 4, "save_every": 2, "best_metric": "score", "best_mode": "max"},
    )

    def full(folder, _state):
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    hurt.saving.export = full
    with pytest.raises(UserError, match=r"step 3 cannot be saved in .*No space left.*: make room"):
        hurt.fit()
    kept = exported(tmp_path / "hurt" / "best")
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    assert json.loads((tmp_path / "hurt" / "best" / "best.json").read_text())["step"] == 2
    assert list((tmp_path / "hurt").glob(".*.tmp")) == []
    assert run_with(tmp_path / "hurt", values, 4).saving.best.step == 3
    assert_same_run(tmp_path / "hurt", tmp_path / "whole", 4)
    one, other = exported(tmp_path / "hurt" / "best"), exported(tmp_path / "whole" / "best")
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
