"""The search for a placement of attention modulation: its course, its judgement, its folder, its answer."""

import itertools
import json
import math
import os
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny_backbones import tiny_backbone
from tiny_models import TINY, tiny_model

from edt_diffusion import ClassConditionalPipeline, EDTTransformer2DModel
from edt_diffusion.evaluation.extractors import open_extractor
from edt_diffusion.evaluation.extractors.base import Extractor, Features
from edt_diffusion.evaluation.pixels import colour_tensor
from edt_diffusion.models.summary import named_model
from edt_diffusion.nn.modulation import AttentionModulation, modulation_matrix
from edt_diffusion.sampling.stopping import Stopped
from edt_diffusion.studies.amm_search import Plan, Request, conclusion, features, halving, job, lines, search
from edt_diffusion.studies.amm_search.candidates import (
    Distinct,
    options,
    parse_blocks,
    parse_formulas,
    parse_radii,
    single_blocks,
    usable_blocks,
    words,
)
from edt_diffusion.studies.amm_search.features import FRESH, spread_labels
from edt_diffusion.studies.amm_search.judging import decide
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.rng import image_seed

RADII, FORMULAS = ["0.5R", "0.75R", None], ["exp", "cos"]
POOL = single_blocks(range(10), RADII, FORMULAS)


# ---- the course ----


class Rigged:
    """A value that is known of every setting, plus noise that all settings of one number of pictures share.

    `private` is the deviation, over the root of the number of pictures, of noise of a setting's own.
    """

    def __init__(self, gains, common=5.0, private=0.0):
        self.gains, self.common, self.private = gains, common, private
        self.seen: dict[AttentionModulation | None, list[int]] = {}

    def __call__(self, setting, pictures):
        self.seen.setdefault(setting, []).append(pictures)
        shared = self.common * np.random.default_rng(pictures).normal()
        own = zlib.crc32(f"{setting} {pictures}".encode())
        noise = self.private * np.random.default_rng(own).normal() / math.sqrt(pictures)
        return 10 + shared + noise - (0 if setting is None else self.gain(setting))

    def gain(self, setting):
        factor = {"exp": 1.0, "cos": 0.8}[setting.formula] * {"0.5R": 0.5, "0.75R": 1.0, None: 0.7}[setting.radius]
        return factor * sum(self.gains[block] for block in setting.blocks)

    def pictures(self):
        """That were made: of each setting as many as it was ever measured on."""
        return sum(max(seen) for seen in self.seen.values())


@pytest.mark.parametrize("best", list(itertools.combinations((1, 4, 5, 8), 2)))
def test_halving_finds_the_best_pair_whatever_noise_all_share(best):
    gains = {block: 1.0 if block in best else -0.1 * (block + 1) for block in range(10)}
    rigged = Rigged(gains, common=100.0)
    course = halving.run(POOL, rigged, Plan())
    assert course.best == AttentionModulation(best, "exp", "0.75R")
    assert [rung.round for rung in course.rungs] == [1] * 4 + [2] * 2


def test_the_numbers_of_a_round_are_those_of_the_plan():
    rigged = Rigged({block: 0.1 * block + 0.1 for block in range(10)})
    course = halving.run(POOL, rigged, Plan())
    first = [(rung.pictures, len(rung.values), len(rung.kept)) for rung in course.rungs if rung.round == 1]
    assert first == [(200, 60, 20), (400, 20, 7), (800, 7, 3), (1600, 3, 3)]  # 60/3, 20/3, 7/3, rounded up
    # The three finalists are 9, 8 and 7 with the best formula and radius; six partners each, 9 with 8 counted once ...
    children = {setting.blocks for setting in rigged.seen if setting is not None and len(setting.blocks) == 2}
    assert children == {tuple(sorted((a, b))) for a in (9, 8, 7) for b in (9, 8, 7, 6, 5, 4) if a != b}
    assert len(children) == 12
    # ... then only finalists are left sooner, and they go to the last rung at once.
    second = [(rung.pictures, len(rung.values), len(rung.kept)) for rung in course.rungs if rung.round == 2]
    assert second == [(200, 15, 5), (400, 5, 3), (1600, 3, 3)]
    assert course.best == AttentionModulation((8, 9), "exp", "0.75R")
    # off: 1600; 40 stopped after 200, 13 after 400, 4 after 800, 3 after 1600; of the pairs 12 new ones to begin with.
    singles = 40 * 200 + 13 * 400 + 4 * 800 + 3 * 1600
    assert rigged.pictures() == 1600 + singles + sum(
        max(rigged.seen[s]) for s in rigged.seen if s and len(s.blocks) > 1
    )


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(max_blocks=1), Plan(first=10, growth=3, keep=2, finalists=1, partners=2)]
)
@pytest.mark.parametrize("count", [1, 3, 10, 60])
def test_no_search_makes_more_pictures_than_it_says(plan, count):
    for gains in ({block: 1.0 + block for block in range(10)}, {block: 1.0 / (block + 1) for block in range(10)}):
        rigged = Rigged(gains)
        halving.run(POOL[:count], rigged, plan)
        assert rigged.pictures() <= plan.most_pictures(count)
        if plan.max_blocks == 1:  # nothing depends on chance then
            assert rigged.pictures() == plan.most_pictures(count)


def test_a_combination_that_is_a_candidate_already_is_not_tried_as_another():
    pair = AttentionModulation((8, 9), "exp", "0.75R")
    rigged = Rigged({block: 0.1 * block + 0.1 for block in range(10)})
    course = halving.run([*POOL, pair], rigged, Plan(max_blocks=3))
    assert course.best == AttentionModulation((7, 8, 9), "exp", "0.75R")
    assert all(len(set(rung.kept)) == len(rung.kept) for rung in course.rungs)
    second = next(rung for rung in course.rungs if rung.round == 2)
    children = [setting for setting in second.values if len(setting.blocks) == 2 and setting != pair]
    assert pair in second.values
    assert len(second.values) == len(children) + 2 + 1 + 4  # two other parents, and four blocks more for the pair


def test_a_budget_makes_the_first_rung_smaller():
    plan = Plan(first=200).within(20_000, 60, 50)
    assert plan.first == 100  # 150 in the first rung may take 23,700 pictures
    assert plan.most_pictures(60) <= 20_000 < Plan(first=150).most_pictures(60)
    with pytest.raises(UserError, match="--budget-images 100: 60 candidates may take"):
        Plan(first=200).within(100, 60, 50)


def test_where_nothing_helps_off_is_best_and_nothing_is_combined():
    rigged = Rigged({block: -1.0 - block for block in range(10)})
    course = halving.run(POOL, rigged, Plan())
    assert course.best is None
    assert {rung.round for rung in course.rungs} == {1}
    assert all(setting is None or len(setting.blocks) == 1 for setting in rigged.seen)


def test_what_equals_off_is_not_better_than_it():
    assert halving.run(POOL, Rigged(dict.fromkeys(range(10), 0.0)), Plan()).best is None


def test_rounds_go_on_to_as_many_blocks_as_are_allowed_and_help():
    gains = {block: 1.0 if block < 3 else -1.0 for block in range(10)}
    for most, expected in ((1, 1), (2, 2), (3, 3), (6, 3)):
        course = halving.run(POOL, Rigged(gains), Plan(max_blocks=most))
        assert course.best is not None
        assert len(course.best.blocks) == expected


def test_halving_is_robust_to_noise_of_the_candidates_themselves():
    gains = {block: 2.0 if block == 6 else 0.0 for block in range(10)}
    course = halving.run(POOL, Rigged(gains, private=3.0), Plan(max_blocks=1))  # deviation 0.2 at 200 pictures
    assert course.best is not None
    assert course.best.blocks == (6,)


# ---- candidates ----


def test_words_become_candidates():
    assert parse_blocks("0-2,7", 12) == [0, 1, 2, 7]
    assert parse_blocks("10+7", 12) == [7, 10]
    assert parse_radii("0.5R, 1.0R,4,0.5R") == ["0.5R", None, 4.0]
    assert parse_formulas("cos,exp,cos") == ["cos", "exp"]
    for call, text in ((parse_blocks, "0-12"), (parse_blocks, "a"), (parse_blocks, "5-3"), (parse_blocks, "-1")):
        with pytest.raises(UserError, match="--blocks"):
            call(text, 12)
    for text in ("R", "0R", "-1", "nan", "far"):
        with pytest.raises(UserError, match="--radii"):
            parse_radii(text)
    with pytest.raises(UserError, match="did you mean 'exp'"):
        parse_formulas("expp")


def test_settings_in_words():
    setting = AttentionModulation((10, 7), "cos", "0.75R")
    assert words(setting) == "7+10 cos 0.75R"
    assert options(setting) == "--amm 7,10 --amm-formula cos --amm-radius 0.75R"
    assert (words(None), options(None)) == ("off", "--amm off")
    assert options(AttentionModulation((1,))) == "--amm 1 --amm-formula exp"


def test_blocks_whose_grid_is_too_small_are_no_candidates():
    model = tiny_model(sample_size=8, patch_size=2, depths=(1, 1, 1, 1, 2), dims=(16,) * 5, num_heads=(2,) * 5)
    assert [grid for _, grid in model.attention_layers()] == [(4, 4), (2, 2), (1, 1), (2, 2), (4, 4), (4, 4)]
    assert usable_blocks(model) == [0, 4, 5]
    with pytest.raises(UserError, match="at least 3x3"):
        usable_blocks(model, [1, 2])


def test_settings_that_do_the_same_are_tried_once():
    model = tiny_model()  # grids of 8x8, 4x4, 8x8
    near = single_blocks([0, 2], ["0.95R", "0.99R", None, 7.0], ["exp"])
    kept = Distinct(model).of(near)
    expected = []
    for setting in near:  # by the matrices themselves, one by one
        grid = model.attention_layers()[setting.blocks[0]][1]
        matrix = modulation_matrix(*grid, setting.formula, setting.radius)
        same = [
            other
            for other in expected
            if other.blocks == setting.blocks
            and torch.equal(modulation_matrix(*grid, other.formula, other.radius), matrix)
        ]
        expected += [] if same else [setting]
    assert kept == expected
    assert len(kept) < len(near)


# ---- pictures ----


def test_classes_of_the_first_pictures_are_a_random_part_of_them_and_stay():
    labels = spread_labels(1000, 100, seed=3)
    assert labels is not None
    for start in range(0, 1000, 100):
        assert sorted(labels[start : start + 100]) == list(range(100))
    assert list(labels[:20]) != list(range(20))
    assert list(labels[:100]) != list(labels[100:200])
    np.testing.assert_array_equal(spread_labels(250, 100, seed=3), labels[:250])
    np.testing.assert_array_equal(spread_labels(130, 100, seed=3, start=270), labels[270:400])
    assert spread_labels(10, None, seed=3) is None
    assert (spread_labels(1000, 100, seed=4) != labels).any()


# ---- judgement ----


@pytest.mark.parametrize(
    ("low", "high", "off", "least", "lower", "wins"),
    [
        (-2.0, -0.5, 10.0, 0.0, True, True),
        (-2.0, 0.1, 10.0, 0.0, True, False),
        (-2.0, 0.0, 10.0, 0.0, True, False),
        (0.5, 2.0, 10.0, 0.0, True, False),
        (-2.0, -0.11, 10.0, 0.01, True, True),  # 1 % of 10 is 0.1
        (-2.0, -0.09, 10.0, 0.01, True, False),
        (0.02, 0.2, 0.5, 0.01, False, True),  # more is better
        (-0.01, 0.2, 0.5, 0.0, False, False),
        (-2.0, -0.5, 0.5, 0.0, False, False),
        (-0.2, -0.02, -0.1, 0.01, True, True),  # an unbiased estimate below zero
        (None, None, 10.0, 0.0, True, False),
    ],
)
def test_a_setting_wins_if_all_of_its_interval_is_better(low, high, off, least, lower, wins):
    best = AttentionModulation((1,))
    answer, why = decide(best, {"low": low, "high": high}, off, least, lower)
    assert answer == (best if wins else None)
    assert "fresh seeds" in why


@pytest.mark.parametrize(("noise", "wins"), [(None, True), (20.0, True), (13.4, True), (13.3, False), (8.0, False)])
def test_nothing_wins_where_samples_are_hardly_better_than_noise(noise, wins):
    best = AttentionModulation((1,))
    answer, why = decide(best, {"low": -2.0, "high": -1.0}, 10.0, 0.01, True, noise)  # three quarters of 13.33 is 10
    assert answer == (best if wins else None)
    assert wins or "not clearly nearer to the reference (10) than the noise they begin from" in why


def test_without_a_candidate_better_than_off_nothing_is_confirmed():
    assert decide(None, None, None, 0.0, True)[0] is None


# ---- the whole ----


class Brightness(Extractor):
    """Mean and deviation of each quarter of the first channel: eight features."""

    name, sha256, preprocessing, dimensions = "brightness", "5" * 64, "none", 8

    def __call__(self, images: torch.Tensor) -> Features:
        parts = images[:, 0].float().div(255).unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).flatten(1, 2)
        return Features(torch.cat((parts.mean(dim=2), parts.std(dim=2)), dim=1))


# How much brighter, toward the reference, each block's modulation makes the pictures that `Made` makes.
BRIGHTER = {0: -0.02, 1: 0.01, 2: 0.0, 3: 0.06, 4: 0.04}


class Made:
    """Stands for `Samples`: noise of the pictures' own seeds, brighter by what is known of the modulation."""

    made: list[tuple[str, int, int]] = []
    stops_after: int | None = None
    gains = BRIGHTER
    # A setting by whose chance the search is to be misled, as (blocks, brightness in the search only).
    lucky: tuple[tuple[int, ...], float] | None = None

    def __init__(self, pipeline, setting, labels, count, seed, batch, seeds):
        assert setting.amm == "saved"
        self.pipeline, self.setting, self.seeds, self.batch = pipeline, setting, seeds, batch
        self.labels = labels

    def make(self, start, stop):
        if Made.stops_after is not None and len(Made.made) >= Made.stops_after:
            os.kill(os.getpid(), signal.SIGINT)
        modulation = self.pipeline.transformer.attention_modulation
        fresh = self.seeds[0] != image_seed(0, 0)
        Made.made.append((f"{words(modulation)} {'confirm' if fresh else 'search'}", start, stop))
        draws = [np.random.default_rng(self.seeds[number]).random((8, 8, 3)) for number in range(start, stop)]
        shift = 0.0
        if modulation is not None:
            factor = {"exp": 1.0, "cos": 0.8}[modulation.formula] * {"0.5R": 0.5, None: 1.0}[modulation.radius]
            shift = factor * sum(Made.gains[block] for block in modulation.blocks)
            if Made.lucky is not None and modulation.blocks == Made.lucky[0] and not fresh:
                shift += Made.lucky[1]
        self.pipeline.transformer(
            torch.zeros(stop - start, 3, 8, 8), torch.zeros(stop - start), torch.zeros(stop - start, dtype=torch.int64)
        )
        return np.rint(255 * (0.2 + 0.4 * np.stack(draws) + shift)).astype(np.uint8), 0.5

    def facts(self):
        return {
            "guidance": self.setting.guidance, "scheduler": "ddim", "steps": 2, "precision": "fp32",
            "attention_modulation": None,
        }  # fmt: skip


def save_model(folder: Path, network: EDTTransformer2DModel) -> Path:
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=True)
    ClassConditionalPipeline(network, scheduler, class_names=list("abcde")).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model", tiny_model())


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """Real pictures that are 0.1 brighter than samples without modulation."""
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "real.npz"
    draws = np.random.default_rng(5).random((400, 8, 8, 3))
    np.savez(path, arr_0=np.rint(255 * (0.3 + 0.4 * draws)).astype(np.uint8))
    return path


@pytest.fixture
def rigged(monkeypatch):
    """Searches whose outcome is known: the modules' samples and extractor are replaced."""
    monkeypatch.setattr(features, "Samples", Made)
    monkeypatch.setattr(job, "open_extractor", lambda *_: Brightness())
    for name, value in (("made", []), ("stops_after", None), ("gains", BRIGHTER), ("lucky", None)):
        monkeypatch.setattr(Made, name, value)
    return Made


def request(model, reference, out=None, **fields) -> Request:
    plan = Plan(first=20, finalists=2)
    defaults = {"radii": "1R", "formulas": "exp", "confirm": 40, "batch": 20, "plan": plan, "metric": "fid"}
    return Request(str(model), str(reference), out=out, **{**defaults, **fields})


def saved_modulation(folder: Path):
    return json.loads((folder / "transformer" / "config.json").read_text())["attention_modulation"]


def test_a_rigged_search_finds_what_is_known_to_be_best_and_saves_it(model, reference, rigged, tmp_path):
    out = tmp_path / "out"
    outcome = search(request(model, reference, out, radii="0.5R,1R", formulas="exp,cos"))
    # 3 and 4 together are exactly as bright as the reference; 20 candidates and the suggested block 4 among them.
    assert outcome.facts["answer"]["setting"] == {"blocks": [3, 4], "formula": "exp", "radius": None}
    assert outcome.facts["candidates"]["tried"] == 20
    off, best = outcome.facts["confirmation"]["rows"]
    # Four means are off by 0.1, and nothing else differs but by chance.
    assert off["value"] == pytest.approx(4 * 0.1**2, rel=0.15)
    assert best["value"] < 0.1 * off["value"]
    assert best["difference"] == pytest.approx(best["value"] - off["value"])
    assert best["difference_low"] < best["difference"] < best["difference_high"] < 0
    assert saved_modulation(model) == {"blocks": [3, 4], "formula": "exp", "radius": None}
    found = ClassConditionalPipeline.from_pretrained(model).transformer.attention_modulation
    assert found == AttentionModulation((3, 4))
    assert json.loads((model / "amm.json").read_text()) == json.loads((out / "amm.json").read_text()) == outcome.facts
    assert {path.name for path in outcome.written} == {"amm.json", "amm.md", "amm.png"}
    page = (out / "amm.md").read_text()
    assert "`edt sample --amm 3,4 --amm-formula exp`" in page
    assert conclusion(outcome.facts).startswith("found 3+4 exp 1R: ")
    assert len(lines(outcome.facts)) == len(outcome.facts["course"]) + 1


def test_the_landscape_and_the_cost_are_those_of_the_pictures(model, reference, rigged, tmp_path):
    plan = Plan(first=40, finalists=2, max_blocks=1)
    whole = request(model, reference, tmp_path / "out", radii="0.5R,1R", formulas="exp,cos", confirm=80, plan=plan)
    facts = search(whole).facts
    landscape = facts["landscape"]
    assert landscape["pictures"] == 40
    cells = {(cell["block"], cell["formula"], cell["radius"]): cell for cell in landscape["cells"]}
    assert len(cells) == 5 * 2 * 2
    for (block, formula, radius), cell in cells.items():
        shift = BRIGHTER[block] * {"exp": 1.0, "cos": 0.8}[formula] * {"0.5R": 0.5, None: 1.0}[radius]
        # Four means 0.1 - shift away in place of 0.1, rounded to levels of 1 / 255.
        assert cell["difference"] == pytest.approx(4 * ((0.1 - shift) ** 2 - 0.1**2), abs=4e-3)
    assert cells[3, "exp", None]["rungs"] == landscape["rungs"]
    assert cells[0, "exp", None]["rungs"] == 1
    # What the fake made is what is told, passes and seconds included.
    for use in ("search", "confirm"):
        pictures = sum(stop - start for name, start, stop in Made.made if name.endswith(use))
        assert facts["cost"][use] == {"pictures": pictures, "passes": pictures, "seconds": pictures / 20 * 0.5}
    assert facts["cost"]["confirm"]["pictures"] == 2 * 80  # nothing is published for this model
    assert len(set(Made.made)) == len(Made.made)  # nothing is made twice
    # 20 candidates, 7, 3, 1 in rungs of 40, 80, 160 and 320. A confirmation shares no seed with the search.
    assert {start for name, start, _ in Made.made if name == "off search"} == set(
        range(0, 320, 20)
    )  # 20 candidates, 7, 3, 1 in rungs of 40, 80, 160 and 320
    assert image_seed(0, FRESH) not in [image_seed(0, number) for number in range(1000)]


def test_a_stopped_search_goes_on_where_it_was(model, reference, rigged, tmp_path, monkeypatch):
    whole = search(request(model, reference, tmp_path / "whole", apply=False))
    everything, Made.made = list(Made.made), []
    handler = signal.getsignal(signal.SIGINT)
    for count in (3, 11):
        monkeypatch.setattr(Made, "stops_after", count)
        with pytest.raises(Stopped, match=r"stopped with \d+ of \d+ pictures in .*; run the same command again"):
            search(request(model, reference, tmp_path / "again", apply=False))
    monkeypatch.setattr(Made, "stops_after", None)
    assert signal.getsignal(signal.SIGINT) == handler
    outcome = search(request(model, reference, tmp_path / "again", apply=False))
    assert sorted(Made.made) == sorted(everything)
    for name in ("answer", "course", "landscape", "confirmation", "cost"):
        assert outcome.facts[name] == whole.facts[name]


def test_the_same_question_again_does_no_work_also_when_the_answer_is_saved(model, reference, rigged, tmp_path):
    first = search(request(model, reference))  # in the model's folder
    assert first.out.parent == model / "amm"
    Made.made = []
    again = search(request(model, reference))
    assert Made.made == []
    assert again.facts == first.facts
    assert again.told == f"{model} has it already"
    assert [entry.name for entry in (model / "amm").iterdir()] == [first.out.name]
    moved = model.rename(tmp_path / "moved")
    assert search(request(moved, reference)).facts == first.facts
    assert Made.made == []


def test_another_question_is_refused_and_nothing_is_changed(model, reference, rigged, tmp_path):
    out = tmp_path / "out"
    search(request(model, reference, out, apply=False))
    before = (out / "amm.json").read_bytes()
    for fields, name in (
        ({"seed": 1}, "seed"),
        ({"radii": "0.5R"}, "candidates"),
        ({"confirm": 100}, "confirm"),
        ({"least_gain": 0.0}, "least_gain"),
        ({"sampling": {"guidance": 3.0}}, "sampling"),
    ):
        with pytest.raises(UserError, match=f"another {name}: choose another --out"):
            search(request(model, reference, out, **fields))
    other = save_model(tmp_path / "other", tiny_model(seed=1))
    with pytest.raises(UserError, match="another model"):
        search(request(other, reference, out))
    assert (out / "amm.json").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'notes.txt' and no question.json"):
        search(request(model, reference, tmp_path / "full"))


def test_no_apply_leaves_the_model_alone(model, reference, rigged, tmp_path):
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    outcome = search(request(model, reference, tmp_path / "out", apply=False))
    assert outcome.facts["answer"]["setting"] is not None
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    assert "edt sample --amm 3,4 --amm-formula exp" in outcome.told


def test_the_setting_of_a_run_goes_into_its_model(model, reference, rigged, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    model.rename(run / "model")
    outcome = search(request(run, reference))
    assert outcome.out.parent == run / "amm"
    assert saved_modulation(run / "model")["blocks"] == [3, 4]
    assert (run / "model" / "amm.json").is_file()


@pytest.mark.parametrize(("family", "gains"), [("DiT", {2: 0.06}), ("MDTv2", {5: 0.06})])
def test_other_backbones_are_searched_alike(family, gains, reference, rigged, tmp_path, monkeypatch):
    model = save_model(tmp_path / "model", tiny_backbone(family))
    monkeypatch.setattr(Made, "gains", {**dict.fromkeys(range(6), -0.01), **gains})
    search(request(model, reference, tmp_path / "out"))
    assert saved_modulation(model) == {"blocks": [*gains], "formula": "exp", "radius": None}
    found = ClassConditionalPipeline.from_pretrained(model).transformer
    assert type(found).__name__ == {"DiT": "DiT2DModel", "MDTv2": "MDT2DModel"}[family]
    assert found.attention_modulation == AttentionModulation((*gains,))


@pytest.mark.parametrize(
    ("size", "guidance", "blocks"), [("EDT-S/2", 1.0, (7, 10)), ("EDT-S/2", 2.0, (8,)), ("DiT-S/2", 1.5, (8, 10))]
)
def test_what_is_published_and_saved_is_among_the_candidates(size, guidance, blocks):
    network, saved = named_model(size, "256"), AttentionModulation((0, 11), "cos", "0.9R")
    pool = job._pool(network, guidance, [3], [None], ["exp"], saved)
    assert pool == [AttentionModulation((3,)), AttentionModulation(blocks), saved]


def test_where_modulation_only_harms_off_is_the_answer_and_a_saved_setting_is_turned_off(
    reference, rigged, tmp_path, monkeypatch
):
    network = tiny_model()
    network.set_attention_modulation([1, 2], "cos", "0.5R")
    model = save_model(tmp_path / "model", network)
    monkeypatch.setattr(Made, "gains", dict.fromkeys(range(5), -0.02))
    outcome = search(request(model, reference, tmp_path / "kept", apply=False))
    assert outcome.facts["answer"]["setting"] is None
    assert outcome.facts["saved"] == {"blocks": [1, 2], "formula": "cos", "radius": "0.5R"}
    assert "1+2 cos 0.5R search" in {name for name, _, _ in Made.made}  # what is saved is a candidate
    assert saved_modulation(model)["blocks"] == [1, 2]
    assert conclusion(outcome.facts).startswith("AMM off is best")
    outcome = search(request(model, reference, tmp_path / "applied"))
    assert saved_modulation(model) is None
    assert outcome.told == f"AMM, which was saved in {model}, is now off"


def test_luck_in_the_search_does_not_survive_the_confirmation(model, reference, rigged, tmp_path, monkeypatch):
    monkeypatch.setattr(Made, "gains", dict.fromkeys(range(5), 0.0))
    monkeypatch.setattr(Made, "lucky", ((2,), 0.05))
    facts = search(request(model, reference, tmp_path / "out")).facts
    assert facts["best_of_search"]["blocks"] == [2]
    assert facts["answer"] == {
        "setting": None, "words": "off",
        "why": "on fresh seeds the interval of the difference is not all better than off",
    }  # fmt: skip
    assert saved_modulation(model) is None


def test_a_gain_below_the_least_is_none(model, reference, rigged, tmp_path, monkeypatch):
    monkeypatch.setattr(Made, "gains", {**dict.fromkeys(range(5), -0.01), 3: 0.01})
    small = search(request(model, reference, tmp_path / "small", apply=False, least_gain=0.0)).facts
    assert small["answer"]["setting"]["blocks"] == [3]
    gained = -small["confirmation"]["rows"][1]["difference"] / small["confirmation"]["rows"][0]["value"]
    assert 0.1 < gained < 0.3  # (0.1² - 0.09²) / 0.1² = 0.19
    large = search(request(model, reference, tmp_path / "large", apply=False, least_gain=0.3)).facts
    assert large["answer"] == {
        "setting": None, "words": "off",
        "why": "on fresh seeds the best candidate is better than off, but not all of the interval by 30 % "
               "of off's value",
    }  # fmt: skip
    assert conclusion(large).startswith("AMM stays off: on fresh seeds the best candidate is better than off, but")


def test_a_model_that_makes_noise_is_best_off(model, rigged, tmp_path, monkeypatch):
    """White pictures are as far from the samples as from noise, and brighter samples are nearer to them."""
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    white = tmp_path / "white.npz"
    np.savez(white, arr_0=np.random.default_rng(0).integers(254, 256, (400, 8, 8, 3), np.uint8))
    facts = search(request(model, white, tmp_path / "out")).facts
    assert facts["best_of_search"]["blocks"] == [3, 4]
    assert facts["confirmation"]["rows"][1]["difference_high"] < 0
    # Clipped Gaussian noise: mean 1/2, deviation sqrt(erf(1/sqrt 2) - 2 phi(1) + P(|z| > 1)) / 2 = 0.3592.
    assert facts["confirmation"]["noise"] == pytest.approx(4 * (0.5**2 + 0.3592**2), rel=0.05)
    assert facts["answer"]["setting"] is None
    assert conclusion(facts).startswith("AMM stays off: samples are not clearly nearer to the reference (1.")
    assert "| the noise that samples begin from |" in (tmp_path / "out" / "amm.md").read_text()
    assert saved_modulation(model) is None


def test_a_metric_of_which_more_is_better_is_turned_round(model, reference, rigged, tmp_path):
    facts = search(request(model, reference, tmp_path / "out", metric="density", apply=False)).facts
    assert facts["metric"]["lower_is_better"] is False
    first = facts["course"][0]["candidates"]
    assert [each["value"] for each in first] == sorted((each["value"] for each in first), reverse=True)
    assert facts["best_of_search"]["blocks"] == [3, 4]


def test_an_untrained_network_is_best_off_through_real_sampling(reference, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = EDTTransformer2DModel(**TINY)  # its gates are zero: attention says nothing yet
    torch.nn.init.normal_(network.proj_out.weight, std=0.3)
    model = save_model(tmp_path / "model", network.eval())
    outcome = search(
        request(
            model, reference, tmp_path / "out", plan=Plan(first=12, finalists=2), batch=6, extractor="pixels",
            sampling={"scheduler": "ddim", "steps": 2, "guidance": 1.5}, radii="1R", formulas="exp",
        )
    )  # fmt: skip
    assert outcome.facts["answer"]["setting"] is None
    cost = outcome.facts["cost"]["search"]
    assert cost["passes"] == 4 * cost["pictures"]  # two steps, both halves of guidance
    assert cost["seconds"] > 0
    assert len({rung["off"] for rung in outcome.facts["course"]}) == len(outcome.facts["course"])
    for rung in outcome.facts["course"]:
        assert {each["difference"] for each in rung["candidates"]} == {0.0}


def test_real_samples_depend_on_the_modulation_and_on_nothing_else(model, reference, tmp_path):
    fields = {
        "plan": Plan(first=4, finalists=1, max_blocks=1), "batch": 4, "extractor": "pixels", "confirm": 20,
        "sampling": {"scheduler": "ddim", "steps": 2, "guidance": 1.0}, "radii": "1R", "formulas": "exp",
        "blocks": "0,4", "metric": "kid", "apply": False,
    }  # fmt: skip
    outcome = search(request(model, reference, tmp_path / "out", **fields))
    pipeline = ClassConditionalPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    labels = spread_labels(4, 5, 0).tolist()
    for name, blocks in (("off", None), ("4_exp_1R", [4])):
        pipeline.transformer.set_attention_modulation(blocks)
        images = pipeline(
            labels, num_inference_steps=2, scheduler="ddim", seeds=[image_seed(0, i) for i in range(4)],
            output_type="uint8",
        ).images  # fmt: skip
        with np.load(tmp_path / "out" / "features" / name / "search-00000.npz") as kept:
            rows = kept["pooled"]
        np.testing.assert_array_equal(rows, open_extractor("pixels")(colour_tensor(images)).pooled.numpy())
    assert outcome.facts["course"][0]["pictures"] == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"confirm": 5}, "--confirm 5: expected at least 20"),
        ({"plan": Plan(first=1)}, "--images 1: expected at least 2"),
        ({"plan": Plan(max_blocks=0)}, "--max-blocks 0: expected at least 1"),
        ({"least_gain": 1.5}, "--least-gain 1.5: expected a share"),
        ({"metric": "fidd"}, "did you mean 'fid'"),
        ({"metric": "sfid"}, "spatial features"),
        ({"blocks": "9"}, "--blocks '9': expected numbers from 0 to 4"),
        ({"sampling": {"scheduler": "none-such"}}, "scheduler"),
        ({"budget": 10}, "--budget-images 10"),
    ],
)
def test_mistakes_are_told_before_anything_is_sampled(model, reference, rigged, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        search(request(model, reference, tmp_path / "out", **fields))
    assert Made.made == []


def test_without_a_reference_there_is_nothing_to_compare_with(model, rigged, tmp_path):
    with pytest.raises(UserError, match="--reference"):
        search(Request(str(model), out=tmp_path / "out"))
