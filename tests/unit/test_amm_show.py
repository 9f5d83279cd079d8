"""What `edt amm show` says of the modulation matrix and of a model's attention."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tiny_backbones import TINY_OF, tiny_backbone
from tiny_models import tiny_inputs, tiny_model

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.nn.modulation import AttentionModulation, modulation_matrix
from edt_diffusion.pipelines.schedulers import make_scheduler
from edt_diffusion.studies import amm_show
from edt_diffusion.studies.amm_attention import attention_facts, attention_maps, landmarks, matrix_facts
from edt_diffusion.studies.amm_show import Request, show, table
from edt_diffusion.util.errors import UserError

# ---- the matrix ----


@pytest.mark.parametrize(
    ("side", "formula", "zeroed", "weights"),
    [
        (4, "exp", 1.6, (0.63, 1.36)),
        (8, "exp", 4.4, (0.75, 1.36)),
        (16, "exp", 4.3, (0.77, 1.36)),
        (32, "cos", 3.4, (0.574, 1.3)),
    ],
)
def test_shares_and_weights_are_those_of_the_published_matrices(side, formula, zeroed, weights):
    facts = matrix_facts(side, side, formula, None)
    assert round(100 * facts["zeroed"], 1) == zeroed
    assert facts["weights"] == pytest.approx(weights, abs=6e-3)
    assert facts["radius_cells"] == pytest.approx(math.sqrt((side - 1) ** 2 + 4))
    cells = [(row, column) for row in range(side) for column in range(side)]
    kept = [(r - y) ** 2 + (c - x) ** 2 <= (side - 1) ** 2 + 4 for r, c in cells for y, x in cells]
    assert facts["zeroed"] == pytest.approx(1 - sum(kept) / len(kept), abs=1e-12)
    assert facts["seen"]["corner"] == pytest.approx(sum(kept[: side**2]) / side**2)


def test_gain_of_uniform_attention_is_known():
    gain = matrix_facts(16, 16, "exp", None)["gain"]
    assert gain["corner"] == gain["least"] == pytest.approx(0.80, abs=0.006)
    assert gain["centre"] == gain["largest"] == pytest.approx(1.21, abs=0.006)
    assert gain["corner"] < gain["edge"] < gain["centre"]
    # The corner's, summed by hand.
    f = (math.pi / 2) / (15 * math.sqrt(2))
    distances = [math.hypot(row, column) for row in range(16) for column in range(16)]
    expected = sum(math.exp(math.cos(f * d)) / 2 for d in distances if d**2 <= 15**2 + 4 + 1e-9) / 256
    assert gain["corner"] == pytest.approx(expected, rel=1e-6)


def test_landmarks_of_a_grid():
    assert landmarks(4, 6) == {"corner": 0, "edge": 3, "centre": 2 * 6 + 3}


# ---- attention ----


def keeping(seen, block):
    def keep(_module, given, out):
        seen[block] = given[0], out

    return keep


@pytest.mark.parametrize("family", TINY_OF)
def test_attention_is_that_of_the_blocks_themselves(family):
    model = tiny_backbone(family)
    inputs, setting = tiny_inputs(model, batch=1), AttentionModulation((1, 2, 3), "exp", "0.75R")
    layers = model.attention_layers()
    for modulation, which in ((None, 0), (setting, 1)):
        maps = attention_maps(model, inputs, setting)
        seen: dict[int, tuple] = {}
        handles = [layers[block][0].register_forward_hook(keeping(seen, block)) for block in setting.blocks]
        with torch.no_grad(), model.use_attention_modulation(modulation):
            model(**inputs)
        for handle in handles:
            handle.remove()
        for block in setting.blocks:
            attention, (tokens, out) = layers[block][0], seen[block]
            value = attention.to_v(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            ours = attention.to_out[0]((maps[block][which] @ value[0]).transpose(0, 1).flatten(1))
            torch.testing.assert_close(ours, out[0], rtol=1e-4, atol=1e-5)


def test_rows_sum_to_one_without_and_the_first_block_is_multiplied_by_the_matrix():
    model = tiny_model()
    setting = AttentionModulation((0, 3), "cos", None)
    maps = attention_maps(model, tiny_inputs(model, batch=1), setting)
    assert list(maps) == [0, 3]
    for without, _ in maps.values():
        torch.testing.assert_close(without.sum(dim=-1), torch.ones(without.shape[:-1]))
    without, modulated = maps[0]
    torch.testing.assert_close(modulated, without * modulation_matrix(8, 8, "cos"))
    # A later block sees what the first one has changed.
    assert (maps[3][1] - maps[3][0] * modulation_matrix(8, 8, "cos")).abs().max() > 1e-4


def test_looking_leaves_the_model_as_it_was():
    model = tiny_model()
    model.set_attention_modulation([1], "exp", "0.9R")
    inputs = tiny_inputs(model, batch=1)
    with torch.no_grad():
        before = model(**inputs).sample
        attention_maps(model, inputs, AttentionModulation((0, 2)))
        after = model(**inputs).sample
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert model.attention_modulation == AttentionModulation((1,), "exp", "0.9R")
    assert not any(attention._forward_pre_hooks for attention, _ in model.attention_layers())


def test_numbers_of_attention_in_closed_form():
    uniform = torch.full((2, 16, 16), 1 / 16)
    identity = torch.eye(16).expand(2, 16, 16)
    matrix = modulation_matrix(4, 4)
    facts = attention_facts(uniform, uniform * matrix, (4, 4))
    cells = [(row, column) for row in range(4) for column in range(4)]
    mean = sum(math.dist(a, b) for a in cells for b in cells) / 256
    assert facts["distance"]["without"] == pytest.approx(mean, rel=1e-5)
    assert facts["entropy"]["without"] == pytest.approx(math.log(16), rel=1e-5)
    assert facts["row_sum"] == pytest.approx({"without": 1.0, "with": float(matrix.mean() * 16) / 16}, rel=1e-5)
    assert facts["distance"]["with"] < mean
    gain = matrix_facts(4, 4, "exp", None)["gain"]
    assert facts["gain"] == pytest.approx(gain, rel=1e-5)
    alone = attention_facts(identity, identity, (4, 4))
    assert alone["distance"] == alone["entropy"] == {"without": 0.0, "with": 0.0}


# ---- the command's work ----


def saved(folder: Path, scheduler=None, **options) -> Path:
    model = tiny_model(**options)
    scheduler = scheduler or DDPMScheduler(variance_type="learned_range", clip_sample=True)
    ClassConditionalPipeline(model, scheduler, class_names=list("abcde")).save_pretrained(folder)
    return folder


def test_a_size_has_matrices_and_no_attention(tmp_path):
    outcome = show(Request("EDT-S/2", out=tmp_path))
    facts = outcome.facts
    assert facts["setting"] == {"blocks": [7, 10], "formula": "exp", "radius": None}
    assert facts["chosen_by"] == "published at guidance 1"
    assert [each["grid"] for each in facts["matrices"]] == [[8, 8], [16, 16]]
    assert "attention" not in facts
    assert [path.name for path in outcome.written] == ["amm_show.json", "matrix.png"]
    assert json.loads((tmp_path / "amm_show.json").read_text()) == facts
    with Image.open(tmp_path / "matrix.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 20
    lines = table(facts)
    assert any(line.startswith("16x16") and "4.3%" in line and "0.80" in line for line in lines)
    told = show(Request("EDT-S/2", classes="tench", guidance=2.0, out=tmp_path))
    assert told.facts["setting"]["blocks"] == [8]
    assert told.notes == ["EDT-S/2 is a size without weights: only its matrices are shown"]


@pytest.mark.slow
def test_a_saved_model_shows_attention_with_its_own_setting(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", attention_modulation={"blocks": [1, 2], "formula": "cos", "radius": "0.75R"})
    outcome = show(Request(str(folder), classes="b", heads=[1], out=tmp_path / "out"))
    facts = outcome.facts
    assert (facts["words"], facts["chosen_by"]) == ("1+2 cos 0.75R", "saved in the model")
    assert [each["block"] for each in facts["attention"]] == [1, 2]
    assert all(each["row_sum"]["without"] == pytest.approx(1, abs=1e-5) for each in facts["attention"])
    assert facts["input"]["label"] == 1
    assert facts["input"]["timestep"] == 300
    assert {path.name for path in outcome.written} == {"amm_show.json", "matrix.png", "attention.png"}
    with Image.open(tmp_path / "out" / "attention.png") as picture:
        wide = picture.size
    without_head = show(Request(str(folder), out=tmp_path / "out"))
    with Image.open(tmp_path / "out" / "attention.png") as picture:
        assert picture.size[0] < wide[0]
    assert len(table(without_head.facts)) == 1 + 1 + 2 + 1 + 2
    for name in ("draw_matrices", "draw_attention"):
        monkeypatch.setattr(amm_show, name, lambda *_: [])
    changed = show(Request(str(folder), formula="exp", radius="1R", out=tmp_path / "out")).facts
    assert (changed["words"], changed["chosen_by"]) == ("1+2 exp 1R", "saved in the model, changed")


def noisy(monkeypatch, folder, **fields):
    """What the network was shown."""
    seen = []
    kept = attention_maps
    for name in ("draw_matrices", "draw_attention"):
        monkeypatch.setattr(amm_show, name, lambda *_: [])
    monkeypatch.setattr(amm_show, "attention_maps", lambda *given: (seen.append(given[1]), kept(*given))[1])
    outcome = show(Request(str(folder), blocks="0", **fields))
    return seen[0], outcome.facts["input"]


def test_a_picture_is_noised_as_the_process_says(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    clean = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    found = {}
    for timestep in (0, 400, 999):
        inputs, told = noisy(monkeypatch, folder, picture=tmp_path / "p.png", timestep=timestep, out=tmp_path / "o")
        signal, noise = math.sqrt(kept[timestep]), math.sqrt(1 - kept[timestep])
        assert told["noise"] == pytest.approx(noise, rel=1e-4)
        assert told["picture"] == "p.png"
        assert inputs["timestep"].tolist() == [timestep]
        found[timestep] = (inputs["hidden_states"][0] - signal * clean) / noise
    # The same noise of unit deviation at each level.
    torch.testing.assert_close(found[400], found[999], rtol=1e-3, atol=1e-3)
    assert float(found[999].std()) == pytest.approx(1, abs=0.2)


def test_a_flow_model_is_noised_along_straight_lines(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", make_scheduler("euler", prediction_type="flow"), learn_sigma=False)
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path / "p.png")
    inputs, told = noisy(monkeypatch, folder, picture=tmp_path / "p.png", timestep=250, out=tmp_path / "o")
    assert told["noise"] == 0.25
    noise = (inputs["hidden_states"] - 0.75) / 0.25
    assert float(noise.std()) == pytest.approx(1, abs=0.2)
    assert float(noise.mean()) == pytest.approx(0, abs=0.3)


def test_a_sampled_picture_is_of_its_seed_and_made_without_modulation(tmp_path, monkeypatch):
    plain, other = saved(tmp_path / "a"), saved(tmp_path / "b", attention_modulation={"blocks": [1, 3]})
    out = tmp_path / "o"
    first, _ = noisy(monkeypatch, plain, seed=1, out=out)
    again, _ = noisy(monkeypatch, other, seed=1, out=out)
    torch.testing.assert_close(first["hidden_states"], again["hidden_states"], rtol=0, atol=0)
    third, _ = noisy(monkeypatch, plain, seed=2, out=out)
    assert not torch.equal(first["hidden_states"], third["hidden_states"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": "7"}, "--blocks '7': expected numbers from 0 to 4"),
        ({"formula": "sin"}, "unknown attention modulation formula"),
        ({"radius": "-2"}, "--radius '-2'"),
        ({"timestep": 1000}, "--timestep 1000: expected 0 to 999"),
        ({"classes": "frog"}, "frog"),
        ({"heads": [2]}, "--heads 2: the blocks shown have heads 0 to 1"),
        ({"picture": Path("none.png")}, "none.png"),
    ],
)
def test_mistakes(tmp_path, fields, message):
    folder = saved(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        show(Request(str(folder), out=tmp_path / "out", **{"blocks": "0,3", **fields}))


def test_blocks_that_cannot_be_modulated_are_named(tmp_path):
    folder = saved(tmp_path / "model", patch_size=2, depths=(1, 1, 1), dims=(16,) * 3, num_heads=(2,) * 3)
    with pytest.raises(UserError, match="block 1 has a 2x2 token grid: modulation needs at least 3x3"):
        show(Request(str(folder), blocks="0,1", out=tmp_path / "out"))
