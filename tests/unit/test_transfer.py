"""A trained model's weights in a model of other classes, another grid, other channels."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline
from tiny_backbones import tiny_backbone
from tiny_models import tiny_inputs, tiny_model

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.models.class_rows import match_classes
from edt_diffusion.models.transfer import transfer_weights
from edt_diffusion.nn.attention import resample_bias_table
from edt_diffusion.nn.embeddings import resample_position_table, sincos_position_table
from edt_diffusion.util.errors import UserError


def settings(source: EDTTransformer2DModel, **change: Any) -> dict[str, Any]:
    return {**{name: value for name, value in source.config.items() if not name.startswith("_")}, **change}


def transferred(source: EDTTransformer2DModel, *names, new_classes: str = "null", **change: Any):
    target = tiny_backbone(source.family, seed=9, **settings(source, **change))
    return target, transfer_weights(source, target, *names, new_classes=new_classes)


def predict(of: EDTTransformer2DModel, labels: list[int] | None = None, seed: int = 1) -> torch.Tensor:
    inputs = tiny_inputs(of, seed=seed)
    if labels is not None:
        inputs["class_labels"] = torch.tensor(labels)
    with torch.no_grad():
        return of(**inputs).sample


# ---- the same layout ----


def test_the_same_model_is_copied_bit_for_bit():
    source = tiny_model()
    source.pos_embed.add_(1e-4)  # as the authors' EMA leaves them
    before = {name: value.clone() for name, value in source.state_dict().items()}
    target, report = transferred(source)
    assert source.state_dict().keys() == target.state_dict().keys() == set(report.copied)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert torch.equal(predict(target), predict(source))
    assert not report.resampled
    assert not report.initialised
    assert report.lines() == [
        f"copied {len(before)} tensors",
        "the source's position tables differ from the computed ones by up to 1.0e-04: kept",
        "classes: 5 of 5 taken over by number",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (2, 2, 2)}, r"depths=\[2, 2, 2\], the trained one \[2, 1, 2\].*set model.depths="),
        ({"dims": (16, 32, 16), "num_heads": (2, 4, 2)}, r"dims=\[16, 32, 16\]"),
        ({"num_heads": (4, 3, 2)}, "num_heads="),
        ({"mlp_ratio": 2.0}, "mlp_ratio=2.0, the trained one 4.0"),
    ],
)
def test_other_layouts_are_refused_and_nothing_is_changed(change, message):
    source, target = tiny_model(), tiny_model(3, **change)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=message):
        transfer_weights(source, target)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


# ---- classes ----

NAMES = ["cat", "Dog", "crane", "bus", "crane"]


def test_classes_go_by_name():
    source = tiny_model()
    wanted = ["bus", "fox", "dog", "cat", "owl", "crane", "yak"]
    target, report = transferred(source, NAMES, wanted, num_classes=7)
    old, new = source.class_embedder.weight, target.class_embedder.weight
    assert report.classes == {
        "bus": "bus", "fox": None, "dog": "Dog", "cat": "cat", "owl": None, "crane": None, "yak": None
    }  # fmt: skip
    for row, origin in enumerate([3, 5, 1, 0, 5, 5, 5, 5]):  # row 5 is the null row, also the start of new classes
        assert torch.equal(new[row], old[origin])
    # Known classes are predicted as before, though they have other numbers now; so is no class.
    assert torch.equal(predict(target, [0, 2]), predict(source, [3, 1]))
    assert torch.equal(predict(target, [3, 7]), predict(source, [0, 5]))
    assert report.notes == [
        "classes: 3 of 7 taken over by name",
        "new classes, starting from the null row: fox, owl, crane, yak",
        "classes left behind: crane, crane",
    ]


def test_new_classes_may_start_from_the_mean():
    source = tiny_model()
    target, _ = transferred(source, ["a", "b", "c", "d", "e"], ["c", "x"], num_classes=2, new_classes="mean")
    rows = source.class_embedder.weight.detach()
    torch.testing.assert_close(target.class_embedder.weight[1], rows[:5].sum(0) / 5)
    assert torch.equal(target.class_embedder.weight[2], rows[5])
    with pytest.raises(UserError, match="unknown start of new classes 'men': expected one of null, mean"):
        transferred(source, new_classes="men")


def test_classes_without_names_go_by_number_if_their_counts_agree():
    source = tiny_model()
    fewer, report = transferred(source, num_classes=4)
    assert report.classes == dict.fromkeys(range(4))
    assert all(torch.equal(row, source.class_embedder.weight[5]) for row in fewer.class_embedder.weight)
    same, report = transferred(source, NAMES)  # the names of one side alone say nothing
    assert torch.equal(same.class_embedder.weight, source.class_embedder.weight)
    assert list(report.classes.values()) == NAMES


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (["a", "b"], ["b", "a"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),  # exact names first
        (["a", "A"], ["a", "B"], [0, None]),
        (["Ab", "aB"], ["AB"], [None]),  # which of the two?
        (["Ab"], ["AB", "aB"], [None, None]),
        (["Ab", "aB"], ["AB", "ab"], [None, None]),
        (["A", "b"], ["B", "a", "c"], [1, 0, None]),
        (["x", "y", "x"], ["x", "x", "y"], [0, 2, 1]),  # as often on both sides
        (["x", "y", "x"], ["y", "x"], [1, None]),
        ([], ["a"], [None]),
    ],
)
def test_match_classes(source, target, expected):
    assert match_classes(source, target) == expected


def test_names_must_be_as_many_as_classes():
    with pytest.raises(UserError, match="3 class names for a model of 5 classes"):
        transferred(tiny_model(), ["a", "b", "c"], NAMES)


def test_conditional_and_unconditional():
    conditional, unconditional = tiny_model(), tiny_model(num_classes=None)
    target, report = transferred(conditional, NAMES, None, num_classes=None)
    assert "class_embedder.weight" not in report.copied
    torch.testing.assert_close(predict(target), predict(conditional, [5, 5]), atol=1e-5, rtol=0)
    target, report = transferred(unconditional, None, ["a", "b"], num_classes=2)
    assert report.classes == {"a": None, "b": None}
    for labels in ([0, 1], [1, 2]):
        assert torch.equal(predict(target, labels), predict(unconditional))
    target, report = transferred(unconditional)
    assert torch.equal(predict(target), predict(unconditional))


# ---- grids ----


def offsets(grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Displacements of a bias table's rows as fractions of the picture, (rows, columns), float64."""
    y, x = (torch.arange(1 - n, n, dtype=torch.float64) / n for n in grid)
    return y.repeat_interleave(len(x)), x.repeat(len(y))


SHAPES = [((16, 16), (32, 32)), ((4, 4), (6, 10)), ((8, 8), (4, 4)), ((3, 5), (5, 3)), ((2, 2), (16, 16))]


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_a_bias_linear_in_the_displacement_stays_that_line(old, new):
    def bias(grid):
        y, x = offsets(grid)
        return torch.stack([2 * y - 3 * x + 0.5, x, torch.full_like(x, 0.25)], dim=1).float()

    assert resample_bias_table(bias(old), old, new).shape == ((2 * new[0] - 1) * (2 * new[1] - 1), 3)
    torch.testing.assert_close(resample_bias_table(bias(old), old, new), bias(new), atol=2e-6, rtol=0)


def test_a_quadratic_bias_stays_one_inside():
    """Keys' kernel reproduces degree two wherever its four neighbours exist: an offset away from the border."""

    def bias(grid):
        y, x = offsets(grid)
        return (y * y - x * y + 2 * x * x)[:, None].float()

    inside = torch.stack([o.abs() <= 14 / 16 for o in offsets((32, 32))]).all(0)
    assert 0.7 < inside.double().mean() < 0.9
    out = resample_bias_table(bias((16, 16)), (16, 16), (32, 32))
    torch.testing.assert_close(out[inside], bias((32, 32))[inside], atol=2e-6, rtol=0)


def test_resampling_against_scipys_cubic_hermite_splines():
    """The kernel is the Hermite spline with central differences as slopes; beyond the last offset it is a line."""
    table = torch.randn(7 * 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def along(values: np.ndarray, old: int, new: int) -> np.ndarray:  # axis 0
        places = np.arange(1 - old, old)
        line = np.concatenate([[2 * values[0] - values[1]], values, [2 * values[-1] - values[-2]]])
        spline = CubicHermiteSpline(places, values, (line[2:] - line[:-2]) / 2, extrapolate=False)
        wanted = np.arange(1 - new, new) * old / new
        out = spline(np.clip(wanted, places[0], places[-1]))
        beyond = (wanted - np.clip(wanted, places[0], places[-1]))[:, None, None]
        slope = np.where(beyond > 0, values[-1] - values[-2], values[1] - values[0])
        return out + beyond * slope

    grid = along(table.numpy().reshape(7, 7, 2), 4, 6)
    grid = along(grid.transpose(1, 0, 2), 4, 9).transpose(1, 0, 2)
    out = resample_bias_table(table, (4, 4), (6, 9))
    np.testing.assert_allclose(out.numpy(), grid.reshape(-1, 2), atol=1e-12)


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_mirrored_tables_give_mirrored_tables(old, new):
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 2, generator=torch.Generator().manual_seed(0)).double()

    def flipped(t, grid, *axes):
        return t.unflatten(0, (2 * grid[0] - 1, 2 * grid[1] - 1)).flip(axes).flatten(0, 1)

    out = resample_bias_table(table, old, new)
    for axes in ([0], [1], [0, 1]):
        mirrored = resample_bias_table(flipped(table, old, *axes), old, new)
        torch.testing.assert_close(mirrored, flipped(out, new, *axes), atol=1e-12, rtol=0)


def test_equal_grids_and_grids_of_one_row():
    table = torch.randn(9 * 7, 2)
    assert resample_bias_table(table, (5, 4), (5, 4)) is table
    row = torch.randn(5, 1)
    out = resample_bias_table(row, (1, 3), (2, 3)).unflatten(0, (3, 5))
    torch.testing.assert_close(out, row.expand(3, 5, 1))
    assert resample_bias_table(torch.randn(1, 4), (1, 1), (3, 3)).shape == (25, 4)


@pytest.mark.parametrize("size", [16, (8, 16), 4])
def test_another_grid(size):
    source = tiny_model()
    source.blocks[2].pos_embed.add_(2e-4)
    target, report = transferred(source, sample_size=size)
    biases = {name for name in target.state_dict() if name.endswith("table")}
    tables = {name for name in target.state_dict() if name.endswith("pos_embed")}
    assert set(report.resampled) == biases
    assert len(biases) == 5
    assert set(report.initialised) == tables
    for name, value in target.state_dict().items():
        if name not in biases | tables:
            assert torch.equal(value, source.state_dict()[name]), name
    assert torch.equal(target.pos_embed, sincos_position_table(16, *target.grids[0]))
    assert torch.equal(target.blocks[2].pos_embed, sincos_position_table(24, *target.grids[1]))
    for (old, old_grid), (new, grid) in zip(source.attention_layers(), target.attention_layers(), strict=True):
        wanted = resample_bias_table(old.position_bias.table, old_grid, grid)
        assert torch.equal(new.position_bias.table, wanted)
    high, wide = target.grids[0]
    assert f"relative-position biases: resampled from a 8x8 to a {high}x{wide} grid" in report.notes
    assert any("by up to 2.0e-04: not carried over to the new grid" in note for note in report.notes)
    assert predict(target).isfinite().all()


# ---- channels ----


def test_predicted_variance_dropped_and_added():
    source = tiny_model(sample_size=16, patch_size=2)
    without, report = transferred(source, learn_sigma=False)
    assert set(report.resampled) == {"proj_out.weight", "proj_out.bias"}
    assert torch.equal(predict(without), predict(source)[:, :3])
    again, report = transferred(without, learn_sigma=True)
    assert torch.equal(predict(again)[:, :3], predict(source)[:, :3])
    assert not predict(again)[:, 3:].any()
    assert "predicted variance: added, starting from zero" in report.notes


@pytest.mark.parametrize("change", [{"in_channels": 4}, {"patch_size": 2, "sample_size": 16}, {"patch_size": 2}])
def test_other_channels_or_patches(change):
    source = tiny_model()
    fresh = tiny_model(seed=9, **settings(source, **change))
    target, report = transferred(source, **change)
    anew = {"patch_embed.proj.weight", "patch_embed.proj.bias", "proj_out.weight", "proj_out.bias"}
    assert anew == {name for name in report.initialised if "pos_embed" not in name}
    for name, value in target.state_dict().items():
        if name in anew:
            assert torch.equal(value, fresh.state_dict()[name])
        elif name in report.copied:
            assert torch.equal(value, source.state_dict()[name])
    assert set(report.copied + report.resampled + report.initialised) == set(target.state_dict())


# ---- attention modulation ----


def test_modulation_goes_along():
    source = tiny_model(sample_size=8)
    source.set_attention_modulation([0, 3], "cos", 2.5)
    same, _ = transferred(source, attention_modulation=None)
    assert same.attention_modulation == source.attention_modulation
    larger, report = transferred(source, attention_modulation=None, sample_size=(12, 16))
    assert larger.attention_modulation.to_config() == {"blocks": [0, 3], "formula": "cos", "radius": 5.0}
    assert any("adapted to the new grid" in note for note in report.notes)
    source.set_attention_modulation([1], radius="0.9R")
    larger, _ = transferred(source, attention_modulation=None, sample_size=16)
    assert larger.attention_modulation == source.attention_modulation
    own, report = transferred(source, attention_modulation={"blocks": [4]})
    assert own.attention_modulation.blocks == (4,)
    assert "attention modulation: the new model's own setting is kept" in report.notes
    source.set_attention_modulation([2])  # stage 1: a 4x4 grid becomes 2x2, which is too small
    smaller, report = transferred(source, attention_modulation=None, sample_size=4)
    assert smaller.attention_modulation is None
    assert any("switched off" in note and "too small" in note for note in report.notes)


def test_a_published_placement_becomes_that_of_the_new_resolution(monkeypatch):
    from edt_diffusion.models.amm import ModulationPreset
    from edt_diffusion.nn.modulation import AttentionModulation

    presets = {
        "small": ModulationPreset(AttentionModulation((1,)), (2, 1, 2), (16,), 8, (0.0, 1.75)),
        "small-guided": ModulationPreset(AttentionModulation((2,)), (2, 1, 2), (16,), 8, (1.75, float("inf"))),
        "large": ModulationPreset(AttentionModulation((3,), "cos"), (2, 1, 2), (16,), 16, (0.0, 1.75)),
        "large-guided": ModulationPreset(AttentionModulation((4,), "cos"), (2, 1, 2), (16,), 16, (1.75, float("inf"))),
    }
    monkeypatch.setattr(EDTTransformer2DModel, "amm_presets", presets)
    source = tiny_model()
    for guidance, blocks in ((1.0, (3,)), (4.0, (4,))):
        source.set_attention_modulation(preset="auto", guidance_scale=guidance)
        target, _ = transferred(source, attention_modulation=None, sample_size=16)
        assert target.attention_modulation == AttentionModulation(blocks, "cos")
        target, _ = transferred(source, attention_modulation=None, sample_size=12)  # none is published
        assert target.attention_modulation == source.attention_modulation


# ---- other backbones ----

SIDE = {"side_interpolater": True}


@pytest.mark.parametrize(("family", "change"), [("DiT", {}), ("MDTv2", {}), ("EDT", SIDE)])
def test_other_backbones_are_copied_bit_for_bit(family, change):
    source = tiny_backbone(family, **change)
    target, report = transferred(source)
    state = source.state_dict()
    assert state.keys() == target.state_dict().keys() == set(report.copied)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    if family != "DiT":  # what only masked passes use goes along
        assert any("mask_token" in name for name in report.copied)
        assert any(".block.attn.position_bias.table" in name for name in report.copied)


@pytest.mark.parametrize(("family", "change"), [("DiT", {}), ("MDTv2", {}), ("EDT", SIDE)])
def test_other_backbones_at_another_grid_and_with_other_classes(family, change):
    source = tiny_backbone(family, **change)
    target, report = transferred(source, NAMES, ["bus", "fox"], num_classes=2, sample_size=(8, 16))
    old, new = source.state_dict(), target.state_dict()
    adapted = {"class_embedder.weight"}
    spare = 3 if family == "MDTv2" else 0
    for name, value in new.items():
        if name.endswith("position_bias.table"):
            adapted.add(name)
            pairs = len(old[name]) - spare
            side = {225: 8, 49: 4}[pairs]
            wanted = resample_bias_table(old[name][:pairs], (side, side), (side, 2 * side))
            assert torch.equal(value, torch.cat([wanted, old[name][pairs:]]))
        elif name.endswith("pos_embed") and family == "MDTv2":
            assert torch.equal(value, resample_position_table(old[name], (8, 8), (8, 16)))
            adapted.add(name)
        elif name.endswith("pos_embed"):
            assert name in report.initialised
        elif name != "class_embedder.weight":
            assert torch.equal(value, old[name]), name
    assert torch.equal(new["pos_embed"], sincos_position_table(16, 8, 16)) == (family != "MDTv2")
    assert set(report.resampled) == adapted
    rows = [old["class_embedder.weight"][row] for row in (3, 5, 5)]
    assert torch.equal(new["class_embedder.weight"], torch.stack(rows))
    how = "resampled from a 8x8 to" if family == "MDTv2" else "computed for"
    assert f"position tables: {how} a 8x16 grid" in report.notes
    assert any("biases: resampled" in note for note in report.notes) == (family != "DiT")
    assert predict(target).isfinite().all()


def test_learned_positions_linear_in_the_place_stay_that_plane():
    """At the middles of the cells, as fractions of the picture."""

    def plane(height: int, width: int) -> torch.Tensor:
        y = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
        x = ((torch.arange(width) + 0.5) / width).expand(height, width)
        return torch.stack([2 * y - x + 1, 3 * x], dim=-1).flatten(0, 1)[None]

    for old, new in (((4, 4), (8, 8)), ((8, 8), (4, 6)), ((3, 5), (5, 3))):
        out = resample_position_table(plane(*old), old, new)
        torch.testing.assert_close(out, plane(*new), atol=2e-6, rtol=0)
    table = torch.randn(1, 12, 4)
    assert resample_position_table(table, (3, 4), (3, 4)) is table


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("DiT", {"depth": 5}, "depth=5, the trained one 4.*set model.depth=4"),
        ("MDTv2", {"decode_layers": 4}, "decode_layers=4, the trained one 2"),
        ("MDTv2", {"num_heads": 4}, "num_heads=4, the trained one 2"),
        ("EDT", SIDE, "side_interpolater=True, the trained one False"),
        ("EDT", {"token_information_enhancement": False}, "token_information_enhancement=False, the trained one True"),
    ],
)
def test_other_layouts_of_other_backbones_are_refused(family, change, message):
    with pytest.raises(UserError, match=message):
        transfer_weights(tiny_backbone(family), tiny_backbone(family, **change))


@pytest.mark.parametrize("family", ["DiT", "MDTv2"])
def test_another_family_is_refused_and_nothing_is_changed(family):
    source, target = tiny_backbone(family), tiny_model(3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=f"of the family EDT, the trained one of {family}: .*set model.name={family}"):
        transfer_weights(source, target)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_edt_without_position_supplement():
    _, report = transferred(tiny_model(positional_encoding_supplement=False), sample_size=16)
    assert {name for name in report.initialised if "pos_embed" in name} == {"pos_embed"}
