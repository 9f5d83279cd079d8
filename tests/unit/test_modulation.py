import contextlib
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.nn.modulation import AttentionModulation, modulation_matrix

FORMULAS = {"exp": lambda angle: 0.5 * math.exp(math.cos(angle)), "cos": lambda angle: 1.3 * math.cos(angle)}


def brute_force(height: int, width: int, formula: str, keeps) -> np.ndarray:
    """`keeps(dy, dx)` says which pairs are not zeroed."""
    cells = list(itertools.product(range(height), range(width)))
    matrix = np.zeros((len(cells), len(cells)))
    for i, (row, column) in enumerate(cells):
        for j, (other_row, other_column) in enumerate(cells):
            dy, dx = row - other_row, column - other_column
            angle = math.pi / 2 * math.hypot(dy, dx) / math.hypot(height - 1, width - 1)
            matrix[i, j] = FORMULAS[formula](angle) if keeps(dy, dx) else 0.0
    return matrix


def assert_matrix(matrix: torch.Tensor, expected: np.ndarray) -> None:
    assert matrix.dtype == torch.float32
    np.testing.assert_array_equal(matrix.numpy() == 0, expected == 0)
    np.testing.assert_allclose(matrix.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(("height", "width"), [(3, 3), (3, 5), (7, 4), (6, 3), (4, 12)])
def test_matrix_and_default_radius(height, width, formula):
    limit = (max(height, width) - 1) ** 2 + 4
    expected = brute_force(height, width, formula, lambda dy, dx: dy * dy + dx * dx <= limit)
    assert_matrix(modulation_matrix(height, width, formula), expected)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("side", range(3, 17))
def test_squares_equal_the_authors_rule(side, formula):
    period = 4 * (side - 1) * math.sqrt(2)
    frequency = 2 * math.pi / period
    row, column = np.divmod(np.arange(side * side), side)
    distance = np.sqrt((row[:, None] - row) ** 2 + (column[:, None] - column) ** 2)
    matrix = np.vectorize(FORMULAS[formula])(frequency * distance)
    k = 3 * side
    if k % side == 0:
        k = 3 * side - 1
    bound = matrix[0, k]
    matrix[matrix < bound] = 0.0
    assert_matrix(modulation_matrix(side, side, formula), matrix)


@pytest.mark.parametrize(
    ("radius", "squared"),
    [
        (2.0, 4.0),
        (3, 9.0),
        (1.5, 2.25),
        (100, 1e4),
        ("0.9R", 0.81 * 40),  # a 4x7 grid has R^2 = 6^2 + 4
        ("0.5R", 10.0),
        (" .5 R ", 10.0),
        ("1R", 40.0),
        ("1.0R", 40.0),
        (math.sqrt(40), 40.0),
    ],
)
def test_radius(radius, squared):
    expected = brute_force(4, 7, "exp", lambda dy, dx: dy * dy + dx * dx <= squared + 1e-9)
    assert_matrix(modulation_matrix(4, 7, "exp", radius), expected)


@pytest.mark.parametrize("radius", [0, -1, 0.0, math.inf, math.nan, True, "R", "0R", "-1R", "2", "0.9r", "", [2]])
def test_bad_radius(radius):
    with pytest.raises(ValueError, match=r"radius=.*expected None, a positive"):
        modulation_matrix(4, 4, "exp", radius)
    with pytest.raises(ValueError, match="radius="):
        AttentionModulation((0,), radius=radius)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (1, 1), (2, 8), (8, 2), (1, 3)])
def test_small_grids(height, width):
    with pytest.raises(ValueError, match=f"a {height}x{width} grid is too small.*at least 3"):
        modulation_matrix(height, width)


def test_settings_are_normalised_and_checked():
    setting = AttentionModulation([10, 7, 10], "cos", "0.9R")
    assert setting.blocks == (7, 10)
    assert setting.to_config() == {"blocks": [7, 10], "formula": "cos", "radius": "0.9R"}
    assert AttentionModulation.from_config(setting.to_config()) == setting
    assert AttentionModulation.from_config({"blocks": [1]}) == AttentionModulation((1,))
    for blocks in ("7", 7, None):
        with pytest.raises(ValueError, match="expected a list of block indices"):
            AttentionModulation(blocks)
    for block in (1.0, True, "1"):
        with pytest.raises(ValueError, match="expected an integer"):
            AttentionModulation([block])
    with pytest.raises(ValueError, match="unknown attention modulation formula 'sin': expected one of exp, cos"):
        AttentionModulation((1,), "sin")


# ---- on the model. Grids of the tiny model: blocks 0, 1 on 8x8, block 2 on 4x4, blocks 3, 4 on 8x8. ----


@torch.no_grad()
def output(model: EDTTransformer2DModel) -> torch.Tensor:
    return model(**tiny_inputs(model), return_dict=False)[0]


def test_blocks_are_counted_without_the_resampling_modules():
    model = tiny_model()
    model.set_attention_modulation([2, 3])
    matrices = [attention.modulation for attention, _ in model.attention_layers()]
    assert [matrix is not None for matrix in matrices] == [False, False, True, True, False]
    assert torch.equal(matrices[2], modulation_matrix(4, 4))
    assert torch.equal(matrices[3], modulation_matrix(8, 8))


def test_set_change_and_off():
    model = tiny_model()
    off = output(model)
    seen = [off]
    for arguments in (
        {"blocks": [3]},
        {"blocks": [3], "formula": "cos"},
        {"blocks": [3], "radius": 2},
        {"blocks": [1]},
    ):
        model.set_attention_modulation(**arguments)
        assert model.attention_modulation == AttentionModulation(**arguments)
        assert model.config.attention_modulation == AttentionModulation(**arguments).to_config()
        seen.append(output(model))
    for one, other in itertools.combinations(seen, 2):
        assert (one - other).abs().max() > 1e-4
    for nothing in (None, []):
        model.set_attention_modulation([3])
        model.set_attention_modulation(nothing)
        assert model.attention_modulation is None
        assert model.config.attention_modulation is None
        assert torch.equal(output(model), off)


def test_a_matrix_of_ones_changes_nothing(monkeypatch):
    """AMM multiplies the probabilities, so a matrix of ones is no modulation."""
    model = tiny_model()
    off = output(model)
    model.set_attention_modulation([0, 3])
    for attention, _ in model.attention_layers():
        if attention.modulation is not None:
            attention.modulation.fill_(1.0)
    torch.testing.assert_close(output(model), off, atol=1e-5, rtol=0)


def test_wrong_settings_leave_the_old_one():
    model = tiny_model(depths=(1, 1, 1, 1, 1), dims=(16,) * 5, num_heads=(2,) * 5)  # grids 8, 4, 2, 4, 8
    model.set_attention_modulation([3])
    expected = output(model)
    with pytest.raises(ValueError, match="block 2: a 2x2 grid is too small"):
        model.set_attention_modulation([1, 2])
    with pytest.raises(ValueError, match="block 5: this model has blocks 0 to 4"):
        model.set_attention_modulation([5])
    with pytest.raises(ValueError, match="block -1"):
        model.set_attention_modulation([-1])
    with pytest.raises(ValueError, match="both given"):
        model.set_attention_modulation([1], preset="auto")
    with pytest.raises(ValueError, match="expected a list"):
        model.set_attention_modulation("3")
    assert model.attention_modulation == AttentionModulation((3,))
    assert torch.equal(output(model), expected)


def test_suspension():
    model = tiny_model()
    off = output(model)
    model.set_attention_modulation([3])
    on = output(model)
    with model.suspend_attention_modulation():
        assert torch.equal(output(model), off)
        with model.suspend_attention_modulation():
            assert torch.equal(output(model), off)
        assert torch.equal(output(model), off)
        assert model.attention_modulation == AttentionModulation((3,))
    assert torch.equal(output(model), on)
    with contextlib.suppress(RuntimeError), model.suspend_attention_modulation():
        raise RuntimeError
    assert torch.equal(output(model), on)


@pytest.mark.parametrize("blocks", [None, [0, 2, 3]])
def test_training_mode_changes_nothing(blocks):
    model = tiny_model()
    model.set_attention_modulation(blocks)
    evaluated = output(model.eval())
    assert torch.equal(output(model.train()), evaluated)
    differentiable = model(**tiny_inputs(model), return_dict=False)[0]
    torch.testing.assert_close(differentiable.detach(), evaluated, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [8, (8, 16)])
def test_saved_and_restored(tmp_path, size):
    model = tiny_model(sample_size=size)
    model.set_attention_modulation([0, 3], "cos", "0.9R")
    model.save_pretrained(tmp_path)
    loaded = EDTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.attention_modulation == AttentionModulation((0, 3), "cos", "0.9R")
    matrices = [attention.modulation for attention, _ in loaded.attention_layers()]
    expected = [attention.modulation for attention, _ in model.attention_layers()]
    assert [matrix is None for matrix in matrices] == [False, True, True, False, True]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(matrices, expected, strict=True))
    assert torch.equal(output(loaded), output(model))
    model.set_attention_modulation(None)
    model.save_pretrained(tmp_path)
    assert EDTTransformer2DModel.from_pretrained(tmp_path).attention_modulation is None


def test_weights_do_not_contain_the_matrices():
    model = tiny_model()
    names = set(model.state_dict())
    model.set_attention_modulation([0])
    assert set(model.state_dict()) == names


def published(size: str, guidance: float, sample_size: int = 32, **overrides) -> tuple[tuple[int, ...], str] | None:
    with torch.device("meta"):
        model = EDTTransformer2DModel.from_size(size, sample_size=sample_size, **overrides)
    model.set_attention_modulation(preset="auto", guidance_scale=guidance)
    setting = model.attention_modulation
    return None if setting is None else (setting.blocks, setting.formula)


@pytest.mark.parametrize("size", ["S", "B"])
@pytest.mark.parametrize(
    ("guidance", "blocks"), [(1, (7, 10)), (1.25, (7, 10)), (1.5, (7, 10)), (2, (8,)), (3, (8,)), (4, (8,))]
)
def test_automatic_preset_at_256_px(size, guidance, blocks):
    assert published(size, guidance) == (blocks, "exp")


@pytest.mark.parametrize("guidance", [1, 4])
def test_automatic_preset_of_the_other_published_models(guidance):
    assert published("S", guidance, sample_size=64) == ((10,), "cos")
    assert published("XL", guidance) == ((23, 25), "exp")


@pytest.mark.parametrize(
    "case",
    [
        {"size": "B", "sample_size": 64},
        {"size": "XL", "sample_size": 64},
        {"size": "XL", "depths": (5, 5, 4, 7, 7)},
        {"size": "S", "depths": (2, 2, 2, 3, 2)},
        {"size": "S", "sample_size": (32, 64)},
        {"size": "S", "sample_size": 16},
        {"size": "S", "dims": (260, 416, 520, 416, 260), "num_heads": (5, 8, 10, 8, 5)},
    ],
)
def test_where_no_preset_is_known_modulation_is_off_and_a_warning_says_so(caplog, case):
    with caplog.at_level(logging.WARNING, logger="edt_diffusion"):
        assert published(guidance=1.0, **case) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no published attention modulation" in caplog.text
    assert "attention modulation is off" in caplog.text


def test_unknown_models_lose_an_earlier_setting():
    model = tiny_model()
    model.set_attention_modulation([3])
    model.set_attention_modulation(preset="auto")
    assert model.attention_modulation is None


def test_presets_by_name(caplog):
    with torch.device("meta"):
        model = EDTTransformer2DModel.from_size("XL")
    model.set_attention_modulation(preset="xl-256-alternative")
    assert model.attention_modulation == AttentionModulation((24,))
    model.set_attention_modulation(preset="xl-256")
    assert model.attention_modulation == AttentionModulation((23, 25))
    assert not caplog.records
    with pytest.raises(ValueError, match=r"unknown attention modulation preset 'xl-265'.*did you mean 'xl-256'"):
        model.set_attention_modulation(preset="xl-265")
    assert model.attention_modulation == AttentionModulation((23, 25))
