"""`edt compare`: results side by side, or why not."""

import copy
import json
from pathlib import Path

import pytest

MANIFEST = {
    "protocol": 1,
    "samples": {"count": 100, "labels": "balanced", "seed": 0, "size": [8, 8], "channels": 3, "preparation": "none"},
    "extractor": {"name": "inception", "sha256": "3" * 64, "preprocessing": "none"},
    "reference": {"from": "real/", "size": [8, 8], "preparation": "none", "sha256": "4" * 64},
    "sampling": {"precision": "fp32"},
    "settings": {"level": 0.95},
    "environment": {"device": "cpu", "packages": {"torch": "2.8"}},
}


def write(path: Path, label: str, value: float, **changes) -> Path:
    manifest = copy.deepcopy(MANIFEST)
    for name, replacement in changes.items():
        tree = manifest
        *parents, last = name.split("__")
        for parent in parents:
            tree = tree[parent]
        tree[last] = replacement
    numbers = {"value": value, "low": value - 1, "high": value + 1, "label": "FID", "lower_is_better": True}
    path.write_text(json.dumps({"label": label, "metrics": {"fid": numbers}, "manifest": manifest}))
    return path


def test_comparable_results_stand_side_by_side(edt, work):
    write(Path("a.json"), "guidance=1", 10.0)
    write(Path("b.json"), "guidance=2", 8.0, samples__seed=1)
    said = edt("compare", "a.json", "b.json")
    assert (said.code, said.err) == (0, [])
    assert said.out == [
        "setting  FID ↓",
        "a.json   10 [9, 11]",
        "b.json   8 [7, 9]",
        "",
        "note: b.json: other seed: 0 and 1",
        "compared 2 results",
    ]
    facts = json.loads(edt("compare", "a.json", "b.json", "--json").out[-1])
    assert facts == {"groups": [["a.json", "b.json"]], "reasons": [], "notes": ["b.json: other seed: 0 and 1"]}


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("protocol", 2, "version of the metrics: 1 and 2"),
        ("extractor__sha256", "5" * 64, "weights of the extractor: 333333333333... and 555555555555..."),
        ("extractor__preprocessing", "other", "preprocessing of the extractor: none and other"),
        ("reference__sha256", "5" * 64, "reference pictures: 444444444444... and 555555555555..."),
        ("reference__preparation", "resize", "preparation of the reference pictures: none and resize"),
        ("reference__size", [16, 16], "size of the reference pictures: 8x8 and 16x16"),
        ("samples__count", 50, "number of samples: 100 and 50"),
        ("samples__size", [4, 4], "size of the samples: 8x8 and 4x4"),
        ("samples__preparation", "center", "preparation of the samples: none and center"),
        ("samples__labels", "random", "label policy: balanced and random"),
        ("settings__level", 0.9, "settings of the metrics: level is 0.95 and 0.9"),
    ],
)
def test_results_that_say_nothing_of_each_other_are_refused(edt, work, change, value, said):
    write(Path("a.json"), "a", 10.0)
    write(Path("b.json"), "b", 8.0, **{change: value})
    write(Path("c.json"), "c", 9.0)
    outcome = edt("compare", "a.json", "b.json", "c.json")
    assert (outcome.code, outcome.err) == (1, [])
    assert f"not comparable: a.json and b.json ({said})" in outcome.out
    assert outcome.out[-1] == "2 groups that cannot be compared"
    facts = json.loads(edt("compare", "a.json", "b.json", "c.json", "--json").out[-1])
    assert facts["groups"] == [["a.json", "c.json"], ["b.json"]]
    assert facts["reasons"] == [{"one": "a.json", "other": "b.json", "reasons": [said]}]


def judged(path: str, classifier: str, training: str) -> None:
    tree = json.loads(write(Path(path), path, 10.0).read_text())
    tree["judge"] = {"class_fidelity": 0.5, "interval": [0.25, 0.75]}
    tree["memorisation"] = {"ratio": 0.75}
    tree["manifest"]["judged_by"] = {
        "classifier": {"sha256": classifier * 64},
        "training": {"sha256": training * 64, "mirrored": False},
        "space": "pixels", "baseline": "leave-one-out", "held_out": None,
    }  # fmt: skip
    Path(path).write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("others", "heads", "named"),
    [
        ((), ["class fidelity ↑", "novelty ↑"], []),
        (("judge.json",), ["novelty ↑"], ["class fidelity"]),
        (("copies.json",), ["class fidelity ↑"], ["novelty"]),
        (("judge.json", "copies.json"), [], ["class fidelity", "novelty"]),
    ],
)
def test_judges_that_differ_leave_the_metrics_comparable(edt, work, others, heads, named):
    judged("a.json", "a", "b")
    judged("b.json", "a", "b")
    judged("judge.json", "d", "b")
    judged("copies.json", "a", "d")
    write(Path("none.json"), "n", 9.0)  # without a judge it is in nobody's way
    said = edt("compare", "a.json", "b.json", "none.json", *others)
    assert (said.code, said.err) == (0, [])
    assert said.out[0].split("  ")[0] == "setting"
    assert [cell for cell in ("class fidelity ↑", "novelty ↑") if cell in said.out[0]] == heads
    notes = [line for line in said.out if line.startswith("note: ")]
    assert [note.split(":")[1].strip() for note in notes] == [f"no column of {name}" for name in named]
    if others == ("judge.json",):
        assert notes == [
            "note: no column of class fidelity: a.json and judge.json were judged otherwise (classifier: "
            "aaaaaaaaaaaa... and dddddddddddd...)"
        ]
    assert all(f"{name}  " in "\n".join(said.out) for name in ("a.json", "none.json", *others))


def test_pictures_as_found_between_two_policies(edt, work):
    for name in ("as found", "balanced", "random"):
        write(Path(f"{name[:2]}.json"), name, 10.0, samples__labels=name)
    said = edt("compare", "as.json", "ba.json", "ra.json")
    assert said.code == 1
    assert "not comparable: ba.json and ra.json (label policy: balanced and random)" in said.out


def test_folders_and_patterns(edt, work):
    folder = Path("run/evaluation/0123")
    folder.mkdir(parents=True)
    write(folder / "a.json", "a", 10.0)
    write(folder / "b.json", "b", 8.0)
    (folder / "evaluation.json").write_text("{}")
    for arguments in ((folder,), ("run",), ("run/evaluation",), sorted(folder.glob("*.json"))):
        said = edt("compare", *arguments)
        assert (said.code, said.out[-1]) == (0, "compared 2 results"), said


def test_mistakes(edt, work):
    Path("empty").mkdir()
    Path("half.json").write_text('{"label": "a", "metr')
    Path("other.json").write_text('{"loss": 1}')
    Path("evaluation.json").write_text("{}")
    for arguments, words in (
        (("gone.json",), ("gone.json does not exist", "edt evaluate")),
        (("half.json",), ("half.json cannot be read", "edt evaluate")),
        (("other.json",), ("other.json is no result",)),
        (("empty",), ("empty holds no results",)),
        (("evaluation.json",), ("no results were named",)),
        ((), ("RESULT",)),
    ):
        said = edt("compare", *arguments)
        assert (said.code, said.out, len(said.err)) == (2, [], 1)
        for word in words:
            assert word in said.err[0]


def test_results_of_two_evaluations(edt, work, pictures):
    quick = ("--extractor", "pixels", "--metrics", "fid", "--quiet")
    for name, reference in (("one", pictures), ("two", pictures), ("three", "digits")):
        assert edt("evaluate", pictures, "--reference", reference, *quick, "--out", name).code == 0
    assert edt("compare", "one", "two").code == 0
    said = edt("compare", "one", "three")
    assert said.code == 1
    assert "reference pictures" in said.out[-2]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
