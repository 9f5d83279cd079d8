"""Quality tables: what is asked of the engine, and how a page is laid out from what comes back."""

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edt_diffusion.config import load_config
from edt_diffusion.nn.modulation import AttentionModulation
from edt_diffusion.studies.matrix import Budget, Matrix, Results
from edt_diffusion.studies.matrix.folder import MatrixFolder, Run
from edt_diffusion.studies.reproduce import TABLES, Request, default_folder, find_table, quality, reproduce
from edt_diffusion.studies.reproduce.base import Base, Pictures, choose_base
from edt_diffusion.studies.reproduce.losses import fall_together, windows
from edt_diffusion.studies.reproduce.matching import matched, parameters_used
from edt_diffusion.studies.reproduce.page import Column, Interval
from edt_diffusion.studies.reproduce.quality_tables import STUDIES
from edt_diffusion.studies.reproduce.study import settled
from edt_diffusion.util.errors import UserError

# Student's t at 97.5 % with two degrees of freedom.
T2 = 4.302652729911275
SPENT = {"step": 12, "images": 768, "charged_wall_seconds": 1.0, "charged_cpu_seconds": 1.0, "share": 1.0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 16-pixel pictures, two classes of four."""
    root = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    for name in ("church", "tench"):
        (root / name).mkdir()
        for index in range(4):
            Image.fromarray(draws.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


def request_of(table, pictures, tmp_path, **given):
    return Request(table, tmp_path / table, data=str(pictures), **{"budget": "12steps", "quiet": True, **given})


def base_of(table, pictures, tmp_path, seconds=None, steps=12, **given):
    study = STUDIES[table]
    return choose_base(request_of(table, pictures, tmp_path, **given), seconds, steps, study.doubled)


def matrix_of(table, pictures, tmp_path, budget="12steps", **given):
    base = base_of(table, pictures, tmp_path, **given)
    return quality.build_matrix(
        STUDIES[table], base, request_of(table, pictures, tmp_path, **given), Budget.parse(budget)
    )


def write_scores(folder: Path, matrix: Matrix, value):
    """What the engine leaves of a matrix that is done; `value` gives the metrics of a cell."""
    place = MatrixFolder(folder)
    place.begin(matrix)
    for arm in matrix.arms:
        for seed in matrix.seeds:
            run = Run(arm.name, seed)
            place.run(run).mkdir()
            place.spent(run).write_text("{}")
            for point in matrix.points:
                place.point(run, point).mkdir(parents=True)
                (place.point(run, point) / "point.json").write_text(json.dumps({**SPENT, "step": 12 * point}))
                for variant in matrix.variants:
                    metrics = value(arm.name, seed, point, variant.name)
                    cell = {
                        "arm": arm.name, "seed": seed, "point": point, "variant": variant.name, "metrics": metrics,
                        "details": {name: {"value": v, "label": f"label of {name}"} for name, v in metrics.items()},
                        **SPENT,
                    }  # fmt: skip
                    place.score(run, point, variant).write_text(json.dumps(cell))


@pytest.fixture
def engine(monkeypatch):
    """The engine, replaced: matrices it was given, and cells by a formula."""
    told = types.SimpleNamespace(matrices=[], folders=[], value=lambda arm, seed, point, variant: {"fid": 10.0 + seed})

    def run(matrix, folder, processes=1, threads=None, quiet=False):
        if not (Path(folder) / "matrix.json").is_file():
            write_scores(Path(folder), matrix, told.value)
        told.matrices.append(matrix)
        told.folders.append(Path(folder))
        return Results.read(folder, matrix)

    monkeypatch.setattr(quality, "run_matrix", run)
    return told


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_study_asks_for_trainings_that_can_be_configured(name, pictures, tmp_path):
    matrix = matrix_of(name, pictures, tmp_path)
    for arm in matrix.arms:
        config = matrix.config(arm, 0)
        assert config.data.size == (32 if name == "table2" else 16)
        assert config.model["patch_size"] == 2
    assert {variant.setting().scheduler for variant in matrix.variants} == {"ddim"}
    assert matrix.seeds == ((0,) if name == "figure6" else (0, 1, 2))
    # What is scored, and nothing where there is nothing to score.
    assert matrix.images == {"figure6": 48, "figure10": 0}.get(name, 500)


def test_backbones_are_matched_in_parameters(pictures, tmp_path):
    base = base_of("table1", pictures, tmp_path)
    counts = {name: parameters_used(base.network(name)) for name in ("EDT", "DiT", "MDTv2")}
    assert base.size == "tiny"
    for name, count in counts.items():
        assert abs(count / counts["EDT"] - 1) < 0.03, (name, counts)
    # What only masked passes use is not counted.
    mdt = base.network("MDTv2")
    assert counts["MDTv2"] == sum(p.numel() for p in mdt.parameters()) - sum(
        p.numel() for name, p in mdt.named_parameters() if name in set(mdt.masked_only())
    )
    assert len(mdt.masked_only()) > 0


def test_the_best_width_is_taken():
    arguments = {"sample_size": 8, "patch_size": 1, "in_channels": 3, "num_classes": 5}
    from edt_diffusion.models.dit import DiT2DModel

    for width in (64, 96, 160):
        wanted = parameters_used(DiT2DModel(**arguments, depth=12, hidden_size=width, num_heads=width // 32))
        found = matched("DiT", wanted, arguments)
        assert found == {"depth": 12, "hidden_size": width, "num_heads": width // 32}


def test_the_base_fits_pictures_and_budget(pictures, tmp_path):
    tiny = base_of("table4", pictures, tmp_path, seconds=60.0, steps=None)
    assert (tiny.size, tiny.side, tiny.input_side, tiny.published) == ("tiny", 16, 16, False)
    assert tiny.network("EDT").grids == [(8, 8), (4, 4), (2, 2), (4, 4), (8, 8)]
    assert base_of("table4", pictures, tmp_path, seconds=3600.0, steps=None).size == "small"
    small = base_of("table4", pictures, tmp_path, size="small")
    preset = load_config("small-32").model
    assert dict(small.layout) == {name: preset[name] for name in ("depths", "dims", "num_heads")}
    large = base_of("table4", pictures, tmp_path, size="S", image_size=32)
    assert large.model("DiT") == {"model.name": "DiT", "model.size": "S"}
    assert parameters_used(large.network("EDT")) == pytest.approx(38.3e6, rel=0.02)
    # Twice the side has twice the tokens a side, from the same patches.
    doubled = base_of("table2", pictures, tmp_path)
    assert (doubled.side, doubled.network("EDT").grids[0]) == (32, (16, 16))


def test_settings_of_the_command_line_win_and_wrong_ones_are_told(pictures, tmp_path):
    base = base_of("table4", pictures, tmp_path, overrides=("train.batch_size=8", "model.patch_size=4"))
    assert base.config().train.batch_size == 8
    assert base.network("EDT").config.patch_size == 4
    with pytest.raises(UserError, match=r"unknown key 'train\.batchsize'"):
        base_of("table4", pictures, tmp_path, overrides=("train.batchsize=8",))
    with pytest.raises(UserError, match=r"expected key\.path=value"):
        base_of("table4", pictures, tmp_path, overrides=("train",))
    with pytest.raises(UserError, match=r"unknown size 'smal'.*did you mean 'small'"):
        base_of("table4", pictures, tmp_path, size="smal")
    with pytest.raises(UserError, match="name pictures or a latent store by --data"):
        choose_base(Request("table4", tmp_path), None, 10)
    with pytest.raises(UserError, match="--amm-blocks x"):
        matrix_of("table9", pictures, tmp_path, amm_blocks="x")


def test_a_configuration_of_ones_own_is_the_base(pictures, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "model: {patch_size: 1, depths: [1, 1, 1], dims: [64, 96, 64], num_heads: [2, 3, 2]}\n"
        "data: {size: 8}\ntrain: {batch_size: 4}\n"
    )
    base = base_of("table1", pictures, tmp_path, config=str(path), image_size=8)
    assert (base.size, base.config().train.batch_size) == ("own", 4)
    assert base.network("EDT").grids == [(8, 8), (4, 4), (8, 8)]
    count = parameters_used(base.network("EDT"))
    assert abs(parameters_used(base.network("DiT")) / count - 1) < 0.1
    matrix = quality.build_matrix(STUDIES["table4"], base, request_of("table4", pictures, tmp_path), Budget("steps", 5))
    assert matrix.config(matrix.arms[0], 0).model["depths"] == [1, 1, 1]


def test_table4_switches_what_it_says(pictures, tmp_path):
    matrix = matrix_of("table4", pictures, tmp_path)
    switches = {}
    for arm in matrix.arms:
        config = matrix.config(arm, 0)
        model = config.model
        masks = config.objective.masks
        switches[arm.name] = (
            model.get("token_information_enhancement", True),
            model.get("positional_encoding_supplement", True),
            config.objective.passes,
            model.get("side_interpolater", False),
            None if masks is None else (tuple(masks.down), masks.input),
        )
    assert switches == {
        "none": (False, False, "full", False, None),
        "tie": (True, False, "full", False, None),
        "pes": (False, True, "full", False, None),
        "tie-pes": (True, True, "full", False, None),
        "tie-pes-mdt": (True, True, "full+masked", True, ((), (0.3, 0.5))),
        "tie-pes-edt": (True, True, "full+masked", False, None),
    }


def test_tables_11_and_12_sweep_the_ranges_of_the_paper(pictures, tmp_path):
    eleven, twelve = (matrix_of(name, pictures, tmp_path) for name in ("table11", "table12"))
    downs = [[matrix.config(arm, 0).objective.masks.down for arm in matrix.arms] for matrix in (eleven, twelve)]
    firsts = [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6)]
    assert downs[0] == [(first, (0.0, 0.0)) for first in firsts]
    assert downs[1] == [((0.4, 0.5), second) for second in firsts[:4]]


def test_amm_is_placed_as_said(pictures, tmp_path):
    nine = {v.name: v.sampling["amm"] for v in matrix_of("table9", pictures, tmp_path).variants}
    # Stages of 8, 4, 2, 4, 8 tokens a side, of which 2 is too small; blocks 0-3 and 6-11.
    assert nine == {
        "off": "off", "encoder": "1+3", "both": "1+3+7+9+11", "decoder": "7+9+11",
        "whole-decoder": "6+7+8+9+10+11", "chosen": "7+10",
    }  # fmt: skip
    eight = matrix_of("table8", pictures, tmp_path, amm_blocks="8")
    arms = {arm.name: eight.config(arm, 0) for arm in eight.arms}
    assert [config.objective.train_with_amm for config in arms.values()] == [False, True]
    assert AttentionModulation.from_config(arms["amm"].model["attention_modulation"]) == AttentionModulation((8,))
    assert [variant.sampling["amm"] for variant in eight.variants] == ["off", "8"]
    ten = [v.sampling["amm"] for v in matrix_of("table10", pictures, tmp_path).variants]
    assert ten == ["off", *(f"7+10:radius={radius}" for radius in ("0.6R", "0.8R", "1R", "1.2R", "1.5R"))]


def test_budgets_choose_samples_and_samplers(pictures, tmp_path):
    assert [quality.default_images(seconds, None) for seconds in (30, 180, 1800, 21600)] == [500, 1000, 5000, 50_000]
    assert [quality.default_images(None, steps) for steps in (10, 1000, 10_000, 400_000)] == [500, 1000, 5000, 50_000]
    long = matrix_of("table3", pictures, tmp_path, budget="400000steps")
    assert (long.variants[1].setting().scheduler, long.variants[1].setting().steps) == ("ddpm", 250)
    given = matrix_of("table3", pictures, tmp_path, images=64, extractor="pixels", reference="x", seeds=2)
    assert (given.images, given.extractor, given.reference, given.seeds) == (64, "pixels", "x", (0, 1))
    assert (given.score_size, matrix_of("table3", pictures, tmp_path, extractor="net.ts").score_size) == (None, 32)


def test_a_page_has_means_intervals_differences_and_empty_published_cells(engine, pictures, tmp_path):
    engine.value = lambda arm, seed, point, variant: {"fid": {"mdt": 20.0}.get(arm, 10.0) + seed * seed, "is": 2.0}
    monkey_request = request_of("table3", pictures, tmp_path)
    page = reproduce(monkey_request)
    rows = {(row["arm"], row["variant"]): row for row in page.grids[0].rows}
    # 10, 11, 14: mean 35/3, deviation sqrt(13/3).
    half = T2 * math.sqrt(13 / 3 / 3)
    found = rows["EDT", "AMM off"]["fid"]
    assert (found.value, found.low, found.high) == pytest.approx((35 / 3, 35 / 3 - half, 35 / 3 + half))
    assert rows["MDTv2", "AMM on"]["fid"].value == pytest.approx(65 / 3)
    assert len(rows) == 6
    titles = [column.title for column in page.grids[0].columns]
    assert "label of fid" in titles
    assert "FID (paper)" in titles
    assert all(row.get(column.key) is None for row in rows.values() for column in page.grids[0].columns
               if column.published)  # fmt: skip
    text = (tmp_path / "table3/table.md").read_text()
    assert "a Fréchet distance through it is not FID" in text
    assert "12 steps each with batches of 64" in text
    assert "AMM in DiT: blocks 8+10, at the places of the authors' S." in text
    assert json.loads((tmp_path / "table3/table.json").read_text())["complete"] is True
    Image.open(tmp_path / "table3" / page.figure).verify()


def test_differences_are_taken_seed_by_seed(engine, pictures, tmp_path):
    # Equal differences of 3 whatever the seed: an interval of no width, that seeds apart would not have.
    engine.value = lambda arm, seed, point, variant: {"fid": 100.0 * seed + (3.0 if variant == "decoder" else 0.0)}
    page = reproduce(request_of("table9", pictures, tmp_path))
    rows = {row["variant"]: row for row in page.grids[0].rows}
    assert "difference" not in rows["AMM off"]
    found = rows["every second block of the decoder"]["difference"]
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))
    assert page.grids[0].columns[-1].title == "label of fid, difference to EDT, AMM off"


def test_published_scores_stand_beside_the_papers_own_size_only(pictures, tmp_path):
    study, base = STUDIES["table1"], base_of("table1", pictures, tmp_path)
    from edt_diffusion.studies.reproduce import layout

    assert layout._published(study, base) == {}
    paper = types.SimpleNamespace(published=True, size="S")
    cells = layout._published(study, paper)
    assert list(cells) == [("edt", "on")]
    assert (cells["edt", "on"]["fid"].value, cells["edt", "on"]["is"].value) == (34.27, 42.6)
    guided = layout._published(STUDIES["table13"], types.SimpleNamespace(published=True, size="XL"))
    assert guided["edt", "guided-2"]["fid"].value == 3.54
    others = [name for name in STUDIES if name not in ("table1", "table13")]
    assert all(not STUDIES[name].published for name in others)


def test_published_values_are_of_256_pixels_and_the_authors_formula_goes_with_their_blocks():
    def of(side):
        settings = {"data.path": "store", "data.size": side, "model": {"patch_size": 2}}
        pictures = Pictures("store", True, side, 4, 8, 1000)
        return Base("edt-s-256", settings, pictures, "S", side, {"size": "S"})

    assert (of(256).published, of(512).published) == (True, False)
    placed = {side: settled(STUDIES["table8"].variants[1].sampling, of(side)) for side in (256, 512)}
    assert placed == {256: {"amm": "7+10"}, 512: {"amm": "10:formula=cos"}}
    radius = settled(STUDIES["table10"].variants[1].sampling, of(512))
    assert radius == {"amm": "10:formula=cos+radius=0.6R"}


def test_blocks_that_cannot_be_modulated_or_are_not_asked_for_are_told(engine, pictures, tmp_path):
    with pytest.raises(UserError, match="block 4 is none of those whose token grid is at least 3x3, 0, 1, 2, 3, 6"):
        reproduce(request_of("table9", pictures, tmp_path, amm_blocks="4+7"))
    with pytest.raises(UserError, match="--amm-blocks 7: table3 does not place AMM by it"):
        reproduce(request_of("table3", pictures, tmp_path, amm_blocks="7"))
    assert engine.matrices == []


def test_a_page_says_what_is_off_and_enlarged_and_goes_without_speeds_that_do_not_fit(
    engine, pictures, tmp_path, monkeypatch
):
    tried = []

    def compare(configs, reference, batch, device):
        tried.append(batch)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(quality, "compare", compare)
    page = reproduce(request_of("table2", pictures, tmp_path))
    assert tried == [16, 8, 4, 2, 1]
    assert "Speeds are not there: the arms do not fit" in page.notes[-1]
    differs = "\n".join(page.differs)
    assert "Pictures are enlarged from 16 pixels." in differs
    assert "AMM: off in all samples" in differs
    assert "Recipe: loss, optimizer and schedule are the same for all networks" in differs
    placed = "\n".join(reproduce(request_of("table8", pictures, tmp_path)).differs)
    assert "enlarged" not in placed
    assert "AMM: off" not in placed
    assert "Recipe" not in placed


def test_running_again_asks_for_the_same_and_figure9_shares_table9(engine, pictures, tmp_path):
    first = reproduce(request_of("table9", pictures, tmp_path))
    again = reproduce(request_of("table9", pictures, tmp_path))
    assert engine.matrices[0] == engine.matrices[1]
    assert engine.folders[0] == engine.folders[1] == tmp_path / "table9" / "matrix"
    assert first.grids[0].facts() == again.grids[0].facts()
    assert default_folder("figure9") == default_folder("table9") == Path("reproduced/table9")
    figure = reproduce(Request("figure9", tmp_path / "table9", data=str(pictures), budget="12steps", quiet=True))
    assert engine.matrices[2] == engine.matrices[0]
    assert figure.name == "figure9"


def test_table14_has_a_row_for_each_point(engine, pictures, tmp_path):
    engine.value = lambda arm, seed, point, variant: {"fid": 10 / point + (variant == "on")}
    page = reproduce(request_of("table14", pictures, tmp_path))
    rows = page.grids[0].rows
    assert [row["point"] for row in rows] == [eighth / 8 for eighth in range(1, 9) for _ in range(2)]
    assert [row["fid"].value for row in rows[:4]] == [80.0, 81.0, 40.0, 41.0]
    Image.open(tmp_path / "table14/figure.png").verify()


def test_missing_cells_and_failures_are_said(engine, pictures, tmp_path, monkeypatch):
    def run(matrix, folder, *_):
        MatrixFolder(Path(folder)).begin(matrix)
        results = Results.read(folder, matrix)
        results.stopped, results.failed = True, {"none-seed0-train": "diverged"}
        return results

    monkeypatch.setattr(quality, "run_matrix", run)
    page = reproduce(request_of("table4", pictures, tmp_path))
    text = page.markdown()
    assert "Not there yet: 18 of the cells; the same command again goes on." in text
    assert "Failed: none-seed0-train: diverged" in text
    assert (page.figure, page.more["stopped"], page.more["complete"]) == (None, True, False)
    with pytest.raises(UserError, match="--seeds 0"):
        reproduce(request_of("table4", pictures, tmp_path, seeds=0))


def test_losses_that_fall_together_and_losses_that_conflict():
    steps = list(range(240))
    wave = [math.sin(step / 17) for step in steps]
    full = [math.exp(-step / 100) + 0.05 * w for step, w in zip(steps, wave, strict=True)]
    together = fall_together({"step": steps, "full": full, "masked": [2 * value for value in full]})
    assert together["same_way"] == 1.0
    assert together["correlation"] == pytest.approx(1.0)
    assert together["full_fall"] == pytest.approx(together["masked_fall"])
    parts = np.array(full).reshape(12, 20).mean(axis=1)
    assert together["full_end"] == pytest.approx(parts[-1])
    assert together["full_fall"] == pytest.approx(1 - parts[-1] / parts[1])
    conflict = fall_together({"step": steps, "full": full, "masked": [3 - value for value in full]})
    assert (conflict["same_way"], conflict["correlation"]) == (0.0, pytest.approx(-1.0))
    assert conflict["masked_fall"] < 0 < conflict["full_fall"]
    assert fall_together({"step": steps, "full": full}) is None
    assert fall_together({"step": [1, 2], "full": [1.0, 2.0], "masked": [1.0, 2.0]}) is None


def test_windows_are_means_without_gaps():
    assert windows([1, 2, 3, 4], [1.0, 3.0, math.nan, 5.0], 2) == ([1.5, 4.0], [2.0, 5.0])
    assert windows([], [], 3) == ([], [])


def test_figure10_reads_the_logs_of_both_arms(pictures, tmp_path, monkeypatch):
    def run(matrix, folder, *_):
        place = MatrixFolder(Path(folder))
        place.begin(matrix)
        for arm in matrix.arms:
            for seed in matrix.seeds:
                place.run(Run(arm.name, seed)).mkdir()
                place.spent(Run(arm.name, seed)).write_text("{}")
                sign = 1 if arm.name == "edt-mask" else -1
                lines = [
                    {"step": s, "loss": 1.0, "loss_full": 2 - s / 24, "loss_masked": 2 - sign * s / 24}
                    for s in range(24)
                ]
                (place.run(Run(arm.name, seed)) / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return Results.read(folder, matrix)

    monkeypatch.setattr(quality, "run_matrix", run)
    page = reproduce(request_of("figure10", pictures, tmp_path))
    rows = {row["arm"]: row for row in page.grids[0].rows}
    assert (rows["EDT masking"]["same_way"].value, rows["MDT masking"]["same_way"].value) == (1.0, 0.0)
    assert rows["EDT masking"]["same_way"].low == 1.0
    Image.open(tmp_path / "figure10/figure.png").verify()


def test_names_are_found_and_unknown_ones_told_the_nearest():
    assert [name for name, table in TABLES.items() if not table.trains] == ["table5", "table6", "table7"]
    assert find_table("Table 5") is TABLES["table5"]
    with pytest.raises(UserError, match=r"unknown table or figure 'tabel5'.*did you mean 'table5'"):
        find_table("tabel5")
    assert set(TABLES) == {f"table{number}" for number in range(1, 15)} | {"figure6", "figure9", "figure10"}


def test_cells_are_written_for_people():
    column = Column("a", "a", "{:.2f}")
    cells = [None, 1.234, Interval(1.0), Interval(1.0, 0.5, 1.5), "x|y", 3]
    assert [column.show(cell) for cell in cells] == ["", "1.23", "1.00", "1.00 [0.50, 1.50]", "x\\|y", "3.00"]


def test_the_page_of_the_documentation_lists_every_table():
    text = (Path(__file__).resolve().parents[2] / "docs/reproducing.md").read_text()
    for name, table in TABLES.items():
        lines = [line for line in text.splitlines() if line.startswith(f"| `edt reproduce {name}` |")]
        assert len(lines) == 1, name
        if name in STUDIES:
            arms = len(STUDIES[name].arms)
            assert lines[0].endswith((f"| {arms} arm{'s' * (arms > 1)} |", f"| {arms} arm, 1 seed |")), name
        elif not table.trains:
            assert lines[0].endswith("| nothing |"), name
