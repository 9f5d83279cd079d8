import json

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.assemble.facts import model_facts
from edt_diffusion.data.codec import to_uint8
from edt_diffusion.pipelines.loading import load_pipeline

QUICK = ("--steps", 2, "--quiet")


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_frames_strip_and_film(edt, run, work):
    said = edt("interpolate", run, "--classes", "church,tench", "--seeds", "1,2", "--frames", 4, *QUICK, "--out", "way",
               "--batch-size", 1, "--json")  # fmt: skip
    assert (said.code, said.err) == (0, [])
    facts = json.loads(said.out[-1])
    assert facts["positions"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert facts["scheduler"] == "ddim"
    files = [f"frame-{index:04d}.png" for index in range(4)]
    assert sorted(path.name for path in (work / "way").iterdir()) == [*files, "interpolation.gif", "strip.png"]
    pipeline = load_pipeline(run)
    pipeline.set_progress_bar_config(disable=True)
    for name, seed, frame in (("church", 1, 0), ("tench", 2, 3)):
        expected = pipeline(
            [name], seeds=[seed], guidance_scale=2.0, scheduler="ddim", num_inference_steps=2, output_type="pt"
        ).images
        assert (pixels(work / "way" / files[frame]) == to_uint8(expected)[0, ..., 0]).all()
    # Pictures of 8 pixels are drawn eight times as large, with gaps of two.
    assert pixels(work / "way" / "strip.png").shape == (68, 4 * 66 + 2, 3)
    with Image.open(work / "way" / "interpolation.gif") as film:
        assert film.n_frames == 6  # there and back, the ends once
        assert film.info["loop"] == 0
    notes = json.loads(Image.open(work / "way" / files[1]).text["edt-diffusion"])
    assert (notes["position"], notes["seeds"], notes["classes"]) == (pytest.approx(1 / 3), [1, 2], ["church", "tench"])


def test_a_shorter_way_leaves_no_frames_of_the_longer_and_info_tells_it(edt, run, work):
    for frames in (5, 3):
        assert edt("interpolate", run, "--classes", "1,0", "--frames", frames, *QUICK).code == 0
    names = [f"frame-{index:04d}.png" for index in range(3)]
    left = sorted(path.name for path in (work / "interpolation").iterdir())
    assert left == [*names, "interpolation.gif", "strip.png"]
    file = f"interpolation/{names[1]}"
    facts = json.loads(edt("info", file, "--json").out[-1])
    pipeline = load_pipeline(run)
    assert (facts["what"], facts["picture"], facts["labels"]) == ("interpolate", file, [1, 0])
    assert facts["classes"] == [pipeline.class_names[1], pipeline.class_names[0]]
    assert facts["model"] == model_facts(pipeline, run.name)
    assert (facts["precision"], facts["batch"], facts["attention_modulation"]) == ("fp32", 16, None)
    shown = edt("info", file).out
    assert f"{'position':<14} 0.5" in shown
    assert f"{'made with':<14} interpolate" in shown
    assert not any(line.startswith(("class ", "seed ", "again")) for line in shown)


def test_one_seed_for_several_classes_and_one_class_for_several_seeds(edt, run, work):
    said = edt("interpolate", run, "--classes", "1,0,1", "--frames", 3, *QUICK)
    assert said.code == 0
    assert said.out[-1].startswith("wrote 5 frames, strip.png and interpolation.gif to interpolation (")
    first = pixels(work / "interpolation" / "frame-0000.png")
    assert (first == pixels(work / "interpolation" / "frame-0004.png")).mean() > 0.98  # the same key point
    said = edt("interpolate", run, "--classes", "church", "--seeds", "1,2,3", "--frames", 2, *QUICK, "--out", "b")
    assert said.out[-1].startswith("wrote 3 frames")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "2 classes: say which with --classes"),
        (("--classes", "church"), "one key point"),
        (("--classes", "church,tench", "--seeds", "1,2,3"), "2 classes and 3 seeds"),
        (("--classes", "church,tenhc"), "did you mean 'tench'"),
        (("--classes", "church,tench", "--seeds", "1,x"), "--seeds '1,x'"),
        (("--classes", "church,tench", "--seeds", "-1,2"), "--seeds '-1,2'"),
        (("--classes", "church,tench", "--seeds", "1,2", "--scheduler", "ddpm"), "draws noise at every step"),
        (("--classes", "church,tench", "--frames", 1), "--frames"),
        (("--classes", "church,tench", "--guidance", "inf"), "--guidance inf"),
        (("--classes", "church,tench", "--device", "nowhere"), "--device nowhere"),
        (("--classes", "church,tench", "--precision", "fp7"), "fp7"),
    ],
)
def test_mistakes_are_one_line(edt, run, work, options, words):
    said = edt("interpolate", run, *options, "--quiet")
    assert said.code == 2
    assert len(said.err) == 1
    assert words in said.err[0]
    assert not list(work.iterdir())


def test_help_fits_a_screen_and_ends_with_an_example(edt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = edt("interpolate", "--help")
    assert said.code == 0
    assert len(said.out) <= 40
    assert max(map(len, said.out)) <= 80
    assert said.out[-1].split()[:3] == ["Example:", "edt", "interpolate"]
