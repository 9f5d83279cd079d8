"""A sweep of settings in one folder: what is done stays done, and what does not belong there is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_diffusion.evaluation import sweep
from edt_diffusion.evaluation.extractors.base import Extractor, Features
from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.measure import choose_metrics, left_out, measure, possible_metrics
from edt_diffusion.evaluation.metrics import MetricSettings
from edt_diffusion.evaluation.reference import Known
from edt_diffusion.evaluation.result import Result
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.evaluation.sweep import Evaluation, partners
from edt_diffusion.sampling.settings import SamplingSetting, parse_sweep
from edt_diffusion.util.errors import UserError

COUNT = 60
SETTINGS = MetricSettings(replicates=20)


class Means(Extractor):
    """The mean of each channel."""

    name, sha256, preprocessing, dimensions = "means", "5" * 64, "none", 3

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images.float().mean(dim=(2, 3)) / 255)


class Made:
    """Stands for `Samples`: noise whose brightness is the guidance; writes down what was made."""

    def __init__(self, guidance: float, stops_at: int | None = None) -> None:
        self.setting = SamplingSetting(guidance=guidance)
        self.batch, self.made, self.stops_at = 16, [], stops_at

    def make(self, start: int, stop: int):
        if self.stops_at is not None and start >= self.stops_at:
            raise KeyboardInterrupt
        self.made.append(start)
        draws = [np.random.default_rng(number).random((4, 4, 3)) for number in range(start, stop)]
        return np.rint(np.stack(draws) * 100 + 20 * self.setting.guidance).astype(np.uint8), 0.25

    def facts(self):
        return {"guidance": self.setting.guidance}


def plan(*guidances: float) -> list[Made]:
    return [Made(guidance) for guidance in guidances]


def reference() -> Known:
    rows = (np.random.default_rng(9).random((200, 3)) * 0.1 + 0.3).astype(np.float32)
    return Known(FeatureSet(GaussianStatistics.of(rows), rows), "6" * 64, {"from": "real/", "count": 200}, None)


def evaluation(out: Path, metrics=("fid",), seed=0, **options) -> Evaluation:
    facts = {"count": COUNT, "labels": "none", "seed": seed, "size": [4, 4], "channels": 3, "preparation": "none"}
    model = {"from": "here", "transformer_sha256": "7" * 64}
    return Evaluation(out, Means(), reference(), facts, model, list(metrics), SETTINGS, None, **options)


def numbers(results: list[Result]) -> dict[str, float]:
    return {result.label: result.metrics["fid"]["value"] for result in results}


def test_numbers_are_those_of_the_pictures(tmp_path):
    results = evaluation(tmp_path).run(plan(1, 3))
    for result, made in zip(results, plan(1, 3), strict=True):
        rows = made.make(0, COUNT)[0].reshape(COUNT, -1, 3).mean(axis=1).astype(np.float64) / 255
        mean, covariance = rows.mean(axis=0), np.cov(rows.T)
        theirs = reference().features.pooled.astype(np.float64)
        other = np.cov(theirs.T)
        root = np.linalg.eigvals(covariance @ other).astype(complex) ** 0.5
        expected = ((mean - theirs.mean(axis=0)) ** 2).sum() + np.trace(covariance + other) - 2 * root.sum().real
        assert result.metrics["fid"]["value"] == pytest.approx(expected, rel=1e-4)
        assert result.seconds_per_image == pytest.approx(0.25 / 16)  # a batch; the last one was padded
        assert result.manifest["sampling"] == {"guidance": made.setting.guidance}
        assert result.manifest["reference"]["sha256"] == "6" * 64
        assert Result.load(tmp_path / f"guidance-{made.setting.guidance:g}_amm-saved.json") == result
    assert results[0].against is None
    assert list(results[1].against) == ["guidance"]
    against = results[1].against["guidance"]
    assert (against["to"], against["label"]) == ("guidance=1", results[0].label)
    values = [result.metrics["fid"]["value"] for result in results]
    assert against["difference"] == pytest.approx(values[1] - values[0])
    assert against["low"] < against["difference"] < against["high"]


def test_a_stopped_sweep_goes_on_and_ends_with_the_same_table(tmp_path):
    whole = evaluation(tmp_path / "whole").run(plan(1, 2, 3))
    stopped = plan(1, 2, 3)
    stopped[1].stops_at = 32
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path / "stopped").run(stopped)
    assert [made.made for made in stopped] == [[0, 16, 32, 48], [0, 16], []]
    rest = plan(1, 2, 3)
    assert numbers(evaluation(tmp_path / "stopped").run(rest)) == numbers(whole)
    assert [made.made for made in rest] == [[], [32, 48], [0, 16, 32, 48]]
    tables = [(tmp_path / name / "table.csv").read_text() for name in ("whole", "stopped")]
    assert tables[0] == tables[1]


def test_what_is_finished_is_not_touched_again(tmp_path):
    evaluation(tmp_path).run(plan(1, 2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    again = plan(1, 2)
    extractor = Means()
    extractor.__class__ = type("Silent", (Means,), {"__call__": None})
    one = evaluation(tmp_path)
    one.extractor = extractor
    assert len(one.run(again)) == 2
    assert [made.made for made in again] == [[], []]
    assert {path: path.read_bytes() for path in before} == before


def test_a_longer_sweep_adds_rows(tmp_path):
    first = evaluation(tmp_path).run(plan(1, 2))
    longer = plan(1, 2, 4)
    results = evaluation(tmp_path).run(longer)
    assert [made.made for made in longer] == [[], [], [0, 16, 32, 48]]
    assert results[:2] == first
    assert results[2].against["guidance"]["label"] == first[0].label
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 4


def test_differences_are_from_the_first_of_the_sweep_that_was_asked_for(tmp_path):
    evaluation(tmp_path).run(plan(1, 2))
    results = evaluation(tmp_path).run(plan(2, 1))
    values = list(numbers(results).values())
    assert results[0].against is None
    assert results[1].against["guidance"]["label"] == "guidance=2 amm=saved"
    assert results[1].against["guidance"]["difference"] == pytest.approx(values[1] - values[0])


def test_settings_are_compared_along_each_axis_with_all_else_equal():
    settings, _ = parse_sweep(["guidance=1,2", "amm=off,on", "steps=5,9"], {})
    found = {setting.label(): partners(setting, settings) for setting in settings}
    assert found["guidance=1 amm=off steps=5"] == {}
    assert {axis: to.label() for axis, to in found["guidance=2 amm=on steps=9"].items()} == {
        "guidance": "guidance=1 amm=on steps=9",
        "amm": "guidance=2 amm=off steps=9",
        "steps": "guidance=2 amm=on steps=5",
    }
    assert {axis: to.label() for axis, to in found["guidance=2 amm=off steps=5"].items()} == {
        "guidance": "guidance=1 amm=off steps=5"
    }


def test_a_metric_that_is_added_later_needs_no_new_samples(tmp_path):
    evaluation(tmp_path).run(plan(1, 2))
    again = plan(1, 2)
    results = evaluation(tmp_path, ["kid"]).run(again)
    assert [made.made for made in again] == [[], []]
    assert [list(result.metrics) for result in results] == [["fid", "kid"]] * 2
    assert "kid" in (tmp_path / "table.csv").read_text().splitlines()[0]
    assert [list(Result.load(path).metrics) for path in tmp_path.glob("guidance*.json")] == [["fid", "kid"]] * 2


def test_where_a_model_lies_does_not_make_other_samples(tmp_path):
    evaluation(tmp_path).run(plan(1, 2))
    moved = evaluation(tmp_path)
    moved.model = {**moved.model, "from": "/elsewhere"}
    again = plan(1, 2, 3)
    results = moved.run(again)
    assert [made.made for made in again] == [[], [], [0, 16, 32, 48]]
    assert results[2].against["guidance"]["to"] == "guidance=1"


def test_large_sets_are_kept_only_where_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_SMALL_BYTES", 0)
    plain = evaluation(tmp_path)
    first = plain.run(plan(1))
    assert not list(tmp_path.rglob("extra_pictures.npy"))
    # For pictures they are made again, once; features for another metric are there in either place.
    full, made = evaluation(tmp_path, ["fid", "kid"], needs_pictures=True), plan(1)
    assert numbers(full.run(made)) == numbers(first)
    assert made[0].made == [0, 16, 32, 48]
    pictures = full.gather(full.parts(made[0]), made[0].make, "").extras["pictures"]
    assert np.array_equal(pictures, Made(1).make(0, COUNT)[0])
    made = plan(1)
    evaluation(tmp_path, ["precision"]).run(made)
    assert made[0].made == []
    full.tidy(plan(1))  # features stay, pictures do not
    assert not list(tmp_path.rglob("extra_pictures.npy"))
    made = plan(1)
    evaluation(tmp_path, ["coverage"]).run(made)
    assert made[0].made == []
    again, made = (
        evaluation(tmp_path, ["density"], needs_pictures=True),
        plan(1),
    )  # whoever needs them has them made anew
    again.run(made)
    assert made[0].made == [0, 16, 32, 48]
    pictures = again.gather(again.parts(made[0]), made[0].make, "").extras["pictures"]
    assert np.array_equal(pictures, Made(1).make(0, COUNT)[0])
    again.tidy(plan(1))
    # A set that was made with samples from the start leaves its features where others look for them.
    other = evaluation(tmp_path / "judged", needs_pictures=True)
    other.run(plan(1))
    other.tidy(plan(1))
    made = plan(1)
    evaluation(tmp_path / "judged", ["kid"]).run(made)
    assert (made[0].made, list((tmp_path / "judged").rglob("extra_pictures.npy"))) == ([], [])
    judged = evaluation(tmp_path / "judged", ["density"], needs_pictures=True)
    made = plan(1)
    judged.run(made)
    assert made[0].made == [0, 16, 32, 48]
    assert len(list((tmp_path / "judged").rglob("extra_pictures.npy"))) == 1
    evaluation(tmp_path, keep="none").tidy(plan(1))
    assert not list((tmp_path / "features").iterdir())
    kept = evaluation(tmp_path / "kept", keep="pictures")
    kept.run(plan(1))
    kept.tidy(plan(1))
    assert len(list((tmp_path / "kept").rglob("extra_pictures.npy"))) == 1


def test_a_difference_that_cannot_be_had_is_told(tmp_path):
    evaluation(tmp_path, keep="none").run(plan(1))
    evaluation(tmp_path, keep="none").tidy(plan(1))
    later = evaluation(tmp_path)
    results = later.run(plan(1, 2))
    assert results[1].against is None
    assert later.notes == ["guidance=2 amm=saved: no difference to guidance=1, since features were not kept (--keep)"]


@pytest.mark.parametrize(("policy", "fixed"), [("balanced", True), ("reference", True), ("random", False)])
def test_resamples_keep_shares_of_classes_that_were_chosen(tmp_path, policy, fixed):
    one = evaluation(tmp_path)
    one.samples = {**one.samples, "labels": policy}
    assert one._told(reference().features).stratified is fixed


def test_what_is_to_be_known_of_the_reference_goes_along(tmp_path):
    one = evaluation(tmp_path)
    one.reference = replace(one.reference, notes=("its extractor is not known",))
    (result,) = one.run(plan(1))
    assert "its extractor is not known" in result.warnings


def test_samples_of_a_cpu_and_a_gpu_are_not_mixed(tmp_path):
    (samples,) = plan(1)
    places = [evaluation(tmp_path, device=device).parts(samples).folder for device in ("cpu", "cuda:0", "cuda:1")]
    assert places[0] != places[1] == places[2]


def test_rows_stand_in_the_order_of_their_numbers(tmp_path):
    guidances = [10, 1.5, 2, 1]
    evaluation(tmp_path).run(plan(*guidances))
    rows = (tmp_path / "table.csv").read_text().splitlines()[1:]
    assert [row.split(" ")[0] for row in rows] == [f"guidance={guidance:g}" for guidance in sorted(guidances)]


def test_what_an_evaluation_takes_of_the_disk(tmp_path, monkeypatch):
    assert evaluation(tmp_path).disk_bytes(3) == 3 * COUNT * (3 * 4 + 4 * 4 * 3)
    monkeypatch.setattr(sweep, "_SMALL_BYTES", 0)
    assert evaluation(tmp_path).disk_bytes(3) == 3 * COUNT * 3 * 4


def test_a_sweep_without_fid_has_no_differences(tmp_path):
    results = evaluation(tmp_path, ["precision"]).run(plan(1, 2))
    assert results[1].against is None
    assert "precision" in (tmp_path / "table.csv").read_text()


@pytest.mark.parametrize("change", ["seed", "extractor", "reference", "settings", "model"])
def test_a_folder_of_another_evaluation_is_refused(tmp_path, change):
    evaluation(tmp_path).run(plan(1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = evaluation(tmp_path, seed=int(change == "seed"))
    if change == "extractor":
        other.extractor.sha256 = "8" * 64
    elif change == "reference":
        other.reference = Known(other.reference.features, "8" * 64, {}, None)
    elif change == "settings":
        other.settings = MetricSettings(replicates=21)
    elif change == "model":
        other.model = {"from": "here", "transformer_sha256": "8" * 64}
    made = plan(1)
    with pytest.raises(UserError, match=rf"of another evaluation \(other {'samples' if change == 'seed' else change}"):
        other.run(made)
    assert made[0].made == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_only_the_place_of_a_model_or_reference_may_change(tmp_path):
    evaluation(tmp_path).run(plan(1))
    other = evaluation(tmp_path)
    other.model = {**other.model, "from": "elsewhere"}
    other.reference = Known(other.reference.features, "6" * 64, {"from": "moved/", "count": 200}, None)
    made = plan(1)
    assert len(other.run(made)) == 1
    assert made[0].made == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("evaluation.json", "{", "is damaged"), ("evaluation.json", "[]", "is damaged"), ("a.json", "{}", "no result")],
)
def test_a_folder_with_other_files_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    made = plan(1)
    with pytest.raises(UserError, match=said):
        evaluation(tmp_path).run(made)
    assert made[0].made == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_processes_help_and_write_no_results(tmp_path):
    helper = plan(1, 2)
    assert evaluation(tmp_path, rank=1, world_size=2).run(helper) == []
    assert [made.made for made in helper] == [[16, 48], [16, 48]]
    assert [path.name for path in tmp_path.iterdir()] == ["features"]
    main = plan(1, 2)
    assert numbers(evaluation(tmp_path, world_size=2).run(main)) == numbers(
        evaluation(tmp_path.with_name("alone")).run(plan(1, 2))
    )
    assert [made.made for made in main] == [[0, 32], [0, 32]]


# ------------------------------------------------------------------------------------------- which metrics


def test_names_of_metrics():
    assert choose_metrics(None) is None
    assert choose_metrics("KID, fid,fid") == ["kid", "fid"]
    assert choose_metrics("all") == choose_metrics("ALL") == ["all"]
    for words, said in (("", "names none"), (",", "names none"), ("fdi", "did you mean 'fid'?")):
        with pytest.raises(UserError) as error:
            choose_metrics(words)
        assert said in str(error.value)


def test_what_is_possible_is_known_beforehand():
    size, known = (4, 4), reference().features
    assert possible_metrics(Means(), size, known) == ["fid", "precision", "recall", "kid"]
    statistics_only = FeatureSet(known.statistics)
    assert possible_metrics(Means(), size, statistics_only) == ["fid"]
    assert possible_metrics(Means(), size, known, ["kid"]) == ["kid"]
    for names, against, said in (
        (["is"], known, "is needs class scores"),
        (["fid", "kid"], statistics_only, "kid needs pictures"),
        (["fid"], None, "fid compares with a reference and none was given"),
        (None, None, "fid compares with a reference and none was given"),
        (["sfid"], known, "sfid needs spatial features"),
    ):
        with pytest.raises(UserError, match=said):
            possible_metrics(Means(), size, against, names)


class Classes(Means):
    """With class scores, so that one metric needs no reference."""

    def __call__(self, images: torch.Tensor) -> Features:
        means = images.float().mean(dim=(2, 3)) / 255
        return Features(means, means)


def test_what_is_left_out_is_told():
    size, known = (4, 4), reference().features
    # The usual ones that the extractor has nothing for are no news; of "all" each is told.
    assert left_out(Means(), size, known) == []
    assert possible_metrics(Means(), size, known, ["all"]) == [
        *("fid", "precision", "recall", "density", "coverage", "kid", "cmmd", "fid_infinity"),
    ]
    told = left_out(Means(), size, known, ["all"])
    assert [line.partition(" is left out: ")[0] for line in told] == ["sfid", "is"]
    assert told[1].endswith("there are none: take the pictures and an extractor with classes")
    # 29 pictures are fewer than 10 for each of 3 features.
    assert "fid_infinity" not in possible_metrics(Means(), size, known, ["all"], 29)
    assert "fid_infinity" in possible_metrics(Means(), size, known, ["all"], 30)
    assert left_out(Means(), size, known, ["all"], 29)[-1].startswith("fid_infinity is left out: fid_infinity of 29 ")
    # Without a reference: one line that names them and says what to do.
    assert possible_metrics(Classes(), size, None) == ["is"]
    assert left_out(Classes(), size, None) == [
        "no reference was given, so that fid, precision, recall, kid are left out: name real pictures or their "
        "statistics by --reference"
    ]
    without = left_out(Classes(), size, None, ["all"])
    assert "fid, precision, recall, density, coverage, kid, cmmd, fid_infinity are left out" in without[0]
    assert [line.partition(" is left out")[0] for line in without[1:]] == ["sfid"]
    statistics_only = left_out(Means(), size, FeatureSet(known.statistics))
    assert [line.partition(" is left out")[0] for line in statistics_only] == ["precision", "recall", "kid"]


def test_too_few_pictures_are_told_beforehand_with_their_side():
    size, known = (4, 4), reference().features
    rows = known.pooled[:3]
    three = FeatureSet(GaussianStatistics.of(rows), rows)
    said = "precision of 3 reference pictures does not exist: expected at least 4"
    assert possible_metrics(Means(), size, three) == ["fid", "recall", "kid"]
    assert left_out(Means(), size, three) == [f"precision is left out: {said}"]
    with pytest.raises(UserError, match=said):
        possible_metrics(Means(), size, three, ["fid", "precision"])
    assert possible_metrics(Means(), size, known, None, 3) == ["fid", "precision"]
    for names, count, said in (
        (["recall"], 3, "recall of 3 generated pictures does not exist: expected at least 4"),
        (["kid"], 3, "kid of 3 generated pictures does not exist: expected at least 4"),
        (["fid"], 2, "fid of 2 generated pictures does not exist: expected at least 3"),
        (["fid_infinity"], 29, "fid_infinity of 29 generated pictures with 3 features .* expected at least 30"),
        (None, 1, "fid of 1 generated pictures"),
    ):
        with pytest.raises(UserError, match=said):
            possible_metrics(Means(), size, known, names, count)
    larger = MetricSettings(neighbours=9)
    assert possible_metrics(Means(), size, known, ["recall"], 9) == ["recall"]
    with pytest.raises(UserError, match="recall of 9 generated pictures does not exist: expected at least 10"):
        possible_metrics(Means(), size, known, ["recall"], 9, larger)
    other = np.random.default_rng(0).random((50, 7), np.float32)
    with pytest.raises(UserError, match="3 features and the reference 7: both must come from one extractor"):
        possible_metrics(Classes(), size, FeatureSet(GaussianStatistics.of(other), other), ["all"])


def test_measuring_tells_what_it_left_out():
    rows = np.random.default_rng(1).random((28, 3), np.float32)
    few = FeatureSet(GaussianStatistics.of(rows), rows)
    out, warnings = measure(few, reference().features, Means(), ["all"], SETTINGS)
    assert list(out) == ["fid", "precision", "recall", "density", "coverage", "kid", "cmmd"]
    assert [line.partition(" is left out")[0] for line in warnings[:3]] == ["sfid", "is", "fid_infinity"]
    scored = FeatureSet(few.statistics, rows, rows)
    out, warnings = measure(scored, None, Classes(), None, SETTINGS)
    assert list(out) == ["is"]
    assert warnings[0].startswith("no reference was given, so that fid, precision, recall, kid are left out")
    with pytest.raises(UserError, match="expected at least 30"):
        measure(few, reference().features, Means(), ["fid", "fid_infinity"], SETTINGS)


def test_what_a_reader_must_know_goes_along():
    rows = np.random.default_rng(0).random((4, 3), np.float32)
    few = FeatureSet(GaussianStatistics.of(rows), rows)
    out, warnings = measure(few, reference().features, Means(), ["fid"], SETTINGS)
    assert out["fid"]["label"] == "Fréchet distance"  # an FID is of Inception's features only
    assert out["fid"]["lower_is_better"] is True
    assert any("4 generated samples for 3 features" in warning for warning in warnings)
    json.dumps(out, allow_nan=False)
