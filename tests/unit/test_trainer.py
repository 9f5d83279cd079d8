"""The loop: exact resume, micro-batches, signals, logs, callbacks, and two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edt_diffusion.assemble import build_trainer
from edt_diffusion.config import RunConfig, parse_config
from edt_diffusion.data import ImageDataset
from edt_diffusion.training.log import MetricLog, read_log
from edt_diffusion.training.trainer import Trainer
from edt_diffusion.util.errors import UserError

CLOCKS = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def _one_thread():
    """Bitwise claims hold at an equal thread count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        tree[group] = {**tree.get(group, {}), **values}
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
    assert {name.split("/")[0] for name in tensors} == {"model", "ema", "optimizer", "timesteps"}
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


def test_a_second_signal_stops_at_once_and_keeps_the_last_save(tmp_path):
    def interrupt_twice(_pipeline):
        def call(step):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        return [(1, call)]

    trainer = trainer_in(tmp_path, callbacks=interrupt_twice, train={"save_every": 2})
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer_in(tmp_path).step == 2


def test_no_checkpoint_is_newer_than_the_model_beside_it(tmp_path):
    trainer = trainer_in(tmp_path, train={"steps": 1})

    def killed():
        raise KeyboardInterrupt

    trainer.export = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.store.steps() == []


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
        trainer._train_step(trainer.make_loader(0))
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
            average = trainers[0].ema.state_dict()["parameters"]
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
    average = trainer.ema.state_dict()["parameters"]
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
