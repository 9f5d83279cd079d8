"""`edt profile` on a trained run and on a published size."""

import json

import pytest
from PIL import Image


def test_a_run_is_profiled(edt, run, work):
    said = edt("profile", run, "--steps", 2, "--batch-size", 2, "--repeats", 2)
    assert (said.code, said.err) == (0, [])
    assert said.out[-1] == "wrote profile/profile.json and profile/profile.png"
    assert max(map(len, said.out)) <= 80
    kinds = {line[7:].split("  ")[0] for line in said.out}
    assert {"attention", "MLP", "adaLN", "down-sampling", "up-sampling", "final layer", "other", "a pass"} <= kinds
    facts = json.loads((work / "profile/profile.json").read_text())
    assert sorted(facts) == ["forward", "machine", "memory", "sampling", "settings"]
    assert facts["settings"]["precision"] == "fp32"
    assert facts["sampling"]["passes"] == 4  # two steps, guided as `edt sample` does by default
    assert facts["forward"]["repeats"] == facts["forward"]["batch"] == 2
    with Image.open(work / "profile/profile.png") as picture:
        assert picture.format == "PNG"


def test_its_json_and_its_settings(edt, run, work):
    options = ("--precision", "bf16", "--cache", "fora", "--scheduler", "dpm++", "--guidance", 1, "--amm", "0")
    said = edt("profile", run, "--json", "--steps", 3, "--batch-size", 1, "--repeats", 1, "--out", "there", *options)
    assert (said.code, len(said.out)) == (0, 1)
    facts = json.loads(said.out[0])
    assert facts["out"] == ["there/profile.json", "there/profile.png"]
    assert facts["machine"]["dtype"] == "bfloat16"
    assert facts["settings"]["amm"] == "0"
    assert facts["sampling"]["passes"] == 3
    assert facts["sampling"]["scheduler"] == "DPMSolverMultistepScheduler"
    assert facts["sampling"]["blocks_skipped"] is not None


def test_a_published_size_quietly_and_without_sampling(edt, work):
    said = edt("profile", "EDT-S/2", "--size", 64, "--batch-size", 1, "--repeats", 1, "--no-sampling", "--quiet")
    assert (said.code, said.err) == (0, [])
    assert said.out == ["wrote profile/profile.json and profile/profile.png"]
    facts = json.loads((work / "profile/profile.json").read_text())
    assert facts["sampling"] is None
    assert facts["settings"]["image_size"] == "64"


@pytest.mark.parametrize(("arguments", "words"), [
    (("--precision", "fp61"), "error: unknown precision 'fp61'"),
    (("--cache", "taylr"), "did you mean 'taylor'"),
    (("--size", "64"), "has a size of its own"),
    (("--guidance", "inf"), "--guidance inf: expected a finite number"),
])  # fmt: skip
def test_mistakes_cost_one_line(edt, run, work, arguments, words):
    said = edt("profile", run, *arguments)
    assert said.code == 2
    assert len(said.err) == 1
    assert words in said.err[0]


def test_help(edt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = edt("profile", "--help")
    assert len(said.out) <= 40
    assert max(map(len, said.out)) <= 80
    assert said.out[-1].strip().startswith("Example: edt profile runs/a")
