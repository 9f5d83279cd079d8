"""`edt runs` and `edt plot` on real runs."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def runs(work, run) -> Path:
    """Two finished runs of four steps and a damaged one, in runs/."""
    shutil.copytree(run, work / "runs" / "first")
    shutil.copytree(run, work / "runs" / "second")
    shutil.copytree(run, work / "runs" / "broken")
    Path("runs/second/log.jsonl").write_text('{"step": 3, "loss": 0.125}\n')
    Path("runs/broken/config.yaml").write_text("train: [")
    return work / "runs"


def test_runs_lists_them(edt, runs):
    said = edt("runs")
    assert (said.code, said.err) == (0, [])
    head, *rows = said.out
    assert head.split() == [
        "run", "state", "step", "loss", "validation", "best", "images/s", "trained", "size", "updated", "model",
    ]  # fmt: skip
    assert [row.split()[:2] for row in rows[:3]] == [
        ["broken", "damaged"],
        ["first", "finished"],
        ["second", "finished"],
    ]
    assert [row.split()[2] for row in rows[:3]] == ["4/?", "4/4", "4/4"]
    assert rows[3] == "broken: runs/broken/config.yaml is not valid YAML"
    column = head.index("loss") + len("loss")
    assert rows[2][:column].endswith(" 0.125")  # aligned with its title


def test_runs_as_json_and_in_other_orders(edt, runs):
    said = edt("runs", runs, "--json", "--sort", "loss")
    facts = json.loads(said.out[0])
    assert facts["runs"][0] | {"updated": 0, "size_bytes": 0} == {
        "name": "second", "path": str(runs / "second"), "state": "finished", "step": 4, "steps": 4,
        "budget_share": None, "loss": 0.125, "val_loss": None, "best": None, "images_per_second": None,
        "seconds": None, "checkpoints": [2, 4],
        "size_bytes": 0, "updated": 0, "model": "EDT", "objective": "learned_variance", "problem": None,
    }  # fmt: skip
    assert json.loads(edt("runs", "--sort", "updated", "--json").out[0])["runs"][0]["name"] == "broken"
    said = edt("runs", "--sort", "size")
    assert said.code == 2
    assert said.err == ["error: unknown order 'size': expected one of name, step, loss, updated"]


def test_no_runs(edt, work):
    said = edt("runs")
    assert said.code == 2
    assert said.err == ["error: there is no folder 'runs': name the folder that holds your runs, as runs/"]
    Path("runs").mkdir()
    assert edt("runs").out == ["no runs in runs: edt train makes them"]
    assert json.loads(edt("runs", "--json").out[0]) == {"folder": "runs", "runs": []}


def test_a_run_is_itself_a_folder_of_runs(edt, runs):
    assert edt("runs", "runs/first").out[1].split()[0] == "first"


def test_plot_of_one_run_goes_into_it(edt, runs):
    said = edt("plot", "runs/first")
    assert (said.code, said.err) == (0, [])
    assert said.out[0].startswith("drew loss_full, loss_masked, ")
    assert said.out[0].endswith(" to runs/first/curves.png")
    with Image.open("runs/first/curves.png") as picture:
        assert picture.width > 800


def test_plot_of_several_goes_where_one_is_or_is_told(edt, runs):
    said = edt("plot", "runs/first", "runs/second", "--metric", "loss", "--linear", "--smooth", 0, "--json")
    assert json.loads(said.out[0]) == {
        "out": "curves.png", "runs": ["runs/first", "runs/second"], "metrics": ["loss"], "x": "step", "smooth": 0.0,
    }  # fmt: skip
    with Image.open("curves.png") as picture:
        picture.verify()
    said = edt("plot", "runs/first", "--metric", "lr", "--metric", "grad_norm", "--x", "hours", "--out", "new/c.svg")
    assert said.out == ["drew lr, grad_norm to new/c.svg"]
    assert Path("new/c.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing argument 'RUN'"),
        (("runs/frst",), "no run 'runs/frst' (did you mean 'runs/first'?)"),
        (("first",), "no run 'first' (did you mean 'runs/first'?)"),
        (("runs/first", "--metric", "los"), "no metric 'los' in runs/first: there are loss, "),
        (("runs/first", "--smooth", "1"), "'--smooth'"),
        (("runs/first", "--out", "c.txt2"), "c.txt2"),
    ],
)
def test_mistakes_of_plot(edt, runs, arguments, words):
    said = edt("plot", *arguments)
    assert (said.code, said.out, len(said.err)) == (2, [], 1)
    assert words in said.err[0]


@pytest.mark.parametrize("command", ["runs", "plot"])
def test_help(edt, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    said = edt(command, "--help")
    assert (said.code, said.err) == (0, [])
    assert len(said.out) <= 40
    assert max(map(len, said.out)) <= 80
    assert said.out[-1].split()[:3] == ["Example:", "edt", command]
