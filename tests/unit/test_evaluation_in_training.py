"""Evaluation as a callback of the trainer: the same numbers on one process and two, and nothing is disturbed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import make_pictures, make_store, small_kl
from test_trainer import CLOCKS, assert_same_run, final_state, read_log, settings
from tiny_models import randomise

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.assemble import build_trainer
from edt_diffusion.assemble.evaluating import Request, evaluate
from edt_diffusion.assemble.evaluation_callback import evaluation_callback
from edt_diffusion.assemble.run_pictures import RunPictures
from edt_diffusion.data import open_images
from edt_diffusion.evaluation.extractors import open_extractor
from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.in_training import MetricsDuringTraining
from edt_diffusion.evaluation.metrics import METRICS
from edt_diffusion.evaluation.reference import Known
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.training.trainer import Trainer
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.rng import image_seed

EVALUATION = {
    "every": 2, "samples": 25, "extractor": "pixels", "num_inference_steps": 2, "guidance": 1.5, "batch_size": 6,
}  # fmt: skip
# A rate behind which every update vanishes.
STILL = {"lr": 1e-30, "eps": 1e-2}
# Everything that needs two processes, in one pair of them: their start takes most of the time.
WORKER = """
import os, sys, warnings
from pathlib import Path
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_evaluation_in_training as t
folder, pictures, source = map(Path, sys.argv[2:])
for sharding in ("none", "fsdp2"):
    t.still_run(folder / sharding, pictures, source, sharding)
torch.distributed.barrier()
os._exit(0)  # gloo may abort at interpreter exit
"""
KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_evaluation_in_training import long_run
long_run(Path(sys.argv[2]), Path(sys.argv[3]), kill_at=25).fit()
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), {"ant": 12, "bee": 8}, [(8, 8)])


def run_in(folder: Path, pictures: Path, callbacks: Any = None, dataset: Any = None, **changes: Any) -> Trainer:
    """A tiny run with an evaluation every two steps; `evaluation=None` is one without."""
    changed = {"data": {"path": str(pictures)} | changes.pop("data", {})}
    if changes.get("evaluation", {}) is not None:
        changed["evaluation"] = {**EVALUATION, **changes.pop("evaluation", {})}
    changes.pop("evaluation", None)
    config = settings(**changed, **changes)
    return build_trainer(config, folder, dataset, quiet=True, allow_changes=True, callbacks=callbacks)


@pytest.fixture(scope="module")
def source(tmp_path_factory, pictures) -> Path:
    """A model whose every weight matters, which is not so in a new one."""
    folder = tmp_path_factory.mktemp("source")
    trainer = run_in(folder / "run", pictures, evaluation=None)
    trainer.lock.release()
    randomise(trainer.network)
    trainer.saving.export(folder / "model", None)
    return folder / "model"


def callback_of(trainer: Trainer) -> MetricsDuringTraining:
    (found,) = (each.call for each in trainer.callbacks if isinstance(each.call, MetricsDuringTraining))
    return found


def written(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "evaluation" / f"step-{step:08d}.json").read_text())


def logged(folder: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in read_log(folder) if "fid" in line}


# ------------------------------------------------------------------------------------- several processes


def still_run(folder: Path, pictures: Path, source: Path, sharding: str = "none") -> None:
    """Two steps that change no weight, and an evaluation of 25 samples in five batches, the last of which is small."""
    trainer = run_in(
        folder, pictures, finetune={"model": str(source)}, optimizer=STILL,
        train={"steps": 2, "sharding": sharding, "save_every": 2},
    )  # fmt: skip
    assert trainer.fit()
    trainer.accelerator.wait_for_everyone()


@pytest.fixture(scope="module")
def two(tmp_path_factory, pictures, source) -> Path:
    """What two processes have done."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*launcher, str(Path(__file__).parent), str(folder), str(pictures), str(source)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "EDT_CACHE": str(folder / "cache")},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_processes_measure_what_one_measures(tmp_path, pictures, source, two, sharding):
    still_run(tmp_path / "one", pictures, source)
    one, other = written(tmp_path / "one", 2), written(two / sharding, 2)
    assert one["manifest"]["samples"]["sha256"] == other["manifest"]["samples"]["sha256"]
    assert one["manifest"]["reference"]["sha256"] == other["manifest"]["reference"]["sha256"]
    assert set(one["metrics"]) == set(other["metrics"]) == {"fid", "precision", "recall", "kid"}
    for name, numbers in one["metrics"].items():
        assert numbers["samples"] == 25
        for field in ("value", "low", "high"):
            assert other["metrics"][name][field] == pytest.approx(numbers[field], rel=1e-9, abs=1e-12)
        assert logged(two / sharding)[2][name] == other["metrics"][name]["value"]
    assert one["metrics"]["fid"]["value"] > 1  # and they are not the real ones


# ---------------------------------------------------------------------------------------- what is measured


def test_samples_are_those_of_their_seeds_and_labels(tmp_path, pictures, source):
    trainer = run_in(
        tmp_path / "run", pictures, finetune={"model": str(source)}, evaluation={"labels": "balanced", "seed": 5}
    )
    trainer.lock.release()
    call = callback_of(trainer)
    labels = [number % 2 for number in range(25)]
    assert call.samples.labels is not None
    assert call.samples.labels.tolist() == labels
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with trainer.saving.evaluating():
        values = call(2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    pipeline = ClassConditionalPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        labels, guidance_scale=1.5, num_inference_steps=2, seeds=[image_seed(5, number) for number in range(25)],
        output_type="uint8",
    ).images  # fmt: skip
    real = open_images(pictures, size=8, channels=1).images(np.arange(20))
    assert values["fid"] == pytest.approx(distance(made, real), rel=1e-4)


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Fréchet distance of gray 8x8 pictures as the extractor "pixels" sees them: 4 repeats of 3 channels."""
    a, b = (images.reshape(len(images), -1) / 255 for images in (ours, theirs))
    means = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    a, b = ((rows - rows.mean(axis=0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    traces = (a**2).sum() + (b**2).sum()
    return 12 * (means + traces - 2 * np.linalg.svd(a @ b.T, compute_uv=False).sum())


def test_modulation_is_that_of_the_settings_and_the_models_own_stays(tmp_path, pictures, source):
    made = {}
    for amm in ("off", "on", "3"):
        trainer = run_in(tmp_path / amm, pictures, finetune={"model": str(source)}, evaluation={"amm": amm})
        trainer.lock.release()
        trainer.network.set_attention_modulation([4], "cos")
        before = trainer.network.attention_modulation
        with trainer.saving.evaluating():
            callback_of(trainer)(2)
        assert trainer.network.attention_modulation == before
        assert trainer.network.attention_modulation.blocks == (4,)
        manifest = written(tmp_path / amm, 2)["manifest"]
        made[amm] = manifest["samples"]["sha256"]
        blocks = manifest["sampling"]["attention_modulation"] and manifest["sampling"]["attention_modulation"]["blocks"]
        assert blocks == {"off": None, "on": [3, 4], "3": [3]}[amm]
    assert len(set(made.values())) == 3


def test_half_precision_is_told(tmp_path, pictures):
    for precision, told in (("no", "fp32"), ("bf16", "bf16 autocast")):
        folder = tmp_path / precision
        assert run_in(folder, pictures, train={"steps": 2, "mixed_precision": precision}).fit()
        assert written(folder, 2)["manifest"]["sampling"]["precision"] == told


def test_a_part_of_the_pictures_is_a_reference_of_its_own(tmp_path, pictures):
    """A caller may hold out pictures that the settings do not speak of; what was kept of all is not taken for it."""
    everything = open_images(pictures, size=8, channels=1)
    folders, found = {"all": everything, "a few": everything.subset([0, 3, 5, 13, 14, 17, 19])}, {}
    folders["as many"] = everything.subset([1, 3, 5, 13, 14, 17, 19])
    for name, dataset in folders.items():
        trainer = run_in(tmp_path / name, pictures, dataset=dataset)
        trainer.lock.release()
        found[name] = callback_of(trainer).reference
    assert [known.features.count for known in found.values()] == [20, 7, 7]
    assert len({known.sha256 for known in found.values()}) == 3
    for name, known in found.items():
        rows = folders[name].images(np.arange(len(folders[name])))
        assert known.features.statistics.mean.mean() == pytest.approx(rows.mean() / 255, rel=1e-5)


def test_alike_folders_in_two_places_are_two_references(tmp_path):
    found = []
    for place, seed in (("a", 1), ("b", 2)):
        root = make_pictures(tmp_path / place / "set", {"ant": 4, "bee": 4}, [(8, 8)], seed=seed)
        for path in root.glob("*/*.png"):
            path.write_bytes(path.read_bytes().ljust(400, b"\0"))  # of one length: PNG ends where it says
            os.utime(path, ns=(10**18, 10**18))
        for part in (*root.iterdir(), root):
            os.utime(part, ns=(10**18, 10**18))
        trainer = run_in(tmp_path / f"run {place}", root)
        trainer.lock.release()
        found.append(callback_of(trainer).reference.sha256)
    assert found[0] != found[1]


# ------------------------------------------------------------------------------------------ too few pictures


@pytest.mark.parametrize("generated", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("real", [2, 3, 4, 6, 30])
def test_what_cannot_be_measured_is_told_before_the_training(generated, real):
    draws = np.random.default_rng(0)
    extractor = open_extractor("pixels", torch.device("cpu"))
    for known in (True, False):
        rows = draws.random((real, 768), np.float32)
        reference = FeatureSet(GaussianStatistics.of(rows), rows if known else None)
        pooled = draws.random((generated, 768), np.float32)
        made = FeatureSet(GaussianStatistics.of(pooled), pooled)
        for name in METRICS:
            call = MetricsDuringTraining(
                range(generated), extractor, Known(reference, "", {}, None), {"size": [8, 8]}, None, Path(), [name]
            )  # pyright: ignore[reportArgumentType]
            try:
                METRICS[name](made, reference, call.settings)
            except UserError:
                with pytest.raises(UserError, match=f"evaluation.samples={generated} cannot be measured: "):
                    call.check()
            else:
                call.check()


# --------------------------------------------------------------------------------- training is not disturbed


def test_weights_with_evaluations_are_those_without(tmp_path, pictures):
    """Masks, noise, dropout of labels, averages and the history of the timestep sampler included."""
    assert run_in(tmp_path / "off", pictures, evaluation=None).fit()
    assert run_in(tmp_path / "on", pictures).fit()
    (off, _), (on, _) = final_state(tmp_path / "off", 6), final_state(tmp_path / "on", 6)
    assert off.keys() == on.keys()
    assert [name for name in off if not torch.equal(off[name], on[name])] == []
    assert sorted(logged(tmp_path / "on")) == [2, 4, 6]
    assert logged(tmp_path / "off") == {}
    shown = [{k: v for k, v in line.items() if "loss" in k} for line in read_log(tmp_path / "on")]
    assert shown == [{k: v for k, v in line.items() if "loss" in k} for line in read_log(tmp_path / "off")]


def long_run(folder: Path, pictures: Path, kill_at: int = 0) -> Trainer:
    def killed(_pipeline):
        return [(kill_at, lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == kill_at else None)]

    return run_in(
        folder, pictures, killed, evaluation={"every": 8, "samples": 8},
        train={"steps": 40, "save_every": 20, "log_every": 3},
    )  # fmt: skip


@pytest.mark.slow
def test_forty_steps_equal_twenty_a_sigkill_and_twenty(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("test_trainer.CLOCKS", (*CLOCKS, "evaluation_seconds"))
    assert long_run(tmp_path / "straight", pictures).fit()
    script = tmp_path / "worker.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / "killed"), str(pictures)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "killed" / "evaluation").iterdir()) == [
        f"step-{step:08d}.json" for step in (8, 16, 24)
    ]
    resumed = long_run(tmp_path / "killed", pictures)
    assert resumed.step == 20
    assert resumed.fit()
    assert_same_run(tmp_path / "killed", tmp_path / "straight", 40)
    for step in (8, 16, 24, 32, 40):
        one, other = written(tmp_path / "killed", step), written(tmp_path / "straight", step)
        assert one["metrics"] == other["metrics"]
        assert one["manifest"]["samples"] == other["manifest"]["samples"]


# ------------------------------------------------------------------------------------------ the best weights


@pytest.mark.parametrize(
    ("changes", "metric", "best"),
    [
        ({}, "fid", 4),
        ({"train": {"best_metric": "precision", "best_mode": "max"}}, "precision", 6),
        ({"evaluation": {"metrics": ["recall"]}}, None, 0),
        ({"validation": {"share": 0.2, "every": 2}}, "val_loss", None),
    ],
)
def test_the_best_weights_are_those_of_the_metric(tmp_path, pictures, monkeypatch, changes, metric, best):
    series = {2: (5.0, 0.2), 4: (3.0, 0.1), 6: (4.0, 0.9)}
    monkeypatch.setattr(
        MetricsDuringTraining, "__call__", lambda _, step: dict(zip(("fid", "precision"), series[step], strict=True))
    )
    trainer = run_in(tmp_path, pictures, **changes)
    assert trainer.fit()
    assert trainer.config.best_metric == metric
    if metric is None:
        assert not (tmp_path / "best").exists()
        return
    facts = json.loads((tmp_path / "best" / "best.json").read_text())
    lines = {line["step"]: line[metric] for line in read_log(tmp_path) if metric in line}
    expected = best or min(lines, key=lambda step: lines[step])
    assert facts == {"metric": metric, "value": lines[expected], "step": expected}


# ---------------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("colours"), {"ant": 6, "bee": 6})


def small_store(folder: Path, colours: Path) -> Path:
    vae = small_kl()
    vae.save_pretrained(folder / "vae")
    make_store(colours, folder / "store", vae, flips="both", name=str(folder / "vae"))
    return folder / "store"


def test_latents_are_decoded_and_compared_with_pictures(tmp_path, colours):
    store = small_store(tmp_path, colours)
    data = {"size": 16, "channels": 3, "codec": str(tmp_path / "vae")}
    with pytest.raises(UserError, match=r"evaluation\.reference is not set: a latent store holds no pictures"):
        run_in(tmp_path / "run", store, data=data)
    assert not (tmp_path / "run").exists()
    wanted = {"reference": str(colours), "samples": 9, "batch_size": None}
    assert run_in(tmp_path / "run", store, data=data, train={"steps": 2}, evaluation=wanted).fit()
    ours = written(tmp_path / "run", 2)
    samples = ours["manifest"]["samples"]
    assert (samples["size"], samples["channels"], samples["count"], samples["batch"]) == ([16, 16], 3, 9, 9)
    assert ours["manifest"]["reference"]["size"] == [16, 16]
    request = Request(
        str(tmp_path / "run"), reference=str(colours), extractor="pixels", samples=9,
        sampling={"guidance": 1.5, "steps": 2, "amm": "off"}, out=tmp_path / "out", device="cpu",
    )  # fmt: skip
    (theirs,) = evaluate(request).results
    assert theirs.manifest["samples"]["sha256"] == samples["sha256"]
    assert ours["metrics"]["fid"]["value"] == pytest.approx(theirs.metrics["fid"]["value"], rel=1e-6)


def test_pictures_that_are_encoded_for_the_training_are_the_reference(tmp_path, colours):
    small_kl().save_pretrained(tmp_path / "vae")
    data = {"size": 16, "channels": 3, "codec": str(tmp_path / "vae")}
    trainer = run_in(
        tmp_path / "run", colours, data=data, validation={"share": 0.25}, train={"steps": 2}, evaluation={"samples": 9}
    )
    known = callback_of(trainer).reference
    assert trainer.fit()
    run = RunPictures.of(str(tmp_path / "run"))
    assert run is not None
    assert run.held_out is not None
    assert (len(run.training), len(run.held_out), known.features.count) == (8, 4, 8)
    pixels = run.training.images(np.arange(8))
    assert pixels.shape == (8, 16, 16, 3)
    assert known.features.statistics.mean.mean() == pytest.approx(pixels.mean() / 255, rel=1e-5)
    # The held-out pictures are those whose latents are.
    held = next(each.call.dataset for each in trainer.callbacks if type(each.call).__name__ == "ValidationLoss")
    whole = open_images(colours, size=16)
    places = [int(row) for row in held._rows]
    assert (run.held_out.images(np.arange(4)) == whole.images(places)).all()


def test_pictures_of_a_run_that_was_validated_on_others(tmp_path, colours):
    """With an autoencoder the pictures, and not their latents, are what is looked at."""
    small_kl().save_pretrained(tmp_path / "vae")
    other = make_pictures(tmp_path / "other", {"ant": 1, "bee": 2}, seed=9)
    config = settings(
        data={"path": str(colours), "size": 16, "channels": 3, "codec": str(tmp_path / "vae")},
        validation={"path": str(other)},
    )
    run = RunPictures.behind(config)
    assert run is not None
    assert run.held_out is not None
    assert (len(run.training), len(run.held_out), run.mirrored) == (12, 3, True)
    assert run.held_out.size == (16, 16)


# ----------------------------------------------------------------------------------------------------- nothing


def test_without_it_nothing_is_opened(pictures, monkeypatch):
    monkeypatch.setattr("edt_diffusion.assemble.evaluating.open_extractor", lambda *_: pytest.fail("opened"))
    config = settings(data={"path": str(pictures)})
    assert evaluation_callback(config, None, None, None, Path(), True) == []  # pyright: ignore[reportArgumentType]
