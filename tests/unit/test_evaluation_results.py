"""Results, whether they compare, and their tables."""

import copy
import csv
import itertools
import json

import pytest
import torch
from PIL import Image

from edt_diffusion.evaluation.comparison import cautions, comparable_groups, incomparable, otherwise_judged
from edt_diffusion.evaluation.report import distinguishing, markdown, pareto_front, rows, text_table, write_tables
from edt_diffusion.evaluation.result import Result, environment, load_results
from edt_diffusion.util.errors import UserError

MANIFEST = {
    "protocol": 1,
    "samples": {
        "kind": "generated", "count": 100, "labels": "balanced", "seed": 0, "batch": 16, "size": [8, 8], "channels": 3,
        "preparation": "none", "sha256": "1" * 64,
    },
    "model": {"from": "runs/a", "transformer_sha256": "2" * 64},
    "sampling": {"guidance": 1.0, "steps": 50, "precision": "fp32"},
    "extractor": {"name": "pixels", "sha256": "3" * 64, "preprocessing": "none", "dimensions": 768},
    "reference": {"from": "real/", "count": 500, "size": [8, 8], "preparation": "none", "sha256": "4" * 64},
    "settings": {"level": 0.95, "replicates": 200, "neighbours": 3},
    "environment": {"device": "cpu", "packages": {"torch": "2.8", "edt-diffusion": "0.1.0"}, "date": "2026-01-01"},
}  # fmt: skip


def number(value, low=None, high=None, label="FID", lower=True):
    return {
        "value": value, "low": low, "high": high, "error": None, "label": label, "lower_is_better": lower, "notes": [],
    }  # fmt: skip


def result(label="guidance=1 amm=off", fid=10.0, **fields) -> Result:
    return Result(label, {"fid": number(fid, fid - 1, fid + 1)}, copy.deepcopy(MANIFEST), **fields)


def changed(path: str, value) -> Result:
    out = result()
    tree = out.manifest
    *parents, name = path.split(".")
    for parent in parents:
        tree = tree[parent]
    tree[name] = value
    return out


# ------------------------------------------------------------------------------------------- comparison

MATTERS = [
    ("protocol", 2, ("version of the metrics", "1 and 2")),
    ("extractor.sha256", "9" * 64, ("weights of the extractor", "333333333333...", "999999999999...")),
    ("extractor.preprocessing", "bicubic", ("preprocessing of the extractor", "none and bicubic")),
    ("reference.sha256", "9" * 64, ("reference pictures", "444444444444...")),
    ("reference.statistics", "from the file", ("origin of the reference statistics", "unknown and from the file")),
    ("reference.size", [16, 8], ("size of the reference pictures", "8x8 and 16x8")),
    ("reference.preparation", "resize to 8x8", ("preparation of the reference pictures", "resize to 8x8")),
    ("reference", None, ("reference pictures", "unknown")),
    ("samples.count", 200, ("number of samples", "100 and 200")),
    ("samples.size", [8, 16], ("size of the samples", "8x8 and 8x16")),
    ("samples.preparation", "center to 8x8", ("preparation of the samples",)),
    ("samples.statistics", "from the file", ("origin of the samples' statistics", "unknown and from the file")),
    ("samples.labels", "random", ("label policy", "balanced and random")),
    ("settings.neighbours", 5, ("settings of the metrics", "neighbours is 3 and 5")),
    ("settings.replicates", 20, ("settings of the metrics", "replicates is 200 and 20")),
]


@pytest.mark.parametrize(("path", "value", "said"), MATTERS)
def test_what_matters_makes_results_incomparable_and_is_named(path, value, said):
    other = changed(path, value)
    for one, two in ((result(), other), (other, result())):
        reasons = incomparable(one, two)
        assert reasons
        assert comparable_groups([one, two, one]) == [[0, 2], [1]]
    text = "; ".join(incomparable(result(), other))
    for part in said:
        assert part in text


@pytest.mark.parametrize(
    ("path", "value", "caution"),
    [
        ("samples.sha256", "9" * 64, None), ("samples.batch", 4, None), ("model.transformer_sha256", "9" * 64, None),
        ("sampling.guidance", 2.0, None), ("sampling.steps", 20, None), ("reference.from", "elsewhere/", None),
        ("environment.date", "2027-01-01", None), ("environment.packages.pillow", "12", None),
        ("samples.seed", 1, "seed: 0 and 1"), ("sampling.precision", "bf16", "precision: fp32 and bf16"),
        ("environment.device", "NVIDIA", "device: cpu and NVIDIA"),
        ("environment.packages.torch", "2.9", "torch: 2.8 and 2.9"),
        ("environment.packages.edt-diffusion", "0.2.0", "edt-diffusion: 0.1.0 and 0.2.0"),
        ("samples.channels", 1, "colour channels of the samples: 3 and 1"),
    ],
)  # fmt: skip
def test_what_does_not_matter_is_told_at_most(path, value, caution):
    other = changed(path, value)
    assert incomparable(result(), other) == []
    assert comparable_groups([result(), other]) == [[0, 1]]
    assert cautions(result(), other) == ([] if caution is None else [caution])


# ------------------------------------------------------------------------------------------- files


def test_classes_as_found_are_told_and_chosen_ones_must_agree():
    found, random = changed("samples.labels", "as found"), changed("samples.labels", "random")
    assert incomparable(result(), found) == []
    assert cautions(result(), found) == ["label policy: balanced and as found"]
    assert incomparable(result(), random) == ["label policy: balanced and random"]
    assert cautions(result(), random) == []


def test_members_of_a_group_are_comparable_with_each_other_in_any_order():
    """What is as found goes with either policy, and does not bring the two together."""
    kinds = {name: changed("samples.labels", name) for name in ("as found", "balanced", "random")}
    for order in itertools.permutations(kinds):
        results = [kinds[name] for name in order]
        groups = comparable_groups(results)
        names = [{order[index] for index in group} for group in groups]
        assert len(groups) == 2
        assert {"balanced", "random"} not in names
        chosen = next(name for name in order if name != "as found")
        assert {"as found", chosen} in names  # the first that it fits


JUDGED = {
    "classifier": {"kind": "conv", "sha256": "a" * 64},
    "training": {"pictures": 50, "sha256": "b" * 64, "mirrored": False},
    "held_out": {"pictures": 10, "sha256": "c" * 64},
    "baseline": "held-out",
    "space": "pixels in [0, 1]",
    "closest": 10,
    "level": 0.95,
}


def judged(**changes) -> Result:
    one = result(judge={"class_fidelity": 0.5, "interval": [0.4, 0.6]}, memorisation={"ratio": 0.5})
    one.manifest["judged_by"] = copy.deepcopy(JUDGED)
    for path, value in changes.items():
        tree = one.manifest["judged_by"]
        *parents, name = path.split("__")
        for parent in parents:
            tree = tree[parent]
        tree[name] = value
    return one


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, {}),
        ({"closest": 3}, {}),
        ({"classifier__sha256": "d" * 64}, {"judge": ["classifier: aaaaaaaaaaaa... and dddddddddddd..."]}),
        ({"classifier": None}, {"judge": ["classifier: aaaaaaaaaaaa... and unknown"]}),
        ({"training__sha256": "d" * 64}, {"memorisation": ["training pictures: bbbbbbbbbbbb... and dddddddddddd..."]}),
        ({"training__mirrored": True}, {"memorisation": ["mirroring of the training pictures: False and True"]}),
        ({"space": "features"}, {"memorisation": ["space of the distances: pixels in [0, 1] and features"]}),
        ({"held_out__sha256": "d" * 64}, {"memorisation": ["held-out pictures: cccccccccccc... and dddddddddddd..."]}),
        (
            {"held_out": None, "baseline": "leave-one-out"},
            {
                "memorisation": [
                    "baseline: held-out and leave-one-out",
                    "held-out pictures: cccccccccccc... and unknown",
                ]
            },
        ),
    ],
)
def test_what_judging_says_is_comparable_only_if_judged_alike(changes, said):
    assert otherwise_judged(judged(), judged(**changes)) == said
    assert incomparable(judged(), judged(**changes)) == []


def test_what_is_not_known_of_judging_or_not_there():
    early = {"training": {"pictures": 50, "mirrored": False}, "held_out": None}
    unknown = [judged(), judged()]
    for one in unknown:
        one.manifest["judged_by"] = early
    assert otherwise_judged(*unknown) == {
        "judge": ["classifier: unknown and unknown"], "memorisation": ["training pictures: unknown and unknown"],
    }  # fmt: skip
    without = judged(classifier=None)
    without.judge = None
    assert otherwise_judged(judged(), without) == {}
    assert otherwise_judged(judged(), result()) == otherwise_judged(result(), judged()) == {}
    alone = {"held_out": None, "baseline": "leave-one-out"}
    assert otherwise_judged(judged(**alone), judged(**alone)) == {}


def test_a_result_comes_back_from_its_file(tmp_path):
    one = result(against={"amm": {"label": "a", "difference": 1.0, "low": 0.0, "high": 2.0}}, seconds_per_image=0.5)
    one.warnings.append("few pictures")
    one.save(tmp_path / "a.json")
    assert Result.load(tmp_path / "a.json") == one


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "3", '{"label": "a"}', '{"label": "a", "metrics": {}, "manifest": {}, "else": 1}',
        '{"label": "a", "metrics": [], "manifest": {}}', '{"label": "a", "metrics": {"fid": 3}, "manifest": {}}',
        '{"label": 1, "metrics": {}, "manifest": {}}', '{"label": "a", "metrics": {}, "manifest": []}', b"\xff\xfe\x00",
    ],
)  # fmt: skip
def test_a_damaged_result_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"a\.json .*result of edt evaluate") as error:
        Result.load(path)
    assert "\n" not in str(error.value)


def test_results_of_files_and_folders(tmp_path):
    folder = tmp_path / "run" / "evaluation" / "1234abcd"
    (folder / "features" / "x" / "whole").mkdir(parents=True)
    (folder / "features" / "x" / "whole" / "facts.json").write_text("{}")
    result("a").save(folder / "a.json")
    result("b").save(folder / "b.json")
    (folder / "evaluation.json").write_text("{}")
    (tmp_path / "run" / "report.json").write_text("{}")  # a run has others

    def labels(*paths):
        return [(name, found.label) for name, found in load_results(paths)]

    both = [(str(folder / "a.json"), "a"), (str(folder / "b.json"), "b")]
    assert labels(folder) == labels(tmp_path / "run") == both
    assert labels(*sorted(folder.glob("*.json"))) == both  # a shell's pattern takes evaluation.json along
    assert labels(folder / "b.json", folder) == [both[1], *both]
    result("step 5").save(folder.parent / "step-00000005.json")
    assert labels(tmp_path / "run") == [*both, (str(folder.parent / "step-00000005.json"), "step 5")]
    assert labels(folder.parent) == labels(tmp_path / "run")  # without the run around it
    assert labels(folder) == both
    with pytest.raises(UserError, match="holds no results"):
        load_results([folder / "features"])
    with pytest.raises(UserError, match="no results were named"):
        load_results([folder / "evaluation.json"])
    with pytest.raises(UserError, match=r"c\.json does not exist"):
        load_results([folder / "c.json"])


def test_the_environment_names_versions_and_device():
    facts = environment("cpu")
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["packages"]["numpy"].count(".") >= 1
    assert facts["device"] == "cpu"


# ------------------------------------------------------------------------------------------- tables


def test_the_front_of_quality_and_time():
    points = [(1.0, 9.0), (2.0, 9.0), (2.0, 4.0), (3.0, 5.0), (4.0, 1.0), (4.0, 1.0), (0.5, 10.0)]
    assert pareto_front(points) == [6, 0, 2, 4]
    assert pareto_front([]) == []
    front = pareto_front([(float(i), float((i * 7) % 10)) for i in range(10)])  # values 0, 7, 4, ...
    assert front == [0]
    quarter = [(i / 10, (100 - i * i) ** 0.5 / 10) for i in range(11)]  # on a circle nothing is beaten
    assert pareto_front(quarter) == list(range(11))


def test_words_that_all_labels_share():
    labels = ["guidance=1 amm=off steps=20", "guidance=2 amm=off steps=20", "guidance=1 amm=on steps=20"]
    assert distinguishing(labels) == (["guidance=1 amm=off", "guidance=2 amm=off", "guidance=1 amm=on"], "steps=20")
    assert distinguishing(labels[:1]) == (labels[:1], "")


def full() -> list[Result]:
    plain = result("guidance=1 amm=off", 12.0, seconds_per_image=0.25)
    second = result("guidance=2 amm=off", 3.5, seconds_per_image=0.5)
    second.metrics["is"] = number(8.25, None, None, "IS", False)
    difference = {"to": "guidance=1", "metric": "fid", "difference": -8.5, "low": -9.0, "high": -8.0}
    second.against = {"guidance": {**difference, "label": plain.label}}
    second.judge = {"class_fidelity": 0.5, "interval": [0.4, 0.6]}
    second.memorisation = {"ratio": 0.9876}
    return [plain, second]


def test_cells_of_the_table():
    heads, table = rows(full())
    assert heads == [
        "setting", "FID ↓", "IS ↑", "class fidelity ↑", "novelty ↑", "Δ to guidance=1", "s/image ↓",
    ]  # fmt: skip
    assert table == [
        ["guidance=1 amm=off", "12 [11, 13]", "", "", "", "", "0.25"],
        ["guidance=2 amm=off", "3.5 [2.5, 4.5]", "8.25", "50.0% [40.0%, 60.0%]", "0.988", "-8.5 [-9, -8]", "0.5"],
    ]
    assert rows([result()])[0] == ["setting", "FID ↓"]
    heads, table = rows(full(), ["judge"])
    assert heads == ["setting", "FID ↓", "IS ↑", "novelty ↑", "Δ to guidance=1", "s/image ↓"]
    assert table[1][3] == "0.988"
    assert rows(full(), ["memorisation", "judge"])[0] == ["setting", "FID ↓", "IS ↑", "Δ to guidance=1", "s/image ↓"]
    assert "novelty" not in text_table(full(), None, {"memorisation"})


def test_cells_of_what_could_not_be_had():
    one = full()[1]
    one.against = None
    one.memorisation = {"ratio": None}
    assert rows([one])[1] == [["guidance=2 amm=off", "3.5 [2.5, 4.5]", "8.25", "50.0% [40.0%, 60.0%]", "", "0.5"]]


def test_how_many_differences_chance_puts_beside_zero():
    both = full()
    assert "differences" not in markdown(both)  # there is one
    both[1].against["amm"] = {**both[1].against["guidance"], "to": "amm=off"}
    assert "2 differences from the same seeds; of so many intervals, chance alone puts about 0.1 beside" in markdown(
        both
    )


def test_tables_as_text_and_markdown():
    lines = text_table(full(), ["x.json", "y.json"]).splitlines()
    assert lines[1].startswith("x.json   12 [11, 13] ")
    assert len({line.index(cell) for line, cell in zip(lines, ("FID", "12 ", "3.5 "), strict=True)}) == 1
    both = full()
    both[1].warnings.append("few pictures")
    both[0].manifest["settings"]["level"] = 0.995
    text = markdown(both)
    assert text.splitlines()[1] == "|---|---:|---:|---:|---:|---:|---:|"
    assert "100 pictures a row; extractor pixels (333333333333); reference real/ (500 pictures)" in text
    assert "99.5 % intervals" in text
    assert text.endswith("\nWarning: few pictures.\n")


def test_files_of_the_table(tmp_path):
    written = write_tables(tmp_path, full())
    assert [path.name for path in written] == ["table.md", "table.csv", "pareto.png"]
    with open(tmp_path / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["setting"] for line in lines] == ["guidance=1 amm=off", "guidance=2 amm=off"]
    assert [float(line["fid"]) for line in lines] == [12.0, 3.5]
    assert [float(lines[0][name]) for name in ("fid_low", "fid_high", "seconds_per_image")] == [11.0, 13.0, 0.25]
    assert (lines[0]["is"], lines[1]["is"], lines[1]["is_low"]) == ("", "8.25", "")
    assert (lines[0]["class_fidelity"], lines[1]["class_fidelity"]) == ("", "0.5")
    assert lines[1]["memorisation_ratio"] == "0.9876"
    Image.open(tmp_path / "pareto.png").verify()
    assert (tmp_path / "table.md").read_text() == markdown(full())


def test_without_times_or_a_library_there_is_no_drawing(tmp_path, monkeypatch):
    assert [path.name for path in write_tables(tmp_path, [result()])] == ["table.md", "table.csv"]
    from edt_diffusion.evaluation import report

    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert [path.name for path in write_tables(tmp_path, full())] == ["table.md", "table.csv"]


def test_json_is_strict(tmp_path):
    result().save(tmp_path / "a.json")

    def refuse(word):
        raise AssertionError(word)

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)["label"] == "guidance=1 amm=off"
