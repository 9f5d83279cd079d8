"""`edt amm search` and `edt amm show` as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from edt_diffusion import ClassConditionalPipeline

# The run of these tests has 8x8 pictures and grids of 8x8, 4x4, 2x2, 4x4, 8x8, a block each.
SEARCH = (
    "--extractor", "pixels", "--metric", "kid", "--steps", "2", "--images", "4", "--batch-size", "4", "--confirm", "20",
    "--radii", "1R", "--formulas", "exp", "--guidance", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))


def test_search_of_a_run_needs_no_reference_and_ends_with_the_answer(edt, run, work):
    said = edt("amm", "search", run, *SEARCH)
    assert said.code == 0
    assert said.out[-1].startswith(("AMM off is best: ", "AMM stays off: ", "found "))
    assert any(line.startswith("rung 1:") and "4 pictures each" in line for line in said.out)
    assert any(line.startswith("cost: ") for line in said.out)
    folder = next((run / "amm").iterdir())
    assert {path.name for path in folder.iterdir()} == {"amm.json", "amm.md", "amm.png", "features", "question.json"}
    facts = json.loads((folder / "amm.json").read_text())
    assert {tuple(cell["block"] for cell in facts["landscape"]["cells"])} == {(0, 1, 3, 4)}
    found = ClassConditionalPipeline.from_pretrained(run).transformer.attention_modulation
    assert (None if found is None else found.to_config()) == facts["answer"]["setting"]
    again = edt("amm", "search", run, *SEARCH, "--json")
    assert (again.code, len(again.out)) == (0, 1)
    told = json.loads(again.out[0])
    assert {name: told[name] for name in facts} == facts
    assert told["out"] == [str(folder / name) for name in ("amm.json", "amm.md", "amm.png")]
    assert edt("sample", run, "-n", "1", "--steps", "2", "--out", work / "s").code == 0
    assert edt("train", run / "config.yaml", "--out", run, "--quiet").code == 0  # a finished run leaves it alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--blocks", "2"), "at least 3x3"),
        (("--blocks", "5"), "--blocks '5': expected numbers from 0 to 4"),
        (("--radii", "x"), "--radii 'x'"),
        (("--formulas", "tan"), "unknown attention modulation formula"),
        (("--metric", "fidd"), "did you mean 'fid'"),
        (("--scheduler", "dddim"), "did you mean 'ddim'"),
        (("--reference", "nowhere"), "nowhere"),
    ],
)
def test_a_mistake_is_one_line(edt, run, work, arguments, message):
    said = edt("amm", "search", run, *SEARCH, *arguments)
    assert (said.code, len(said.err)) == (2, 1)
    assert message in said.err[0]
    assert not (run / "amm").exists()


@pytest.mark.slow
def test_stopped_by_ctrl_c_it_says_so_and_goes_on(edt, run, tmp_path):
    out = tmp_path / "out"
    command = ["amm", "search", str(run), *SEARCH, "--steps", "200", "--images", "40", "--out", str(out), "--no-apply"]
    started = subprocess.Popen(
        [sys.executable, "-c", "from edt_diffusion.cli import main; main()", *command],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        until = time.monotonic() + 90
        while len(list(out.glob("features/*/*.npz"))) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130
    assert f"pictures in {out}; run the same command again to go on" in err.splitlines()[-1]
    kept = {path: path.read_bytes() for path in out.glob("features/*/*.npz")}
    assert kept
    assert not (out / "amm.json").exists()
    refused = edt(*command, "--seed", "1")
    assert (refused.code, "another seed" in refused.err[0]) == (2, True)
    assert {path: path.read_bytes() for path in kept} == kept


def test_show_of_a_run_and_of_a_size(edt, run, work):
    said = edt("amm", "show", run, "--blocks", "0,3", "--class", "tench", "--timestep", "500")
    assert (said.code, said.err) == (0, [])
    assert said.out[0] == "AMM 0+3 exp 1R (asked for)"
    assert said.out[-1] == "wrote amm/amm_show.json and amm/matrix.png and amm/attention.png"
    told = edt("amm", "show", "EDT-S/2", "--image-size", "512", "--out", "o", "--json")
    facts = json.loads(told.out[0])
    assert facts["setting"]["blocks"] == [10]
    assert [each["grid"] for each in facts["matrices"]] == [[32, 32]]
    assert round(100 * facts["matrices"][0]["zeroed"], 1) == 3.4
    assert facts["out"] == ["o/amm_show.json", "o/matrix.png"]
    wrong = edt("amm", "show", run, "--blocks", "0", "--heads", "a")
    assert (wrong.code, wrong.err) == (2, ["error: --heads a: expected numbers with commas between, such as 0,3"])


@pytest.mark.parametrize("command", ["search", "show"])
def test_help_fits_a_screen_and_ends_with_an_example(edt, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    said = edt("amm", command, "--help")
    assert (said.code, said.err) == (0, [])
    assert len(said.out) <= 40
    assert max(map(len, said.out)) <= 80
    assert said.out[-1].strip().startswith(f"Example: edt amm {command} ")
