"""`edt train evaluation.every=N` as a user types it, and `edt evaluate RUN` on what it was trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.assemble import evaluating
from edt_diffusion.data import ImageDataset, open_images
from edt_diffusion.sampling.samples import Samples
from edt_diffusion.training.log import read_log

MEASURED = ("evaluation.every=2", "evaluation.extractor=pixels", "evaluation.num_inference_steps=2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    for name in ("EDT_INCEPTION", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def trained(edt, config, pictures, work):
    """`edt train` of the pictures into `run`, with more words; it must succeed unless `code` says otherwise."""

    def train(*words: object, data: object = pictures, run: str = "run", settings: object = config, code: int = 0):
        said = edt("train", settings, "--data", data, "--out", run, "--quiet", *words)
        assert said.code == code, said
        return said

    return train


def result_of(said) -> dict[str, Any]:
    assert said.code == 0, said
    (result,) = json.loads(said.out[-1])["results"]
    return result


def at_step(step: int, run: str = "run") -> dict[str, Any]:
    return json.loads(Path(run, "evaluation", f"step-{step:08d}.json").read_text())


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.slow
def test_what_is_logged_is_what_evaluate_finds_in_the_saved_model(edt, trained, work):
    more = ("data.limit=300", "evaluation.samples=60", "evaluation.batch_size=25", "evaluation.guidance=1.5")
    more += ("evaluation.seed=4", "evaluation.scheduler=dpm++", "optimizer.lr=0.01")
    quick = ("--extractor", "pixels", "-n", 60, "--steps", 2, "--guidance", 1.5, "--amm", "off", "--seed", 4)
    found = {}
    for step in (2, 4):
        trained(*MEASURED, *more, f"train.steps={step}", data="digits")
        said = edt(
            "evaluate", "run", *quick, "--scheduler", "dpm++", "--batch-size", 25, "--out", f"at-{step}",
            "--json", "--quiet",
        )  # fmt: skip
        found[step] = result_of(said)
    for step, theirs in found.items():
        ours = at_step(step)
        assert ours["manifest"]["model"] == {"step": step}
        assert ours["manifest"]["samples"] == theirs["manifest"]["samples"]
        assert ours["manifest"]["sampling"] == theirs["manifest"]["sampling"]
        assert ours["manifest"]["reference"] == theirs["manifest"]["reference"]
        assert set(ours["metrics"]) == set(theirs["metrics"]) == {"fid", "precision", "recall", "kid"}
        line = next(line for line in read_log(Path("run")) if line["step"] == step)
        assert line["evaluation_seconds"] > 0
        for name, numbers in theirs["metrics"].items():
            assert line[name] == pytest.approx(numbers["value"], rel=1e-6)
            assert ours["metrics"][name]["low"] == pytest.approx(numbers["low"], rel=1e-6)
        assert ours["warnings"] == theirs["warnings"] != []
    assert found[2]["manifest"]["samples"]["sha256"] != found[4]["manifest"]["samples"]["sha256"]
    compared = edt("compare", *sorted(Path("run/evaluation").glob("step*")), "at-2", "at-4", "--json")
    assert compared.code == 0
    facts = json.loads(compared.out[-1])
    assert (len(facts["groups"]), len(facts["groups"][0]), facts["reasons"]) == (1, 4, [])
    best = json.loads(Path("run/best/best.json").read_text())
    assert best["metric"] == "fid"
    assert best["value"] == min(at_step(step)["metrics"]["fid"]["value"] for step in (2, 4))


# --------------------------------------------------------------------------------- what a run was trained on


@pytest.fixture
def seen(monkeypatch) -> dict[str, set[bytes]]:
    """The pictures of each size of set, as bytes, that a training asks for."""
    found: dict[str, set[bytes]] = {}
    plain = ImageDataset.batch

    def watched(self, indices, epochs, seed, flip):
        found.setdefault(str(len(self)), set()).update(picture.tobytes() for picture in self.images(indices))
        return plain(self, indices, epochs, seed, flip)

    monkeypatch.setattr(ImageDataset, "batch", watched)
    return found


def as_set(dataset: ImageDataset) -> set[bytes]:
    return {picture.tobytes() for picture in dataset.images(np.arange(len(dataset)))}


def test_a_run_is_compared_with_what_it_learns_from_and_not_with_what_is_held_out(
    edt, trained, pictures, work, seen, monkeypatch
):
    trained("validation.share=0.25", "validation.every=4", *MEASURED, "evaluation.samples=6", "train.steps=6")
    assert {size: len(found) for size, found in seen.items()} == {"6": 6, "2": 2}  # learned from, and validated on
    assert not seen["6"] & seen["2"]
    for name in ("church", "tench"):  # the six by hand
        (work / "six" / name).mkdir(parents=True)
        for path in sorted((pictures / name).glob("*.png")):
            if np.asarray(Image.open(path)).tobytes() in seen["6"]:
                shutil.copy(path, work / "six" / name)
    given: list[Any] = []
    plain = evaluating.Judging
    monkeypatch.setattr(evaluating, "Judging", lambda *rest: (given.append(rest), plain(*rest))[1])
    quick = ("--extractor", "pixels", "-n", 6, "--steps", 2, "--metrics", "fid", "--json", "--quiet")
    ours = result_of(edt("evaluate", "run", *quick, "--judge", "--judge-by", "conv", "--out", "a"))
    theirs = result_of(edt("evaluate", "run", *quick, "--reference", "six", "--out", "b"))
    assert ours["manifest"]["reference"]["count"] == 6
    assert ours["manifest"]["reference"]["sha256"] == theirs["manifest"]["reference"]["sha256"]
    assert at_step(6)["manifest"]["reference"]["sha256"] == theirs["manifest"]["reference"]["sha256"]
    assert ours["metrics"] == theirs["metrics"]
    ((_, training, held_out, *_),) = given
    assert (as_set(training), as_set(held_out)) == (seen["6"], seen["2"])
    copies = ours["memorisation"]
    assert (copies["baseline"], copies["baseline_count"], copies["training"]) == ("held-out", 2, 6)
    assert at_step(6)["metrics"]["fid"]["value"] == pytest.approx(theirs["metrics"]["fid"]["value"], rel=1e-6)


def test_pictures_of_a_run_that_have_gone(edt, trained, pictures, work):
    shutil.copytree(pictures, "moving")
    shutil.copytree(pictures, "other")
    trained(data="moving")
    trained("validation.path=other", data=pictures, run="validated")
    shutil.move("moving", "moved")
    shutil.move("other", "others")
    quick = ("--extractor", "pixels", "-n", 4, "--steps", 2, "--quiet")
    for run, gone in (("run", "'moving'"), ("validated", "'other'")):
        said = edt("evaluate", run, *quick)
        assert (said.code, said.out, len(said.err)) == (2, [], 1), said
        for word in (f"{run} was trained on", f"{gone} does not exist", "name them by --reference", "--training"):
            assert word in said.err[0]
        assert not Path(run, "evaluation").exists()
        assert edt("evaluate", run, *quick, "--reference", "moved").code == 0
    assert edt("evaluate", "run", *quick, "--reference", "moved", "--judge").code == 2
    judged = ("--judge", "--judge-by", "conv", "--training", "moved")
    assert edt("evaluate", "run", *quick, "--reference", "moved", *judged).code == 0


# ------------------------------------------------------------------------------------------------- resuming


def test_evaluations_are_switched_on_and_off_on_the_way(edt, trained, work):
    trained("train.steps=2")
    assert "every: 0" in Path("run/config.yaml").read_text().partition("evaluation:")[2]
    own = "run/config.yaml"  # it names every setting, also those that do nothing
    trained("train.steps=4", settings=own)
    assert not Path("run/evaluation").exists()
    trained("train.steps=6", *MEASURED, "evaluation.samples=6", settings=own)
    assert [path.name for path in Path("run/evaluation").iterdir()] == ["step-00000006.json"]
    trained("train.steps=8", settings=own)
    assert len(list(Path("run/evaluation").iterdir())) == 2
    said = trained("train.steps=10", "evaluation.every=0", settings=own, code=2)
    assert "does nothing without evaluations" in said.err[0]
    assert "evaluation={}" in said.err[0]
    trained("train.steps=10", "evaluation={}", settings=own)
    assert len(list(Path("run/evaluation").iterdir())) == 2
    assert read_log(Path("run"))[-1]["step"] == 10


# ------------------------------------------------------------------------------------------------- mistakes

MISTAKES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("evaluation.extractor=incption",), ("unknown extractor 'incption'", "did you mean 'inception'?")),
    (("evaluation.metrics=[fdi]",), ("unknown metric 'fdi'", "did you mean 'fid'?")),
    (("evaluation.metrics=[is]",), ("is needs class scores",)),
    (("evaluation.metrics=[sfid]",), ("sfid needs spatial features",)),
    (("evaluation.labels=evenly",), ("evaluation.labels='evenly'", "balanced, random, reference")),
    (("evaluation.scheduler=dimm",), ("'dimm'", "did you mean 'ddim'?")),
    (
        ("evaluation.scheduler=euler",),
        ("evaluation.scheduler=euler cannot sample a model trained with objective.name=learned_variance",),
    ),
    (
        ("evaluation.scheduler=ddim", "objective.name=flow"),
        ("evaluation.scheduler=ddim", "objective.name=flow", "euler"),
    ),
    (("evaluation.num_inference_steps=1",), ("steps=1", "at least 2")),
    (("evaluation.num_inference_steps=2000",), ("evaluation.num_inference_steps=2000", "1000")),
    (("evaluation.guidance=-1",), ("evaluation.guidance=-1", "greater than or equal to 0")),
    (("evaluation.guidance=2", "model.num_classes=null"), ("guidance=2", "unconditional")),
    (("evaluation.amm=offf",), ("offf", "7,10")),
    (("evaluation.amm=99",), ("99",)),
    (("evaluation.samples=1",), ("evaluation.samples=1", "greater than or equal to 2")),
    (("evaluation.samples=2", "evaluation.metrics=[kid]"), ("evaluation.samples=2 cannot be measured", "at least")),
    (("evaluation.samples=3", "evaluation.metrics=[recall]"), ("evaluation.samples=3", "expected at least 4")),
    (("evaluation.batch_size=0",), ("evaluation.batch_size=0", "greater than or equal to 1")),
    (("evaluation.reference=nowhere",), ("'nowhere' does not exist",)),
    (("evaluation.reference=large.npz",), ("large.npz holds pictures of 16x16 pixels, and 8x8",)),
    (("evaluation.reference=moments.npz",), ("moments.npz holds statistics of 5 features", "768")),
    (("evaluation.reference=plain.npz", "evaluation.labels=reference"), ("'reference'", "no labels")),
    (("evaluation.evry=3",), ("unknown key 'evaluation.evry'", "'evaluation.every'")),
    (("evaluation.every=0",), ("evaluation.samples=8 does nothing", "evaluation.every")),
]


@pytest.fixture
def references(work) -> Path:
    draws = np.random.default_rng(0)
    np.savez(work / "large.npz", arr_0=draws.integers(0, 256, (8, 16, 16, 3), np.uint8))
    np.savez(work / "plain.npz", arr_0=draws.integers(0, 256, (8, 8, 8, 3), np.uint8))
    np.savez(work / "moments.npz", mu=np.zeros(5), sigma=np.eye(5))
    return work


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """Where batches of samples begin."""
    asked: list[int] = []
    plain = Samples.make
    monkeypatch.setattr(Samples, "make", lambda self, start, stop: (asked.append(start), plain(self, start, stop))[1])
    return asked


@pytest.mark.parametrize(("words", "told"), MISTAKES)
def test_mistakes_are_told_before_anything_is_made(trained, references, sampled, words, told):
    said = trained(*MEASURED, "evaluation.samples=8", *words, code=2)
    (line,) = said.err
    assert line.startswith("error: ")
    for word in told:
        assert word in line, line
    assert said.out == []
    assert not Path("run").exists()
    assert sampled == []


def test_what_the_mistakes_are_one_word_away_from(trained, references, sampled):
    trained(*MEASURED, "evaluation.samples=8", "evaluation.reference=plain.npz", "train.steps=2")
    assert sampled == [0]
    assert at_step(2)["manifest"]["samples"]["labels"] == "balanced"
    assert at_step(2)["manifest"]["reference"]["count"] == 8


def test_weights_of_inception_that_cannot_be_had(trained, work, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    said = trained("evaluation.every=2", "evaluation.samples=8", code=2)
    (line,) = said.err
    assert "pt_inception-2015-12-05" in line
    assert "EDT_INCEPTION" in line
    assert not Path("run").exists()


def test_a_reference_for_a_store_of_pixels(edt, trained, pictures, work):
    encoded = edt("encode", pictures, "--codec", "none", "--size", 8, "--channels", 1, "--out", "store", "--quiet")
    assert encoded.code == 0, encoded
    words = (*MEASURED, "evaluation.samples=6", "train.steps=2")
    said = trained(*words, data="store", code=2)
    assert "evaluation.reference is not set" in said.err[0]
    assert not Path("run").exists()
    trained(*words, f"evaluation.reference={pictures}", data="store")
    assert at_step(2)["manifest"]["reference"]["count"] == len(open_images(pictures, size=8)) == 8
