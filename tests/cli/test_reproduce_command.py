"""`edt reproduce`, as a user calls it."""

import json

import pytest
from PIL import Image


def test_alone_it_lists_every_table_with_what_it_takes(edt):
    said = edt("reproduce")
    assert (said.code, said.err) == (0, [])
    names = [line.split()[0] for line in said.out[:-1]]
    assert names == [*(f"table{number}" for number in range(1, 15)), "figure6", "figure9", "figure10"]
    assert said.out[3].split()[1:6] == ["6", "x", "seeds", "x", "budget"]
    assert "seconds" in said.out[4]
    facts = json.loads(edt("reproduce", "--json").out[-1])["tables"]
    assert [facts["table5"]["trains"], facts["table1"]["trains"]] == [False, True]


def test_an_unknown_table_gives_the_nearest_and_writes_nothing(edt, work):
    said = edt("reproduce", "tabel5")
    assert said.code == 2
    assert len(said.err) == 1
    assert "unknown table or figure 'tabel5'" in said.err[0]
    assert "did you mean 'table5'?" in said.err[0]
    assert list(work.iterdir()) == []


def test_a_quality_table_without_pictures_says_what_it_needs(edt, work):
    said = edt("reproduce", "table4")
    assert (said.code, len(said.err)) == (2, 1)
    assert "name pictures or a latent store by --data" in said.err[0]
    said = edt("reproduce", "table4", "--data", "nowhere", "--budget", "soon")
    assert (said.code, len(said.err)) == (2, 1)
    assert "budget 'soon'" in said.err[0]
    assert list(work.iterdir()) == []


def test_table5_says_where_it_wrote_and_prints_json(edt, work):
    said = edt("reproduce", "table5")
    assert (said.code, said.err) == (0, [])
    assert said.out[0] == "# table5: model details of EDT-S, B and XL"
    assert said.out[-1] == "wrote reproduced/table5/table.md, reproduced/table5/table.json"
    facts = json.loads(edt("reproduce", "table5", "--json", "--out", work / "t").out[-1])
    assert facts == json.loads((work / "t/table.json").read_text())
    assert [round(row["gflops"], 2) for row in facts["grids"][0]["rows"]] == [2.67, 10.22, 53.44, 51.83]
    (work / "file").write_text("")
    assert edt("reproduce", "table5", "--out", work / "file").code == 2


TINY = """\
model: {patch_size: 1, depths: [1, 1, 1, 1, 1], dims: [16, 16, 16, 16, 16], num_heads: [2, 2, 2, 2, 2]}
data: {size: 8, channels: 1}
optimizer: {schedule: constant, decay_steps: null}
train: {batch_size: 4, log_every: 1}
"""


@pytest.mark.slow
def test_a_table_is_trained_scored_and_not_trained_again(edt, pictures, work):
    (work / "tiny.yaml").write_text(TINY)
    command = [
        "reproduce", "table9", "--data", pictures, "--config", work / "tiny.yaml", "--image-size", 8,
        "--amm-blocks", "0", "--budget", "2steps", "--seeds", 1, "--images", 4, "--extractor", "pixels",
        "--threads", 1, "--quiet",
    ]  # fmt: skip
    said = edt(*command)
    assert (said.code, said.out[-1]) == (
        0, "wrote reproduced/table9/table.md, reproduced/table9/table.json and reproduced/table9/figure.png",
    )  # fmt: skip
    folder = work / "reproduced/table9"
    facts = json.loads((folder / "table.json").read_text())
    rows = facts["grids"][0]["rows"]
    assert [row["variant"] for row in rows][:2] == ["AMM off", "every second block of the encoder"]
    assert all(row["steps"] == 2 and row["fid"]["low"] is None for row in rows)
    assert len(rows) == 6
    assert rows[0]["difference"] is None
    assert rows[1]["difference"]["value"] == pytest.approx(rows[1]["fid"]["value"] - rows[0]["fid"]["value"])
    settings = [cell["sampling"]["attention_modulation"] for cell in facts["results"]["cells"]]
    assert [None if setting is None else setting["blocks"] for setting in settings] == [
        None, [1], [1, 4], [4], [3, 4], [0],
    ]  # fmt: skip
    Image.open(folder / "figure.png").verify()
    runs = {path: path.stat().st_mtime_ns for path in (folder / "matrix").rglob("*.json") if path.name != "matrix.json"}
    assert edt(*command).code == 0
    assert runs == {path: path.stat().st_mtime_ns for path in runs}
    changed = edt(*["3steps" if word == "2steps" else word for word in command])
    assert (changed.code, len(changed.err)) == (2, 1)
    assert "holds another matrix (budget: 2steps -> 3steps)" in changed.err[0]
