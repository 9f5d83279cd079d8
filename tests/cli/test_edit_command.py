import json

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.assemble.editing import fit_mask, read_original
from edt_diffusion.assemble.facts import model_facts
from edt_diffusion.data.picture import fit_picture
from edt_diffusion.pipelines.loading import load_pipeline
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.pictures import save_png
from edt_diffusion.util.rng import image_seed

QUICK = ("--steps", 3, "--quiet")
REPAINT = ("--jump-length", 1, "--resamplings", 2)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def save(path, array: np.ndarray):
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def photo(work):
    return save(work / "photo.png", np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))


@pytest.fixture
def mask(work):
    painted = np.zeros((8, 8), dtype=np.uint8)
    painted[2:5, 3:7] = 255
    return save(work / "mask.png", painted)


def test_without_a_mask(edt, run, work, photo):
    said = edt("edit", run, photo, "--class", "tench", "--strength", 0.7, "-n", 2, *QUICK, "--out", "new", "--json")
    assert (said.code, said.err) == (0, [])
    facts = json.loads(said.out[-1])
    assert facts["seeds"] == [image_seed(0, 0), image_seed(0, 1)]
    assert (facts["strength"], facts["picture_size"], facts["size"]) == (0.7, [8, 8], [8, 8])
    assert sorted(path.name for path in (work / "new").iterdir()) == ["edit-0000.png", "edit-0001.png", "grid.png"]
    made = [pixels(work / "new" / f"edit-000{index}.png") for index in range(2)]
    assert (made[0] != made[1]).mean() > 0.5
    assert pixels(work / "new" / "grid.png").shape == (68, 3 * 66 + 2, 3)  # the original and two results
    notes = json.loads(Image.open(work / "new" / "edit-0001.png").text["edt-diffusion"])
    assert (notes["seed"], notes["class"], notes["strength"]) == (image_seed(0, 1), "tench", 0.7)


def test_with_a_mask(edt, run, work, photo, mask):
    said = edt("edit", run, photo, "--class", 1, "--mask", mask, "-n", 3, *QUICK, *REPAINT)
    assert (said.code, said.err) == (0, [])
    assert said.out[-1] == "wrote 3 pictures and grid.png to edits (3 steps, 5 evaluations with the resamplings)"
    anew = pixels(mask) > 0
    for index in range(3):
        made = pixels(work / "edits" / f"edit-000{index}.png")
        assert (made[~anew] == pixels(photo)[~anew]).all()
        assert (made[anew] != pixels(photo)[anew]).mean() > 0.7
    sheet = pixels(work / "edits" / "grid.png")
    assert sheet.shape == (68, 5 * 66 + 2, 3)
    assert (sheet[2:66:8, 68:132:8, 0] == pixels(mask)).all()


def test_no_plan_is_printed_for_what_is_refused(edt, run, photo, mask):
    for options in (("--steps", 5000), ("--jump-length", 500), ("--resamplings", 0)):
        said = edt("edit", run, photo, "--class", 0, "--mask", mask, *options)
        assert (said.code, len(said.err)) == (2, 1), said.err


def test_info_tells_how_a_picture_was_edited(edt, run, work, photo, mask):
    asked = ("--class", "tench", "--mask", mask, "--no-paste", "--precision", "bf16", "--batch-size", 3)
    assert edt("edit", run, photo, *asked, "-n", 1, *QUICK, *REPAINT).code == 0
    file = "edits/edit-0000.png"
    facts = json.loads(edt("info", file, "--json").out[-1])
    assert (facts["what"], facts["picture"], facts["source"], facts["mask"]) == ("edit", file, "photo.png", "mask.png")
    assert (facts["class"], facts["batch"], facts["precision"], facts["paste"]) == ("tench", 3, "bf16", False)
    saved = load_pipeline(run)
    assert facts["model"] == model_facts(saved, run.name)  # of the weights before the other precision
    assert saved.class_names[facts["label"]] == "tench"
    assert facts["attention_modulation"] is None
    shown = dict(line.split(maxsplit=1) for line in edt("info", file).out[1:] if not line.startswith(("made", "jump")))
    assert shown["class"] == f"{facts['label']} (tench)"
    assert shown["model"] == f"{run.name} ({facts['model']['transformer_sha256'][:12]})"
    assert (shown["source"], shown["mask"], shown["steps"], shown["paste"]) == ("photo.png", "mask.png", "3", "no")
    assert shown["AMM"] == "none"  # it is off
    assert "again" not in shown
    assert edt("edit", run, photo, "--class", 0, "--strength", 0.5, "-n", 1, *QUICK).code == 0
    shown = edt("info", file).out
    assert f"{'strength':<14} 0.5" in shown
    assert not any(line.startswith(("mask", "paste")) for line in shown)


def test_info_of_bare_facts_shows_no_others(edt, work):
    notes = {"edt-diffusion": json.dumps({"seed": 3, "version": "1"})}
    save_png(Image.new("L", (4, 4)), work / "old.png", notes)
    assert edt("info", "old.png").out == ["old.png", "seed           3", "made by        edt-diffusion 1"]


def test_results_of_before_are_removed_but_not_what_is_not_ours(edt, run, work, photo):
    assert edt("edit", run, photo, "--class", 0, "-n", 4, *QUICK).code == 0
    out = work / "edits"
    Image.new("L", (8, 8)).save(out / "edit-0007.png")
    (out / "edit-0008.png").write_text("no picture")
    (out / "edit-0001.png").rename(out / "edit-mine.png")
    assert edt("edit", run, out / "edit-0003.png", "--class", 0, "-n", 1, *QUICK).code == 0
    left = ["edit-0000.png", "edit-0003.png", "edit-0007.png", "edit-0008.png", "edit-mine.png", "grid.png"]
    assert sorted(path.name for path in out.iterdir()) == left


def test_another_size_is_fitted_and_said(edt, run, work):
    wide = save(work / "wide.png", np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    said = edt("edit", run, wide, "--class", "tench", "-n", 1, *QUICK)
    assert said.out[-1].endswith("; wide.png was scaled and cut from 32 x 16 to 8 x 8 pixels")
    shown = pixels(work / "edits" / "grid.png")[2:66:8, 2:66:8, 0]
    assert (shown == np.asarray(fit_picture(Image.open(wide).convert("L"), (8, 8), "center"))).all()


# ---- masks ----


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (16, 40), (37, 23), (100, 64), (5, 9), (61, 200)])
def test_masks_are_fitted_as_pictures_are(size):
    """What changes under a mask changes the fitted picture where the fitted mask is, and hardly elsewhere."""
    marked = np.zeros(size, dtype=bool)
    top, left = size[0] // 3, size[1] // 2
    marked[top : top + max(size[0] // 4, 1), left : left + max(size[1] // 5, 1)] = True
    before = np.full(size, 100, dtype=np.uint8)
    after = np.where(marked, 200, before).astype(np.uint8)
    fitted = [np.asarray(fit_picture(Image.fromarray(one), (8, 8), "center")).astype(int) for one in (before, after)]
    changed, anew = fitted[1] - fitted[0], fit_mask(marked, (8, 8))
    assert anew.any()
    assert changed[~anew].max(initial=0) <= 50  # half of the change: at most a rim that the bicubic filter spreads
    assert (changed[anew] > 0).mean() > 0.8


def test_masks_in_closed_form():
    marked = np.zeros((32, 64), dtype=bool)
    marked[9, 16] = marked[31, 47] = marked[0, 15] = marked[0, 48] = True  # the last two beside the middle square
    expected = np.zeros((8, 8), dtype=bool)
    expected[2, 0] = expected[7, 7] = True
    assert (fit_mask(marked, (8, 8)) == expected).all()
    small = np.eye(4, dtype=bool)
    assert (fit_mask(small, (8, 8)) == np.kron(small, np.ones((2, 2), dtype=bool))).all()


def test_white_and_transparent_are_made_anew_from_128_on(work, photo):
    gray = np.full((8, 8), 127, dtype=np.uint8)
    gray[0] = 128
    assert (read_original(photo, save(work / "a.png", gray), (8, 8, 1)).mask == (gray == 128)).all()
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[..., 3] = 255
    clear[3, :, 3] = 0
    assert (read_original(photo, save(work / "b.png", clear), (8, 8, 1)).mask == (clear[..., 3] == 0)).all()


@pytest.mark.parametrize(
    ("painted", "words"),
    [
        (np.full((8, 8), 255, dtype=np.uint8), "all white, which keeps nothing"),
        (np.zeros((8, 8), dtype=np.uint8), "all black, which changes nothing"),
        (np.zeros((6, 8), dtype=np.uint8), "8 x 6 pixels and .*photo.png has 8 x 8"),
    ],
)
def test_masks_that_say_nothing(work, photo, painted, words):
    with pytest.raises(UserError, match=words):
        read_original(photo, save(work / "m.png", painted), (8, 8, 1))


def test_a_mask_of_what_is_cut_away(work):
    wide = save(work / "wide.png", np.zeros((8, 24), dtype=np.uint8))
    painted = np.zeros((8, 24), dtype=np.uint8)
    painted[:, :5] = 255
    with pytest.raises(UserError, match="all black, which changes nothing in the part of the picture that is used"):
        read_original(wide, save(work / "m.png", painted), (8, 8, 1))


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "2 classes: say what to make of the picture with --class"),
        (("--class", "tenhc"), "did you mean 'tench'"),
        (("--class", 0, "--strength", 0), "--strength 0: expected above 0 and at most 1"),
        (("--class", 0, "--strength", 1.5), "--strength 1.5"),
        (("--class", 0, "--strength", 0.5, "--mask", "mask.png"), "--strength 0.5 is for changing pictures without"),
        (("--class", 0, "--scheduler", "ddim", "--mask", "mask.png"), "--scheduler ddim is for"),
        (("--class", 0, "--jump-length", 3), "--jump-length 3 is for changing pictures with a mask: give a --mask"),
        (("--class", 0, "--resamplings", 3), "--resamplings 3 is for"),
        (("--class", 0, "--mask", "gone.png"), "gone.png"),
        (("--class", 0, "--mask", "text.png"), "text.png cannot be read: not a picture"),
        (("--class", 0, "--mask", "mask.png", "--jump-length", 0), "--jump-length 0: expected at least 1"),
        (
            ("--class", 0, "--mask", "mask.png", "--steps", 4),
            "--jump-length 10 with 4 steps: expected at most 3, or --resamplings 1",
        ),
        (("--class", 0, "--mask", "mask.png", "--jump-length", 500), "--jump-length 500 with 250 steps"),
        (("--class", 0, "--mask", "mask.png", "--resamplings", 0), "--resamplings 0: expected at least 1"),
        (("--class", 0, "--mask", "mask.png", "--steps", 5000), "--steps 5000: the model's noising process has 1000"),
        (("--class", 0, "--mask", "mask.png", "--steps", 1), "--steps 1: a masked part needs at least 2"),
        (("--class", 0, "--steps", 1001), "--steps 1001: the model's noising process has 1000 steps"),
        (("--class", 0, "--no-paste"), "--no-paste is for changing pictures with a mask: give a --mask"),
        (("--class", 0, "--paste"), "--paste is for changing pictures with a mask: give a --mask"),
        (("--class", 0, "--scheduler", "euler"), "'euler' cannot sample"),
        (("--class", 0, "--guidance", "inf"), "--guidance inf"),
    ],
)
def test_mistakes_are_one_line(edt, run, work, photo, mask, options, words):
    (work / "text.png").write_text("no picture")
    said = edt("edit", run, photo, *options, "--quiet")
    assert said.code == 2
    assert len(said.err) == 1
    assert words in said.err[0]
    assert not (work / "edits").exists()


def test_an_unreadable_picture(edt, run, work):
    said = edt("edit", run, "gone.jpg", "--class", 0)
    assert (said.code, len(said.err)) == (2, 1)
    assert "gone.jpg cannot be read" in said.err[0]


def test_help_fits_a_screen_and_ends_with_an_example(edt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = edt("edit", "--help")
    assert said.code == 0
    assert len(said.out) <= 40
    assert max(map(len, said.out)) <= 80
    assert said.out[-1].split()[:3] == ["Example:", "edt", "edit"]
