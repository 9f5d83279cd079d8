"""The loop: exact resume, micro-batches, signals, logs, callbacks, and two processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edt_diffusion.assemble import build_trainer
from edt_diffusion.config import RunConfig, load_config, parse_config
from edt_diffusion.data import ImageDataset
from edt_diffusion.objectives.config import default_masks
from edt_diffusion.training.guards import scaler_skips
from edt_diffusion.training.lock import RunLock
from edt_diffusion.training.log import MetricLog, read_events, read_log
from edt_diffusion.training.trainer import Callback, Trainer
from edt_diffusion.util import files
from edt_diffusion.util.errors import UserError

CLOCKS = ("seconds", "images_per_second", "step_seconds", "data_wait_share", "mfu", "memory_gib")


pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count: int = 10, classes: int = 3) -> ImageDataset:
    """Random 8x8 gray pictures; more of them than a batch, so that batches straddle epochs."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return ImageDataset(
        lambda row: pixels[row],
        np.arange(count),
        size=(8, 8),
        channels=1,
        source="test",
        labels=np.arange(count) % classes,
        class_names=[f"class {label}" for label in range(classes)],
        cached=pixels,
    )


def settings(**changes) -> RunConfig:
    """A tiny run; `changes` are groups of settings that are merged in."""
    tree = {
        "seed": 3,
        "model": {"patch_size": 1, "depths": [1] * 5, "dims": [16] * 5, "num_heads": [2] * 5},
        "data": {"size": 8, "channels": 1, "flip": True},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.01, "decay_steps": 20, "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "train": {"steps": 6, "batch_size": 4, "log_every": 1, "save_every": 100, "sample_every": 0},
        "samples": {"per_class": 1, "num_inference_steps": 2},
    }
    for group, values in changes.items():
        another = group == "model" and "name" in values  # another backbone, with other arguments
        tree[group] = {**({} if another else tree.get(group, {})), **values}
    return parse_config(tree)


def trainer_in(folder: Path, callbacks=None, dataset=None, **changes) -> Trainer:
    """A trainer, its sampler warmed up if the run is new: 10,000 losses come together late in a real run only."""
    trainer = build_trainer(
        settings(**changes), folder, dataset or pictures(), quiet=True, allow_changes=True, callbacks=callbacks
    )
    sampler = trainer.objective.timesteps
    if trainer.step == 0 and sampler.num_timesteps == 1000 and "losses" in sampler.state_dict():
        losses = np.random.default_rng(1).uniform(0.01, 2.0, 10_000)
        sampler.update(np.tile(np.arange(1000), 10), losses)
        assert sampler.weights().std() > 0  # no longer uniform
    return trainer


def final_state(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Every tensor and number of a checkpoint, clocks left out."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    tensors = {f"{f.stem}/{k}": v for f in checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}
    numbers = json.loads((checkpoint / "state.json").read_text())
    numbers.pop("seconds")
    return tensors, numbers


def log_lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_log(folder)]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    (tensors, numbers), (expected, expected_numbers) = final_state(one, step), final_state(other, step)
    assert tensors.keys() == expected.keys()
    assert {name.split("/")[0] for name in tensors} >= {"model", "ema", "optimizer"}
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    assert numbers == expected_numbers
    assert log_lines(one) == log_lines(other)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_half_a_run_and_a_new_trainer_equal_the_whole_run_bitwise(tmp_path, optimizer):
    whole = trainer_in(tmp_path / "whole", optimizer={"name": optimizer})
    assert whole.fit() is True
    assert trainer_in(tmp_path / "half", optimizer={"name": optimizer}, train={"steps": 3}).fit() is True
    resumed = trainer_in(tmp_path / "half", optimizer={"name": optimizer})
    assert resumed.step == 3
    assert resumed.fit() is True
    assert_same_run(tmp_path / "half", tmp_path / "whole", 6)
    assert [line["step"] for line in log_lines(tmp_path / "half")] == [1, 2, 3, 4, 5, 6]
    # The six steps did something: each moved the weights, the history and the EMA.
    first = final_state(tmp_path / "half", 3)[0]
    last = final_state(tmp_path / "whole", 6)[0]
    assert all(not torch.equal(first[name], last[name]) for name in ("ema/proj_out.weight", "timesteps/seen"))


def test_an_interrupted_run_saves_stops_and_finishes_identically(tmp_path):
    assert trainer_in(tmp_path / "whole").fit()

    def interrupt(_pipeline):
        return [(2, lambda step: signal.raise_signal(signal.SIGINT) if step == 2 else None)]

    before = signal.getsignal(signal.SIGINT)
    stopped = trainer_in(tmp_path / "stopped", callbacks=interrupt)
    assert stopped.fit() is False
    assert stopped.step == 2
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["step-00000002"]
    assert (tmp_path / "stopped" / "model" / "model_index.json").is_file()
    assert trainer_in(tmp_path / "stopped").fit() is True  # as a new process would
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", 6)
    assert stopped.fit() is True  # and so does the same object, from the state it holds
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", 6)


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_signal_stops_at_once_and_keeps_the_last_save(tmp_path, before):
    def interrupt_twice(_pipeline):
        def call(step):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        return [(1, call)]

    trainer = trainer_in(tmp_path, callbacks=interrupt_twice, train={"save_every": 2})
    outside = signal.signal(signal.SIGINT, before)  # processes started in the background ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, outside)
    assert trainer_in(tmp_path).step == 2


def test_no_checkpoint_is_newer_than_the_model_beside_it(tmp_path):
    trainer = trainer_in(tmp_path, train={"steps": 1})

    def killed(*_arguments):
        raise KeyboardInterrupt

    trainer.saving.export = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.saving.store.steps() == []


def test_log_lines_after_the_restored_step_are_dropped(tmp_path):
    assert trainer_in(tmp_path / "whole").fit()
    assert trainer_in(tmp_path / "cut", train={"steps": 3}).fit()
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:  # a process that went on to step 5 and was killed there
        log.write('{"step": 4, "loss": 77.0}\n{"step": 5, "loss": 77.0}\n{"step": 6, "lo')
    assert trainer_in(tmp_path / "cut").fit()
    assert_same_run(tmp_path / "cut", tmp_path / "whole", 6)


def test_metric_log_appends_json_lines(tmp_path):
    log = MetricLog(tmp_path, 0)
    log.write(1, {"loss": 0.5})
    log.sync()
    log.write(2, {"loss": 0.25})
    log.close()
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    MetricLog(tmp_path, 1).close()
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert read_log(tmp_path / "nowhere") == []


def test_a_run_that_is_finished_changes_nothing(tmp_path):
    assert trainer_in(tmp_path).fit()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "tensorboard"}
    assert trainer_in(tmp_path).fit() is True
    assert {p: p.read_bytes() for p in before} == before


def test_micro_batches_change_neither_gradients_nor_timesteps(tmp_path):
    grads, histories, trainers = [], [], []
    for micro in (1, 2, 4):
        trainer = trainer_in(tmp_path / str(micro), train={"micro_batches": micro})
        torch.manual_seed(0)  # away from the initial zeros, which would hide most gradients
        with torch.no_grad():
            for parameter in trainer.network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        seen = {}
        zero_grad = trainer.optimizer.zero_grad

        def keep(set_to_none=True, seen=seen, trainer=trainer, zero_grad=zero_grad):
            seen |= {name: p.grad.clone() for name, p in trainer.network.named_parameters()}
            zero_grad(set_to_none)

        trainer.optimizer.zero_grad = keep
        trainer.update(0, trainer.make_loader(0))
        grads.append(seen)
        histories.append(trainer.objective.timesteps.state_dict())
        trainers.append(trainer)
    norm = torch.stack([g.norm() for g in grads[0].values()]).norm()
    assert norm > 0.1
    for other, history in zip(grads[1:], histories[1:], strict=True):
        difference = torch.stack([(other[name] - grads[0][name]).norm() for name in grads[0]]).norm()
        assert difference / norm < 1e-6
        np.testing.assert_array_equal(history["seen"], histories[0]["seen"])
        np.testing.assert_allclose(history["losses"], histories[0]["losses"], rtol=1e-5)
    assert histories[0]["seen"].sum() == 10_000 + 4
    for one, other in zip(weights(trainers[0]).values(), weights(trainers[1]).values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)  # Adan's first update amplifies tiny gradients


def test_both_losses_fall_when_four_pictures_are_learned_by_heart(tmp_path):
    steps = 120
    trainer = trainer_in(
        tmp_path,
        dataset=pictures(4, classes=2),
        data={"flip": False},
        optimizer={"lr": 5e-3, "schedule": "constant", "weight_decay": 0},
        objective={"timesteps": "uniform", "masks": {"down": [[0.2, 0.2], [0.0, 0.0]]}},
        train={"steps": steps, "batch_size": 16, "save_every": 1000},
    )
    assert trainer.fit()
    lines = read_log(tmp_path)
    for name in ("mse_plain_full", "mse_plain_masked"):
        values = [line[name] for line in lines]
        assert np.mean(values[:3]) == pytest.approx(1.0, abs=0.15)  # output 0 against noise of variance 1
        assert np.mean(values[-20:]) < 0.6
    assert [line["lr"] for line in lines[:3]] == [2.5e-3, 5e-3, 5e-3]  # warm-up over two steps
    assert all(line["grad_norm"] > 0 for line in lines)


def test_callbacks_see_the_ema_and_leave_the_training_as_it_was(tmp_path):
    trainers, seen = [], []

    def look(pipeline):
        def call(step):
            model = pipeline.transformer
            average = trainers[0].ema.state_dict()["groups"]["ema"]
            named = dict(model.named_parameters())
            seen.append((step, model.training, all(torch.equal(named[k], v) for k, v in average.items())))
            return {"answer": 42.0}

        return [(2, call), (0, lambda step: pytest.fail("0 means never"))]

    trainers.append(trainer_in(tmp_path / "watched", callbacks=look))
    assert trainers[0].fit()
    assert seen == [(2, False, True), (4, False, True), (6, False, True)]
    assert trainers[0].network.training
    assert trainer_in(tmp_path / "plain").fit()
    watched, plain = final_state(tmp_path / "watched", 6), final_state(tmp_path / "plain", 6)
    assert all(torch.equal(watched[0][name], plain[0][name]) for name in plain[0])
    tensors = watched[0]  # and the average differs from the weights, or the test could not fail
    assert not torch.equal(tensors["ema/proj_out.weight"], tensors["model/proj_out.weight"])
    answers = {line["step"]: line.get("answer") for line in read_log(tmp_path / "watched")}
    assert answers == {1: None, 2: 42.0, 3: None, 4: 42.0, 5: None, 6: 42.0}


def test_attention_modulation_acts_in_training_only_when_asked(tmp_path):
    modulation = {"attention_modulation": {"blocks": [0, 4], "formula": "exp", "radius": None}}
    plain, modulated = trainer_in(tmp_path / "off"), trainer_in(tmp_path / "on", model=modulation)
    asked = trainer_in(tmp_path / "asked", model=modulation, objective={"train_with_amm": True})
    assert modulated.network.attention_modulation is not None
    for trainer in (plain, modulated, asked):
        assert trainer.fit()
    ours = weights(plain)
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights(modulated).items())
    assert log_lines(tmp_path / "off") == log_lines(tmp_path / "on")
    assert any(not torch.equal(ours[name], tensor) for name, tensor in weights(asked).items())


def test_labelled_pictures_train_an_unconditional_model(tmp_path):
    trainer = trainer_in(tmp_path, model={"num_classes": None}, train={"steps": 1})
    assert trainer.fit()
    assert trainer.network.class_embedder is None


def test_sample_grids_and_the_model_folder_are_written(tmp_path):
    trainer = trainer_in(tmp_path, train={"steps": 4, "sample_every": 2, "save_every": 2, "keep_checkpoints": 1})
    assert trainer.fit()
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    exported = load_file(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    average = trainer.ema.state_dict()["groups"]["ema"]
    assert all(torch.equal(exported[name], tensor) for name, tensor in average.items())


def test_changed_settings_are_refused_and_a_checkpoint_that_does_not_fit_leaves_the_run_alone(tmp_path):
    assert trainer_in(tmp_path, train={"steps": 1}).fit()
    written = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"optimizer.lr: 0.003 -> 0.1.*--allow-changes"):
        build_trainer(settings(optimizer={"lr": 0.1}), tmp_path, pictures())
    with pytest.raises(UserError, match=r"another architecture: 0 tensors missing.*in this model"):
        trainer_in(tmp_path, model={"dims": [24, 16, 16, 16, 16]})
    for changes in ({"optimizer": {"name": "adamw"}}, {"objective": {"timesteps": "uniform"}}):
        with pytest.raises(UserError, match="does not fit this run"):
            trainer_in(tmp_path, **changes)
    assert (tmp_path / "config.yaml").read_bytes() == written
    assert build_trainer(settings(train={"steps": 2, "log_every": 9}), tmp_path, pictures()).step == 1  # harmless


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from edt_diffusion.training import state

    assert trainer_in(tmp_path, train={"steps": 2}).fit()
    trainer = trainer_in(tmp_path)

    def full(*_arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(UserError, match=r"step 6 cannot be saved in .*No space left on device.*make room"):
        trainer.fit()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert trainer_in(tmp_path).step == 2


def test_a_failed_write_of_another_kind_is_not_blamed_on_a_full_disk(tmp_path):
    trainer = trainer_in(tmp_path, train={"steps": 1})

    def denied(*_arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    trainer.saving.export = denied
    with pytest.raises(UserError, match="Permission denied") as caught:
        trainer.fit()
    assert "make room" not in str(caught.value)

    def quota(*_arguments):
        raise OSError(errno.EDQUOT, "too much of it")

    trainer.saving.export = quota
    with pytest.raises(UserError, match="make room"):
        trainer.fit()


# ------------------------------------------------------------------------------------------- runs that diverge


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.parent.name != "tensorboard"}


class Poison:
    """An objective whose loss is not a number in the steps that `bad` tells, as after a damaged picture."""

    def __init__(self, objective, bad):
        self.objective, self.timesteps, self.bad, self.calls = objective, objective.timesteps, bad, 0

    def __call__(self, *arguments, step, **options):
        part = self.objective(*arguments, step=step, **options)
        self.calls += 1
        if not self.bad(step):
            return part
        nan = float("nan")
        return replace(part, total=part.total * nan, sampler_loss=part.sampler_loss * nan)


def test_a_bad_step_is_left_out_and_nothing_else(tmp_path):
    trainer = trainer_in(tmp_path, optimizer={"schedule": "constant"})
    trainer.update.objective = Poison(trainer.objective, lambda step: step == 2)
    kept = {}

    def look(step):
        kept[step] = weights(trainer), trainer.ema.num_updates, trainer.optimizer.param_groups[0]["step"]

    trainer.callbacks.append(Callback(1, lambda step: look(step)))
    assert trainer.fit()
    assert [kept[step][1] for step in range(1, 7)] == [1, 2, 2, 3, 4, 5]
    assert [kept[step][2] for step in range(1, 7)] == [1, 2, 2, 3, 4, 5]
    assert all(torch.equal(kept[2][0][name], tensor) for name, tensor in kept[3][0].items())
    assert (trainer.guards.skipped, trainer.guards.in_row, trainer.guards.rollbacks) == (1, 0, 0)
    assert trainer.objective.timesteps.rejected == 0  # the history never saw it
    (event,) = read_events(tmp_path)
    assert (event["step"], event["event"]) == (3, "skip")
    assert event["message"] == "the loss became nan; the step was left out"
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert read_log(tmp_path)[-1]["skipped_steps"] == 1


def test_bad_steps_in_a_row_send_the_run_back_with_a_lower_rate(tmp_path):
    changes = {"optimizer": {"schedule": "constant", "warmup_steps": 0}, "train": {"save_every": 2, "steps": 8}}
    changes["train"]["max_skipped_steps"] = 3
    trainer = trainer_in(tmp_path / "hurt", **changes)
    trainer.update.objective = Poison(trainer.objective, lambda step: step >= 5 and not trainer.guards.rollbacks)
    assert trainer.fit()
    (event,) = [event for event in read_events(tmp_path / "hurt") if event["event"] == "rollback"]
    assert event["step"] == 4  # at step 6, a bad one, nothing was saved
    assert "at step 8: back here, with the learning rate times 0.5 (return 1 of 3)" in event["message"]
    rates = [line["lr"] for line in read_log(tmp_path / "hurt")]
    assert rates == pytest.approx([3e-3] * 4 + [1.5e-3] * 4)
    _, numbers = final_state(tmp_path / "hurt", 8)
    assert numbers["guards"]["rollbacks"] == 1
    assert numbers["guards"]["rate_factor"] == 0.5
    assert numbers["ema_updates"] == 8


def test_who_asks_for_a_stop_does_not_wait_for_pictures(tmp_path):
    called = []
    trainer = trainer_in(tmp_path)
    update = trainer.update

    def asked(step, batches):
        return replace(update(step, batches), stop=step == 2)

    trainer.update = asked
    trainer.callbacks = [Callback(3, called.append)]
    assert trainer.fit() is False
    assert called == []
    assert trainer.saving.saved_at == 3


def test_the_time_kept_back_holds_what_is_due(tmp_path):
    trainer = trainer_in(tmp_path, train={"steps": 5, "save_every": 2})
    trainer.callbacks = [Callback(2, lambda step: time.sleep(0.2))]
    update, seen = trainer.update, []

    def watched(step, batches):
        seen.append((step, update.reserve))
        return update(step, batches)

    class Watched:
        def __call__(self, step, batches):
            update.reserve = self.reserve
            return watched(step, batches)

    trainer.update = Watched()
    assert trainer.fit()
    reserves = dict(seen)
    assert reserves[0] == 0.0
    assert reserves[3] >= 0.2  # a callback follows step 4
    assert reserves[2] < reserves[3]


def test_a_bad_last_step_is_told_from_bad_weights(tmp_path):
    """The weights are sound: the run ends with them, and saves what the bad step left."""
    trainer = trainer_in(tmp_path, train={"steps": 4})
    trainer.update.objective = Poison(trainer.objective, lambda step: step == 3)
    assert trainer.fit()
    assert (trainer.guards.skipped, trainer.guards.rollbacks) == (1, 0)
    _, numbers = final_state(tmp_path, 4)
    assert numbers["ema_updates"] == 3


def test_weights_in_doubt_are_not_saved_until_a_good_step(tmp_path):
    trainer = trainer_in(tmp_path, train={"steps": 8, "save_every": 2, "keep_checkpoints": 9})
    trainer.update.objective = Poison(trainer.objective, lambda step: step in (3, 4))
    assert trainer.fit()
    assert trainer.saving.store.steps() == [2, 5, 6, 8]  # not 4, whose next step would be bad too


def test_without_a_checkpoint_the_run_goes_back_to_its_start(tmp_path):
    changes = {"optimizer": {"schedule": "constant", "warmup_steps": 0}, "train": {"steps": 4}}
    changes["train"]["max_skipped_steps"] = 2
    plain = trainer_in(tmp_path / "plain", **{**changes, "optimizer": {**changes["optimizer"], "lr": 1.5e-3}})
    assert plain.fit()
    trainer = trainer_in(tmp_path / "hurt", **changes)
    trainer.update.objective = Poison(trainer.objective, lambda step: step >= 2 and not trainer.guards.rollbacks)
    assert trainer.fit()
    # From the start again at half the rate, with the same draws: bit for bit the run at half the rate.
    (hurt, _), (expected, _) = final_state(tmp_path / "hurt", 4), final_state(tmp_path / "plain", 4)
    assert [name for name in expected if not torch.equal(hurt[name], expected[name])] == []


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_run_that_stays_bad_ends_before_it_is_saved(tmp_path, clip):
    assert trainer_in(tmp_path, train={"steps": 2}).fit()
    kept = {p: data for p, data in contents(tmp_path).items() if p.name not in ("config.yaml", "log.jsonl")}
    trainer = trainer_in(tmp_path, optimizer={"lr": 2.0}, train={"save_every": 100, "max_grad_norm": clip, "steps": 40})
    trainer.update.objective = Poison(trainer.objective, lambda step: True)
    remedy = r"lower train.max_grad_norm \(now 1\)" if clip else "set train.max_grad_norm"
    with pytest.raises(
        UserError,
        match=rf"^the loss became nan at step 7, after 3 returns to the last good state: lower optimizer.lr \(now 2\)"
        rf" or {remedy}; .* is step 2$",
    ):
        trainer.fit()
    assert trainer.update.objective.calls == 4 * 5
    assert {p: p.read_bytes() for p in kept} == kept
    assert [line["step"] for line in read_log(tmp_path) if "loss" in line] == [1, 2]


def test_a_gradient_that_is_no_number_is_not_applied(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.network.proj_out.weight.register_hook(lambda gradient: gradient / 0)
    before = weights(trainer)
    with pytest.raises(UserError, match=r"^the gradient norm became (nan|inf) at step 5, .*has no checkpoint yet$"):
        trainer.fit()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())
    assert not (tmp_path / "model").exists()
    assert trainer.saving.store.steps() == []


def test_weights_that_overflow_are_not_exported(tmp_path):
    trainer = trainer_in(tmp_path, train={"steps": 1})
    step = trainer.optimizer.step

    def overflow():
        step()
        trainer.network.proj_out.weight.data.fill_(torch.inf)

    trainer.optimizer.step = overflow
    with pytest.raises(UserError, match=r"^the weights became non-finite at step 1, after 3 returns"):
        trainer.fit()
    assert not (tmp_path / "model").exists()
    assert trainer.saving.store.steps() == []


def test_the_run_survives_one_overflow_of_the_weights(tmp_path):
    trainer = trainer_in(tmp_path, train={"steps": 3, "save_every": 1})
    step, calls = trainer.optimizer.step, []

    def overflow_once():
        step()
        calls.append(1)
        if len(calls) == 2:
            trainer.network.proj_out.weight.data.fill_(torch.inf)

    trainer.optimizer.step = overflow_once
    assert trainer.fit()
    assert len(calls) == 4
    assert trainer.guards.rollbacks == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())


def test_steps_that_a_loss_scaler_skips_are_not_the_end():
    class Scaler:
        scale = 65536.0

        def get_scale(self):
            return self.scale

    good, bad = torch.ones(3), torch.tensor([1.0, torch.inf])
    assert scaler_skips(Scaler(), [good, bad])
    assert not scaler_skips(Scaler(), [good])  # the norm alone overflowed: the scaler would apply it
    assert not scaler_skips(None, [bad])
    given_up = Scaler()
    given_up.scale = 2.0**-11
    assert not scaler_skips(given_up, [bad])


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    log = MetricLog(tmp_path, 0)
    log.write(1, {"loss": float("nan"), "speed": float("inf"), "lr": 0.5})
    log.close()
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": None, "speed": None, "lr": 0.5}
    (line,) = read_log(tmp_path)
    assert np.isnan(line["loss"])


def test_logged_metrics_are_means_since_the_last_line(tmp_path):
    assert trainer_in(tmp_path / "each").fit()
    assert trainer_in(tmp_path / "some", train={"log_every": 4}).fit()
    each, some = read_log(tmp_path / "each"), read_log(tmp_path / "some")
    assert [line["step"] for line in some] == [4, 6]
    for line, part in zip(some, (each[:4], each[4:]), strict=True):
        for name in ("loss", "loss_full", "vb_masked"):
            assert line[name] == pytest.approx(np.mean([other[name] for other in part]), rel=1e-5)
    assert each[3]["loss"] != pytest.approx(some[0]["loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------- the run folder


def test_a_second_process_is_kept_out(tmp_path):
    trainer = trainer_in(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=rf"another process is training in {tmp_path}: wait for it, or .* --out"):
        trainer_in(tmp_path, train={"log_every": 3})
    code = "import sys; from pathlib import Path; from edt_diffusion.training.lock import RunLock\n"
    code += "RunLock(Path(sys.argv[1])).acquire()"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "another process is training in" in other.stderr
    assert (tmp_path / "config.yaml").read_bytes() == before
    RunLock(tmp_path, active=False).acquire()  # as the other processes of the same job
    assert trainer.fit()
    RunLock(tmp_path).acquire()  # given back


def test_a_run_that_cannot_go_on_gives_the_lock_back(tmp_path):
    assert trainer_in(tmp_path, train={"steps": 1}).fit()
    with pytest.raises(UserError, match="does not fit this run") as caught:
        trainer_in(tmp_path, optimizer={"name": "adamw"})
    RunLock(tmp_path).acquire()
    assert caught.value  # its traceback still holds the trainer


def test_a_system_without_locks_does_without(tmp_path, monkeypatch):
    from edt_diffusion.util import lock

    monkeypatch.setattr(lock, "fcntl", None)
    for _ in range(2):
        RunLock(tmp_path).acquire()
    assert not (tmp_path / ".lock").exists()


def test_what_a_killed_process_left_is_cleared_away_and_a_lost_model_comes_back(tmp_path):
    assert trainer_in(tmp_path).fit()
    exported = contents(tmp_path / "model")
    os.rename(tmp_path / "model", tmp_path / ".model.0123456789abcdef.tmp")
    (tmp_path / "checkpoints" / ".step-00000006.0123456789abcdef.tmp").mkdir()
    files._temporary_sibling(tmp_path / "config.yaml").write_text("half")
    (tmp_path / ".mine.tmp").write_text("not one of ours")
    before = contents(tmp_path / "checkpoints")
    assert trainer_in(tmp_path).fit()
    assert contents(tmp_path / "model") == exported
    assert contents(tmp_path / "checkpoints") == before
    assert [p.name for p in tmp_path.rglob("*.tmp")] == [".mine.tmp"]


def test_other_pictures_are_refused(tmp_path):
    assert trainer_in(tmp_path, train={"steps": 1}).fit()

    def go_on(dataset, **options):
        trainer = build_trainer(settings(train={"steps": 1}), tmp_path, dataset, quiet=True, **options)
        trainer.lock.release()

    renamed, fewer, moved = pictures(), pictures(9), pictures()
    renamed.class_names = ["class 1", "class 0", "class 2"]
    moved.labels = moved.labels[::-1].copy()
    for dataset, words in (
        (renamed, "class 0: class 0 -> class 1"),
        (pictures(10, classes=4), "3 -> 4 classes; class 3: None -> class 3"),
        (fewer, "10 -> 9 pictures"),
        (moved, "other labels"),
    ):
        with pytest.raises(UserError, match=rf"other pictures \({words}\).*--allow-changes"):
            go_on(dataset)
    go_on(pictures())
    go_on(renamed, allow_changes=True)
    go_on(renamed)  # from now on these are the run's
    (tmp_path / "data.json").unlink()
    go_on(moved)  # a folder of an older version


def test_a_longer_run_keeps_its_schedule_and_a_shorter_one_its_settings(tmp_path):
    def run_to(steps):
        config = settings(optimizer={"decay_steps": None, "warmup_steps": 0}, train={"steps": steps})
        trainer = build_trainer(config, tmp_path, pictures(), quiet=True)
        assert trainer.fit()
        return trainer

    run_to(2)
    assert load_config(tmp_path / "config.yaml").optimizer.decay_steps == 2
    run_to(4)
    rates = [line["lr"] for line in read_log(tmp_path)]
    assert rates == pytest.approx([3e-3, (3e-3 + 5e-5) / 2, 5e-5, 5e-5])
    written = (tmp_path / "config.yaml").read_bytes()
    assert load_config(tmp_path / "config.yaml").train.steps == 4
    assert run_to(3).step == 4
    assert (tmp_path / "config.yaml").read_bytes() == written


def test_the_masks_a_run_uses_are_stored_with_it(tmp_path):
    trainer_in(tmp_path).lock.release()
    assert load_config(tmp_path / "config.yaml").objective.masks == default_masks({"depths": [1] * 5})


WORKER = """
import os, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_trainer import trainer_in
folder = Path(sys.argv[2])
# A large eps: with the usual one, Adan makes whole steps out of rounding errors where the true gradient is zero.
changes = {"optimizer": {"eps": 1e-2}, "train": {"steps": 4, "batch_size": 8, "micro_batches": int(sys.argv[3])}}
trainer = trainer_in(folder / "run", **changes)
trainer.fit()
state = trainer.objective.timesteps.state_dict()
world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
np.savez(folder / f"rank{rank}.npz", seen=state["seen"], losses=state["losses"], world=world)
trainer.accelerator.wait_for_everyone()
os._exit(0)  # gloo may abort at interpreter exit
"""


NAN_WORKER = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from edt_diffusion.util.errors import UserError
from test_trainer import trainer_in
settings = {"steps": 4, "batch_size": 8, "max_skipped_steps": 1, "max_rollbacks": 0}
trainer = trainer_in(Path(sys.argv[2]) / "run", train=settings)
rank, objective = trainer.accelerator.process_index, trainer.objective
class Poisoned:
    timesteps = objective.timesteps
    def __call__(self, *arguments, step, **options):
        part = objective(*arguments, step=step, **options)
        # Only one process sees it, and its gradients are sound.
        return replace(part, sampler_loss=part.sampler_loss * float("nan")) if rank == step == 1 else part
trainer.update.objective = Poisoned()
try:
    trainer.fit()
except UserError as error:
    (Path(sys.argv[2]) / f"rank{rank}.txt").write_text(str(error))
os._exit(0)
"""


@pytest.mark.slow
def test_all_processes_stop_when_one_diverges(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(NAN_WORKER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}.txt").read_text().startswith("the loss became nan at step 2: ")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent)
    results = {}
    for name, processes, micro in (("one", 1, 1), ("two", 2, 2)):
        folder = tmp_path / name
        folder.mkdir()
        launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [sys.executable, *launcher, str(script), here, str(folder), str(micro)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = final_state(folder / "run", 4)[0], [np.load(f) for f in sorted(folder.glob("rank*.npz"))]
    (one, (alone,)), (two, ranks) = results["one"], results["two"]
    assert [int(rank["world"]) for rank in ranks] == [2, 2]
    for key in ("seen", "losses"):
        np.testing.assert_array_equal(ranks[0][key], ranks[1][key])
    np.testing.assert_array_equal(ranks[0]["seen"], alone["seen"])
    np.testing.assert_allclose(ranks[0]["losses"], alone["losses"], rtol=1e-4)
    for key in (key for key in one if key.startswith(("model/", "ema/"))):
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)
