"""What a run records: its lines, events, pictures; and trackers through accelerate's own classes."""

import importlib.machinery
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState, tracking
from accelerate.tracking import GeneralTracker, register_tracker_class
from accelerate.utils import is_wandb_available

from edt_diffusion.training.log import MetricLog, read_events, read_log
from edt_diffusion.training.trackers import build_trackers, check_trackers, flat
from edt_diffusion.util.errors import UserError


def events_of(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return board


def test_events_stand_among_the_lines_and_are_read_apart(tmp_path):
    log = MetricLog(tmp_path, 0)
    log.write(1, {"loss": 0.5, "lr": math.nan})
    log.event(2, "skip", "the loss became nan")
    log.write(2, {"loss": 0.25})
    log.close()
    log.close()
    first, second = read_log(tmp_path)
    assert math.isnan(first.pop("lr"))
    assert [first, second] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert read_events(tmp_path) == [{"step": 2, "event": "skip", "message": "the loss became nan"}]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert (read_log(tmp_path / "none"), read_events(tmp_path / "none")) == ([], [])


def test_lines_after_the_restored_step_go_events_included(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
        log.event(step, "spike", "high")
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]  # the half line is passed over
    MetricLog(tmp_path, 2).close()
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    assert [line["step"] for line in read_events(tmp_path)] == [1, 2]


def test_a_run_that_goes_back_forgets_what_came_after(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    log.rewind(1)
    log.event(1, "rollback", "back to step 1")
    log.write(2, {"loss": 7.0})
    log.close()
    assert read_log(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 7.0}]
    assert [event["event"] for event in read_events(tmp_path)] == ["rollback"]
    assert [(e.step, e.value) for e in events_of(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 7.0)]


def test_a_line_damaged_in_the_middle_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step"\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"line 2 of .*log\.jsonl is damaged"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n\xff\xfe')
    assert len(read_log(tmp_path)) == 1


def test_pictures_and_events_reach_tensorboard(tmp_path):
    log = MetricLog(tmp_path, 0)
    picture = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    log.image("samples", 3, picture)
    log.image("gray", 3, picture[..., :1])
    log.event(4, "spike", "high")
    log.close()
    board = events_of(tmp_path)
    assert sorted(board.Tags()["images"]) == ["gray", "samples"]
    (shown,) = board.Images("samples")
    assert (shown.step, shown.width, shown.height) == (3, 5, 6)
    assert board.Tags()["tensors"] == ["events/text_summary"]


# ------------------------------------------------------------------------------------------- trackers


@pytest.fixture
def registry(monkeypatch):
    """accelerate's table of trackers, restored afterwards."""
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", dict(tracking.LOGGER_TYPE_TO_CLASS))


@pytest.fixture
def wandb(monkeypatch):
    """A module that stands in for wandb and remembers what it was told."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.runs = []

    class Run:
        def __init__(self, **arguments):
            self.arguments, self.lines, self.finished = arguments, [], False

        def log(self, values, step):
            self.lines.append((step, values))

        def finish(self):
            self.finished = True

    def init(**arguments):
        module.runs.append(Run(**arguments))
        return module.runs[-1]

    module.init = init
    module.settings = {}
    module.config = types.SimpleNamespace(update=lambda values, allow_val_change: module.settings.update(values))
    module.Image = lambda picture: ("image", picture.size, picture.mode)
    monkeypatch.setitem(sys.modules, "wandb", module)
    PartialState()  # as a trainer's accelerator has; accelerate's trackers ask it which process is the main one
    return module


CONFIG = {"seed": 1, "train": {"steps": 10, "trackers": ["wandb"]}, "model": {"size": None}}


def test_wandb_is_told_everything_and_keeps_one_run_across_resumes(tmp_path, wandb):
    log = MetricLog(tmp_path, 0, build_trackers(["wandb"], tmp_path, "small", CONFIG))
    log.write(5, {"loss": 0.5, "lr": math.inf})
    log.image("samples", 5, np.zeros((4, 8, 3), dtype=np.uint8))
    log.close()
    (run,) = wandb.runs
    identity = run.arguments.pop("id")
    assert run.arguments == {
        "project": "edt-diffusion", "name": "small", "resume": "allow", "dir": str(tmp_path),
    }  # fmt: skip
    assert run.lines == [(5, {"loss": 0.5}), (5, {"samples": [("image", (8, 4), "RGB")]})]
    assert run.finished
    assert wandb.settings == {"seed": 1, "train.steps": 10, "train.trackers": '["wandb"]', "model.size": "null"}
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": identity}
    MetricLog(tmp_path, 5, build_trackers(["wandb"], tmp_path, "small", CONFIG)).close()  # as a new process would
    (tmp_path / "other").mkdir()
    build_trackers(["wandb"], tmp_path / "other", "small", CONFIG)
    build_trackers(["wandb"], tmp_path / "other", "small", CONFIG, resume_id="mine")
    assert [run.arguments.get("id") == identity for run in wandb.runs[1:]] == [True, False, False]
    (tmp_path / "third").mkdir()
    build_trackers(["wandb"], tmp_path / "third", "small", CONFIG, resume_id="mine")
    assert wandb.runs[-1].arguments["id"] == "mine"


class Notebook(GeneralTracker):
    """A tracker of a user's own, through accelerate's public interface."""

    name = "notebook"
    requires_logging_directory = True
    made: list["Notebook"] = []

    def __init__(self, project, folder, run_id=None, fail_at=None):
        super().__init__()
        self.project, self.folder, self.run_id = project, folder, run_id
        self.told, self.settings, self.started = [], None, False
        Notebook.made.append(self)

    def start(self):
        self.started = True

    @property
    def tracker(self):
        return self.told

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        if step == 3:
            raise ConnectionError("the network\nis down")
        self.told.append((step, values))


def test_a_tracker_registered_with_accelerate_follows_the_run_until_it_fails(tmp_path, registry, caplog):
    register_tracker_class(Notebook)
    Notebook.made.clear()
    log = MetricLog(tmp_path, 0, build_trackers(["notebook", "notebook"], tmp_path, "small", CONFIG))
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log.image("samples", 4, np.zeros((4, 4, 1), dtype=np.uint8))
    log.close()
    (book,) = Notebook.made
    assert book.started
    assert (book.project, book.folder) == ("edt-diffusion", str(tmp_path))
    assert book.settings == flat(CONFIG)
    assert book.told == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]
    assert [record.message for record in caplog.records] == [
        "tracker notebook failed (the network is down): nothing more is sent to it"
    ]
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]
    build_trackers(["notebook"], tmp_path, "small", CONFIG)
    assert Notebook.made[1].run_id == book.run_id == json.loads((tmp_path / "trackers.json").read_text())["notebook"]


def test_a_class_registered_in_place_of_wandb_needs_no_wandb(tmp_path, registry):
    class Fake(Notebook):
        name = "wandb"

    with pytest.warns(UserWarning, match="already registered"):
        register_tracker_class(Fake)
    (tracker,) = build_trackers(["wandb"], tmp_path, "small", CONFIG)
    assert isinstance(tracker, Fake)


def test_an_identity_that_the_tracker_gives_is_kept(tmp_path, registry, monkeypatch):
    started = []

    def start_run(run_id=None, **arguments):
        started.append(run_id)
        info = types.SimpleNamespace(run_id=run_id or f"given-{len(started)}")
        return types.SimpleNamespace(info=info, **arguments)

    module = types.ModuleType("mlflow")
    module.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    module.utils = types.SimpleNamespace(validation=limits)
    module.search_experiments = lambda filter_string: []
    module.create_experiment = lambda **_: "1"
    module.start_run = start_run
    module.log_params = lambda values: None
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for _ in range(2):
        build_trackers(["mlflow"], tmp_path, "small", CONFIG)
    assert started == [None, "given-1"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wandbb", "unknown tracker 'wandbb'.*did you mean 'wandb'"),
        ("tensorboard", "tensorboard is written to the run folder anyway"),
        ("comet_ml", "comet_ml is not installed: run pip install comet-ml"),
    ],
)
def test_trackers_that_cannot_be(tmp_path, monkeypatch, name, words):
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    for call in (lambda: check_trackers([name]), lambda: build_trackers([name], tmp_path, "small", CONFIG)):
        with pytest.raises(UserError, match=words):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(is_wandb_available(), reason="wandb is installed")
def test_wandb_where_it_is_not_installed(tmp_path):
    with pytest.raises(UserError, match="wandb is not installed: run pip install wandb"):
        build_trackers(["wandb"], tmp_path, "small", CONFIG)


def test_a_tracker_that_does_not_start_is_one_line_and_ends_the_others(tmp_path, registry, wandb):
    class Broken(Notebook):
        name = "broken"

        def start(self):
            raise RuntimeError("no key:\n log in first")

    register_tracker_class(Broken)
    with pytest.raises(UserError, match=r"'broken' does not start \(no key: log in first\).*train.trackers"):
        build_trackers(["wandb", "broken"], tmp_path, "small", CONFIG)
    assert wandb.runs[0].finished
