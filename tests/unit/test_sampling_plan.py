"""Which pictures a job makes, and what is shown of them."""

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.sampling.plan import Plan, plan_classes, plan_labels, read_labels
from edt_diffusion.sampling.sheets import beside, grid_rows, sheet_rows, write_grid, write_sheet
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.pictures import is_whole_png, read_notes, save_png
from edt_diffusion.util.rng import image_seed

NAMES = ["church", "tench", "a/b"]


def resolve(entries):
    known = {**{name: at for at, name in enumerate(NAMES)}, **{str(at): at for at in range(3)}}
    for entry in entries:
        if str(entry) not in known:
            raise UserError(f"unknown class {entry!r}")
    return [known[str(entry)] for entry in entries]


def labels_plan(how, count=None, classes: int | None = 3, **options) -> Plan:
    return plan_labels(str(how), count, NAMES, classes, resolve, batch=4, **options)


def test_classes_take_turns_and_share_their_seeds():
    plan = plan_classes([2, 0], 3, NAMES, batch=4, seed=7)
    assert plan.labels is not None
    assert plan.labels.tolist() == [2, 0, 2, 0, 2, 0]
    assert list(plan.seeds) == [image_seed(7, index) for index in (0, 0, 1, 1, 2, 2)]
    assert plan.files() == [f"{name}/00000{index}.png" for index in range(3) for name in ("a_b", "church")]
    assert (plan.batches, list(plan.rows(0)), list(plan.rows(1))) == (2, [0, 1, 2, 3], [4, 5])
    assert plan.by_class() == {2: [0, 2, 4], 0: [1, 3, 5]}
    # A larger job begins with the smaller one; other classes, their order or another seed are another one.
    larger = plan_classes([2, 0], 5, NAMES, batch=4, seed=7)
    assert larger.digest(6) == plan.digest(6) != larger.digest(7)
    for other in (plan_classes([0, 2], 3, NAMES, 4, 7), plan_classes([2, 0], 3, NAMES, 4, 8)):
        assert other.digest(6) != plan.digest(6)


def test_given_seeds_and_no_classes():
    plan = plan_classes(None, 2, [], batch=4, seeds=[5, 2**63 - 1])
    assert (plan.policy, plan.labels, list(plan.seeds)) == ("none", None, [5, 2**63 - 1])
    assert plan.files() == ["000000.png", "000001.png"]
    assert plan.by_class() == {None: [0, 1]}
    each = plan_classes([1, 2], 2, NAMES, batch=4, seeds=[5, 6])
    assert list(each.seeds) == [5, 5, 6, 6]


def test_labels_in_words():
    balanced = labels_plan("balanced", 7)
    assert balanced.labels is not None
    assert balanced.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert list(balanced.seeds) == [image_seed(0, number) for number in range(7)]
    assert balanced.files()[:4] == ["church/000000.png", "tench/000001.png", "a_b/000002.png", "church/000003.png"]
    assert len(labels_plan("balanced")) == 3
    random = labels_plan("random", 3000, seed=1)
    assert random.labels is not None
    shares = np.bincount(random.labels, minlength=3)
    assert np.abs(shares - 1000).max() < 5 * np.sqrt(3000 * 2 / 9)  # five deviations of a binomial draw
    assert random.digest(100) == labels_plan("random", 100, seed=1).digest(100)
    assert random.digest(100) != labels_plan("random", 100, seed=2).digest(100)


def test_labels_of_a_file(tmp_path):
    text, array = tmp_path / "list.txt", tmp_path / "list.npy"
    text.write_text("\ufefftench\n\n a/b \n0\n", "utf-8")
    np.save(array, np.array([1, 2, 0], np.uint8))
    for path in (text, array):
        plan = labels_plan(path)
        assert (plan.policy, plan.labels is not None and plan.labels.tolist()) == ("given", [1, 2, 0])
        assert labels_plan(path, 2).digest(2) == plan.digest(2)
    with pytest.raises(UserError, match=r"has 3 labels: expected 4 \(-n\)"):
        labels_plan(text, 4)


def test_labels_that_are_none(tmp_path):
    with pytest.raises(UserError, match="'balanced'"):
        read_labels("balancd")
    cases = {"empty.txt": b"\n \n", "bytes.txt": b"\xff\xfe\x00", "words.npy": b"tench", "unknown.txt": b"tench\nx\n"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "table.npy", np.zeros((3, 1), int))
    for name, words in {
        "empty.txt": "holds no labels", "bytes.txt": "cannot be read", "words.npy": "cannot be read",
        "floats.npy": "holds float64", "table.npy": r"shape \(3, 1\)", "unknown.txt": "unknown.txt: unknown class 'x'",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words):
            labels_plan(tmp_path / name)
    with pytest.raises(UserError, match="unconditional"):
        labels_plan("random", 4, classes=None)


def coloured(row: int) -> np.ndarray:
    """A picture of one colour that tells its number."""
    return np.full((8, 8, 3), (row // 256, row % 256, 77), np.uint8)


def number_at(sheet: Image.Image, x: int, y: int) -> int | None:
    red, green, blue = sheet.getpixel((x, y))  # pyright: ignore[reportGeneralTypeIssues]
    return red * 256 + green if blue == 77 else None


def test_a_grid_has_a_row_for_each_class(tmp_path):
    plan = plan_classes([2, 0], 3, NAMES, batch=4)
    assert grid_rows(plan) == [[0, 2, 4], [1, 3, 5]]
    assert write_grid(plan, coloured, tmp_path / "g.png")
    sheet = Image.open(tmp_path / "g.png")
    # 8 px enlarged to 64, gaps of 2: cells from the right edge, whatever the names take.
    seen = [[number_at(sheet, sheet.width - 66 * back + 32, 34 + 66 * row) for back in (3, 2, 1)] for row in (0, 1)]
    assert seen == [[0, 2, 4], [1, 3, 5]]


def test_a_grid_of_many_shows_some(tmp_path):
    plan = plan_classes(list(range(100)), 10, [str(n) for n in range(100)], batch=4)
    rows = grid_rows(plan)
    assert (len(rows), {len(row) for row in rows}) == (16, {8})
    assert rows[15] == [15 + 100 * turn for turn in range(8)]
    assert not write_grid(plan, coloured, tmp_path / "g.png")
    loose = plan_classes(None, 20, [], batch=4)
    assert list(map(len, grid_rows(loose))) == [8, 8, 4]
    assert write_grid(loose, coloured, tmp_path / "g.png")


@pytest.mark.parametrize("classes", [1, 3, 100, 1000, 4000])
@pytest.mark.parametrize("shape", [(32, 32, 3), (512, 256, 3)])
def test_a_contact_sheet_has_every_class_within_2000_pixels(classes, shape):
    plan = plan_classes(list(range(classes)), 12, [str(n) for n in range(classes)], batch=4)
    shown, columns, size = sheet_rows(plan, shape)
    labels = [plan.label(row) for row in shown]
    assert sorted(labels) == labels  # pyright: ignore[reportArgumentType]
    assert set(labels) == set(range(classes))
    assert all(plan.numbers[row] < 10 for row in shown)  # the first ones
    height, width = size
    assert 2 + columns * (width + 2) <= 2000
    assert 2 + -(-len(shown) // columns) * (height + 2) <= 2000
    assert abs(height / width - shape[0] / shape[1]) <= 1 / width * shape[0] / shape[1]


def test_a_contact_sheet_as_written(tmp_path):
    plan = plan_classes([2, 0], 3, NAMES, batch=4)
    asked = []

    def picture(row):
        asked.append(row)
        return coloured(row)

    write_sheet(plan, picture, tmp_path / "s.png")
    sheet = Image.open(tmp_path / "s.png")
    assert sheet.size == (2 + 3 * 10, 2 + 2 * 10)
    assert [[number_at(sheet, 6 + 10 * x, 6 + 10 * y) for x in range(3)] for y in range(2)] == [[1, 3, 5], [0, 2, 4]]
    assert asked[1:] == sorted(asked[1:])  # files are read in their order


def test_what_is_told_of_a_folder_lies_beside_it(tmp_path, monkeypatch):
    assert beside(tmp_path / "a.b", "grid.png") == tmp_path / "a.b-grid.png"
    monkeypatch.chdir(tmp_path)
    assert str(beside(type(tmp_path)("x/"), "grid.png")) == "x-grid.png"
    assert beside(type(tmp_path)("."), "grid.png") == tmp_path.with_name(f"{tmp_path.name}-grid.png")


def test_every_kind_of_damage_to_a_png_is_seen(tmp_path):
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    save_png(Image.fromarray(pixels), path, {"Title": "é", "x": "日本"})
    assert read_notes(path) == {"Title": "é", "x": "日本"}
    assert is_whole_png(path, (8, 9))
    assert not is_whole_png(path, (9, 8))
    assert not is_whole_png(tmp_path / "none.png", (8, 9))
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place])
        assert not is_whole_png(path, (8, 9)), place
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert not is_whole_png(path, (8, 9)), place
