"""Runs as their folders tell them, and the numbers that their curves are drawn from."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.cli.runs import runs as list_runs
from edt_diffusion.training.curves import draw_curves
from edt_diffusion.training.lock import RunLock
from edt_diffusion.training.panels import RunLog, smoothed
from edt_diffusion.training.runs import Best, describe_run, find_runs, locked
from edt_diffusion.util.errors import UserError

CONFIG = "model: {name: EDT, size: B}\nobjective: {name: flow}\ntrain: {steps: 40, batch_size: 8}\n"


def make_run(folder: Path, lines=(), checkpoints=(), config: str | None = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in checkpoints:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder


LINES = [
    {"step": 10, "loss": 3.0, "images_per_second": 5.0, "seconds": 16.0, "val_loss": 0.5},
    {"step": 20, "loss": 2.0, "images_per_second": 6.0, "seconds": 32.0, "val_loss": 0.3},
    {"step": 20, "event": "spike", "message": "high"},
    {"step": 30, "loss": None, "images_per_second": 7.0, "seconds": 48.0, "val_loss": 0.4},
]


def test_a_stopped_run(tmp_path):
    run = describe_run(make_run(tmp_path / "a", LINES, checkpoints=(10, 20)))
    assert (run.name, run.state, run.step, run.steps, run.checkpoints) == ("a", "stopped", 30, 40, [10, 20])
    assert (run.loss, run.val_loss, run.best) == (None, 0.4, Best("val_loss", 0.3, 20))
    assert (run.images_per_second, run.seconds) == (7.0, 48.0)
    assert (run.model, run.objective, run.problem) == ("EDT-B/2", "flow", None)
    assert run.size_bytes == sum(path.stat().st_size for path in (tmp_path / "a").rglob("*") if path.is_file())
    newest = max((tmp_path / "a" / name).stat().st_mtime for name in ("log.jsonl", "checkpoints", "config.yaml"))
    assert run.updated == newest
    assert json.loads(json.dumps(run.to_json(), allow_nan=False))["best"] == {
        "metric": "val_loss", "value": 0.3, "step": 20,
    }  # fmt: skip


def test_finished_is_what_has_its_last_step_saved_and_new_what_has_nothing(tmp_path):
    last = [{"step": 40, "loss": 1.0}]
    assert describe_run(make_run(tmp_path / "a", last, checkpoints=(20, 40))).state == "finished"
    assert describe_run(make_run(tmp_path / "b", last, checkpoints=(20,))).state == "stopped"
    assert describe_run(make_run(tmp_path / "c")).state == "new"


@pytest.mark.parametrize(
    ("steps", "share", "saved", "state", "told"),
    [
        (10**9, 0.64, 30, "stopped", "30 (64% of its time)"),
        (10**9, 1.00003, 30, "finished", "30 (100% of its time)"),
        (10**9, 1.00003, 20, "stopped", "30 (100% of its time)"),  # its last step is not saved
        (40, 0.75, 30, "stopped", "30/40"),
    ],
)
def test_a_run_that_a_budget_ends(tmp_path, capsys, steps, share, saved, state, told):
    config = CONFIG.replace("steps: 40", f"steps: {steps}")
    lines = [{"step": 30, "loss": 1.0, "budget_share": share}]
    run = describe_run(make_run(tmp_path / "a", lines, checkpoints=(saved,), config=config))
    assert (run.state, run.steps, run.budget_share) == (state, None if steps == 10**9 else 40, share)
    list_runs(tmp_path, sort="name", as_json=False)
    assert told in capsys.readouterr().out


def test_the_best_is_of_the_metric_that_the_run_is_judged_by(tmp_path):
    config = CONFIG.replace("batch_size: 8", "batch_size: 8, best_metric: fidelity, best_mode: max")
    lines = [{"step": s, "loss": 1.0, "fidelity": f} for s, f in ((10, 0.5), (20, 0.9), (30, 0.9), (40, None))]
    assert describe_run(make_run(tmp_path / "a", lines, config=config)).best == Best("fidelity", 0.9, 20)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("{size: edt-s/2}", "EDT-S/2"),
        ("{size: XL, patch_size: 4}", "EDT-XL/4"),
        ("{depths: [1, 1, 1]}", "EDT"),
        ("{}", "EDT-S/2"),
    ],
)
def test_models_are_named(tmp_path, model, name):
    assert describe_run(make_run(tmp_path, config=f"model: {model}\n")).model == name


def test_running_is_who_holds_the_lock_whichever_process_asks(tmp_path):
    run = make_run(tmp_path / "a", LINES)
    before = sorted(os.listdir(run))
    assert not locked(run)
    assert sorted(os.listdir(run)) == before  # no lock file is made
    with RunLock(run):
        assert locked(run)
        assert describe_run(run).state == "running"
        code = (
            "import sys; from edt_diffusion.training.runs import *; root = Path(sys.argv[1]);"
            "print(describe_run(root / 'a').state, find_runs(root)[0].name, 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["running", "a", "False"]  # and it is told without waiting for torch
        assert locked(run)  # asking has not taken it away
    assert not locked(run)
    with RunLock(run):  # nor is it kept
        pass
    assert describe_run(run).state == "stopped"


def test_what_is_damaged_is_said(tmp_path):
    run = make_run(tmp_path / "a", LINES, checkpoints=(10,), config="train: [")
    (run / "log.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    summary = describe_run(run)
    assert (summary.state, summary.step, summary.steps, summary.model) == ("stopped", 10, None, None)
    assert summary.problem is not None
    assert f"{run / 'config.yaml'} is not valid YAML; line 2 of {run / 'log.jsonl'} is damaged" in summary.problem
    (run / "config.yaml").unlink()
    assert "config.yaml cannot be read (No such file" in str(describe_run(run).problem)
    (run / "config.yaml").write_text("model: EDT\ntrain: {steps: many}\n")
    (run / "log.jsonl").unlink()
    odd = describe_run(run)
    assert (odd.steps, odd.problem) == (None, None)
    with pytest.raises(UserError, match="no run folder"):
        describe_run(tmp_path / "none")


def test_runs_are_found_three_levels_down_and_not_inside_runs(tmp_path):
    for name in ("a", "deep/er/b", "too/deep/for/us", ".hidden/c", "a/samples/d"):
        make_run(tmp_path / name, LINES)
    (make_run(tmp_path / "lost", LINES, checkpoints=(10,)) / "config.yaml").unlink()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "config.yaml").write_text("a: 1")
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["a", "deep/er/b", "lost"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(UserError, match="no folder"):
        find_runs(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------- curves


def test_the_smoothed_mean_is_that_of_its_formula():
    values = np.array([4.0, 1.0, math.nan, 2.0])
    weight = 0.5
    expected = [4.0, (2 + 1) / 1.5, math.nan, (0.5 + 0.25 + 2) / (0.125 + 0.25 + 1)]
    np.testing.assert_allclose(smoothed(values, weight), expected, rtol=1e-12)
    np.testing.assert_allclose(smoothed(np.full(50, 3.0), 0.99), 3.0, rtol=1e-12)
    np.testing.assert_array_equal(smoothed(values, 0.0), values)
    ramp = smoothed(np.arange(2000.0), 0.9)  # in the long run a ramp is followed w / (1 - w) points behind
    np.testing.assert_allclose(ramp[-1], 1999 - 9, rtol=1e-9)


def test_losses_by_timestep_are_means_over_the_last_tenth():
    lines = [{"step": s, "loss_full_t0": 100.0, "loss_full_t10": 100.0} for s in range(1, 19)]
    lines += [{"step": 19, "loss_full_t0": 1.0, "loss_full_t3": math.nan}, {"step": 20, "loss_full_t0": 3.0}]
    places, means = RunLog("a", lines, [], {}).at_the_end("loss_full")
    assert (places, means) == ([0.5 / 11], [2.0])
    assert RunLog("a", lines, [], {}).at_the_end("loss_masked") == ([], [])


class Drawn:
    """What `draw_curves` puts on its axes: every line of every panel, by title."""

    def __init__(self, monkeypatch):
        from matplotlib.figure import Figure

        self.panels = {}
        saved = Figure.savefig

        def savefig(figure, *arguments, **options):
            self.panels = {axis.get_title(): axis for axis in figure.axes}
            saved(figure, *arguments, **options)

        monkeypatch.setattr(Figure, "savefig", savefig)

    def line(self, title, number=-1):
        return self.panels[title].get_lines()[number].get_xydata()


@pytest.fixture
def drawn(monkeypatch):
    return Drawn(monkeypatch)


def test_hours_images_and_steps(tmp_path, drawn):
    lines = [
        {"step": 10, "lr": 1.0, "seconds": 3600.0},
        {"step": 15, "lr": 2.0},
        {"step": 20, "lr": 3.0, "seconds": 10800.0},
    ]
    run = make_run(tmp_path / "a", lines)
    out = tmp_path / "c.png"
    for x, places in (("step", [10, 15, 20]), ("images", [80, 120, 160]), ("hours", [1, 2, 3])):
        assert draw_curves([run], ["lr"], out, x=x) == ["lr"]
        np.testing.assert_allclose(drawn.line("learning rate"), np.transpose([places, [1, 2, 3]]))
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c.png"]  # no temporary file


def test_a_step_made_again_replaces_what_it_made_before(tmp_path, drawn):
    lines = [{"step": s, "lr": 1.0} for s in (1, 2, 3)] + [{"step": 2, "lr": 5.0}, {"step": 2, "val_loss": 4.0}]
    draw_curves([make_run(tmp_path / "a", lines)], ["lr"], tmp_path / "c.png")
    np.testing.assert_array_equal(drawn.line("learning rate"), [[1, 1], [2, 5]])


def test_nan_is_a_gap_and_events_are_marked(tmp_path, drawn):
    lines = [{"step": s, "loss": None if s == 2 else float(s)} for s in (1, 2, 3, 4)]
    lines.insert(2, {"step": 2, "event": "skip", "message": "m"})
    draw_curves([make_run(tmp_path / "a", lines)], ["loss"], tmp_path / "c.png", smooth=0.0)
    title = "training loss, all passes"
    np.testing.assert_array_equal(drawn.line(title, 0), [[1, 1], [2, math.nan], [3, 3], [4, 4]])
    assert drawn.line(title, 1)[0][0] == 2  # the triangle
    assert drawn.panels[title].get_yscale() == "log"
    draw_curves([tmp_path / "a"], ["loss"], tmp_path / "c.png", log_y=False)
    assert drawn.panels[title].get_yscale() == "linear"


def test_on_a_logarithmic_axis_the_mean_is_that_of_logarithms(tmp_path, drawn):
    lines = [{"step": s, "loss": 10.0**-s} for s in (1, 2, 3)]
    run = make_run(tmp_path / "a", lines)
    draw_curves([run], ["loss"], tmp_path / "c.png", smooth=0.5)
    line = drawn.line("training loss, all passes")
    np.testing.assert_allclose(np.log10(line[:, 1]), smoothed(np.array([-1.0, -2.0, -3.0]), 0.5))


def test_the_overview_of_one_run_and_of_two(tmp_path, drawn):
    lines = [
        {"step": s, "loss": 3.0, "loss_full": 1.0, "loss_masked": 2.0, "val_loss": 1.5, "grad_norm": 0.1, "lr": 1e-3,
         "images_per_second": 9.0, "loss_full_t0": 1.0, "loss_full_t1": 3.0, "loss_masked_t0": 2.0}
        for s in (1, 2, 3)
    ]  # fmt: skip
    one, two = make_run(tmp_path / "one", lines), make_run(tmp_path / "two", lines[:2])
    names = draw_curves([one], None, tmp_path / "c.png")
    assert names == [
        "loss_full", "loss_masked", "val_loss", "grad_norm", "lr", "images_per_second",
        "loss_full_t*", "loss_masked_t*",
    ]  # fmt: skip
    bins = "loss by timestep, end of the log"
    assert list(drawn.panels) == ["loss", "gradient norm", "learning rate", "images per second", bins]
    np.testing.assert_allclose(drawn.line(bins, 0), [[0.25, 1.0], [0.75, 3.0]])
    assert draw_curves([one, two], None, tmp_path / "c.svg") == names
    assert list(drawn.panels)[:3] == ["loss, full input", "loss, masked input", "validation loss"]
    assert len(drawn.panels[bins].get_lines()) == 4
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_a_log_of_other_metrics_is_drawn_all_the_same(tmp_path):
    run = make_run(tmp_path / "a", [{"step": 1, "fidelity": 0.5}, {"step": 2, "fidelity": None}])
    assert draw_curves([run], None, tmp_path / "c.png") == ["fidelity"]
    run = make_run(tmp_path / "b", [{"step": 1, "loss": None}])
    assert draw_curves([run], None, tmp_path / "c.png") == ["loss"]


@pytest.mark.parametrize(
    ("metrics", "options", "words"),
    [
        (["los"], {}, r"no metric 'los' in .*a: there are loss, loss_full_t0\.\.\. \(did you mean 'loss'\?\)"),
        (["loss"], {"x": "hour"}, "unknown horizontal axis 'hour'.*did you mean 'hours'"),
        (["loss"], {"x": "hours"}, "has logged no seconds"),
        (["loss"], {"x": "images"}, "lacks train.batch_size"),
    ],
)
def test_mistakes_in_what_is_asked_for(tmp_path, metrics, options, words):
    run = make_run(
        tmp_path / "a", [{"step": 1, "loss": 1.0, "loss_full_t0": 1.0, "loss_full_t1": 1.0}], config="a: 1\n"
    )
    with pytest.raises(UserError, match=words):
        draw_curves([run], metrics, tmp_path / "c.png", **options)
    assert not (tmp_path / "c.png").exists()


def test_runs_and_pictures_that_cannot_be(tmp_path):
    run, empty = make_run(tmp_path / "small", [{"step": 1, "loss": 1.0}]), make_run(tmp_path / "empty")
    for runs, out, words in (
        ([tmp_path / "smal"], "c.png", r"no run .*smal' \(did you mean .*small'\?\)"),
        ([tmp_path / "other" / "x"], "c.png", "no run .*name a folder that edt train wrote"),
        ([run, empty], "c.png", "empty has logged nothing yet"),
        ([run], "c.bmp2", "ending in .png, .pdf or .svg"),
        ([run], "small/log.jsonl/c.png", "cannot be used as a folder"),
    ):
        with pytest.raises(UserError, match=words):
            draw_curves(runs, None, tmp_path / out)
