"""Tables 5, 6 and 7 against closed forms, counts of real modules, and the published figures."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edt_diffusion.models.dit import SIZES as DIT_SIZES
from edt_diffusion.models.dit import DiT2DModel
from edt_diffusion.models.masking import TokenMasks
from edt_diffusion.models.mdt import MDT2DModel
from edt_diffusion.nn.transformer_block import Skips
from edt_diffusion.studies.reproduce import Request, costs, published, reproduce
from edt_diffusion.util.errors import UserError


def rows_of(page):
    return {row[page.grids[0].columns[0].key]: row for row in page.grids[0].rows}


def page_of(make, tmp_path, **given):
    return make(Request("table", tmp_path, **given))


def test_table5_has_the_published_sizes(tmp_path):
    page = page_of(costs.table5, tmp_path)
    rows = rows_of(page)
    small, base, large, counted = rows.values()
    assert [row["model"] for row in rows.values()][:3] == ["EDT-S", "EDT-B", "EDT-XL"]
    # Counted from the authors' code by another program.
    assert [small["parameters"], base["parameters"], large["parameters"]] == [38.329146, 152.262100, 698.523098]
    assert [round(row["gflops"], 3) for row in (small, base, large)] == [2.667, 10.218, 53.440]
    assert [row["gflops_paper"] for row in rows.values()] == [2.66, 10.20, 51.83, 51.83]
    assert (small["depths"], small["dims"], small["heads"]) == (
        "2, 2, 2, 3, 3",
        "312, 416, 520, 416, 312",
        "6, 8, 10, 8, 6",
    )
    assert small["grids"] == "16, 8, 4, 8, 16"
    # The layout of 28 blocks that the published counts of XL belong to, exactly as published.
    assert (round(counted["parameters"], 2), round(counted["gflops"], 2)) == (708.44, 51.83)
    assert (counted["parameters_paper"], small["parameters_paper"]) == (708.44, None)
    depths = [int(depth) for depth in counted["depths"].split(",")]
    assert (depths[0] + depths[4], depths[1] + depths[3], depths[2], sum(depths)) == (12, 12, 4, 28)
    text = page.markdown()
    assert "698.52 M parameters and 53.44 GFLOPs" in text
    assert "708.44 M, 51.83 GFLOPs" in text


def test_table5_at_512_pixels_shows_no_published_figures(tmp_path):
    page = page_of(costs.table5, tmp_path, image_size=512)
    rows = rows_of(page)
    assert [round(rows[f"EDT-{size}"]["gflops"], 3) for size in ("S", "B", "XL")] == [13.299, 46.059, 233.662]
    assert all(row["gflops_paper"] is None for row in rows.values())
    assert "Counted here" not in page.markdown()
    with pytest.raises(UserError, match="--image-size 250: expected a multiple of 64"):
        page_of(costs.table5, tmp_path, image_size=250)


@pytest.mark.parametrize("size", list(DIT_SIZES))
def test_table6_counts_what_a_real_block_has_and_does(size, tmp_path):
    assert costs.DIT_WIDTHS[size] == DIT_SIZES[size]["hidden_size"]
    rows = rows_of(page_of(costs.table6, tmp_path, size=size))
    with torch.device("meta"):
        network = DiT2DModel.from_size(size)
        block, width, tokens = network.blocks[0], network.config.hidden_size, 256
        inputs, condition = torch.empty(1, tokens, width), torch.empty(1, width)
    assert len(rows) == 7
    found = {name: round(row[f"parameters_{size}"] * 1e6) for name, row in rows.items()}
    parts = {
        "adaLN": block.adaln, "MLP": block.ff, "output projection": block.attn.to_out, "block": block,
    }  # fmt: skip
    for name, part in parts.items():
        assert found[name] == sum(p.numel() for p in part.parameters()), name
    qkv = (block.attn.to_q, block.attn.to_k, block.attn.to_v)
    assert found["queries, keys, values"] == sum(p.numel() for part in qkv for p in part.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(inputs, condition, Skips())
    total = counter.get_total_flops() // 2
    listed = {name: round(row[f"mflops_{size}"] * 1e6) for name, row in rows.items()}
    assert listed["block"] == sum(count for name, count in listed.items() if name != "block")
    # torch's counter knows linear layers everywhere, and fused attention on some devices only.
    attention = listed["scores, queries times keys"] + listed["attention times values"]
    assert attention == 2 * tokens**2 * width
    assert total in (listed["block"], listed["block"] - attention)


def test_table6_has_the_closed_form_of_one_size(tmp_path):
    total = rows_of(page_of(costs.table6, tmp_path))["block"]
    n, c = 256, 1152
    assert total["mflops_XL"] == pytest.approx((6 * c**2 + 12 * n * c**2 + 2 * n**2 * c) / 1e6)
    assert total["parameters_XL"] == pytest.approx((18 * c**2 + 15 * c) / 1e6)
    with pytest.raises(UserError, match="unknown DiT size 'M'"):
        page_of(costs.table6, tmp_path, size="M")


def test_table7_counts_pictures_epochs_and_operations(tmp_path):
    page = page_of(costs.table7, tmp_path)
    rows = {(row["model"], row["iterations"]): row for row in page.grids[0].rows}
    small = rows["EDT-S", 400]
    assert small["pictures"] == 102.4
    assert small["epochs"] == pytest.approx(102.4e6 / 1_281_167)
    # Full and masked pass, three times the forward pass, two operations a multiply-add.
    assert small["exaflops"] == pytest.approx(2.667 * 2 * 3 * 2 * 102.4e6 * 1e9 / 1e18, rel=2e-4)
    assert (small["fid"], rows["EDT-XL", 2000]["fid"], rows["EDT-B", 1000]["fid"]) == (34.27, "3.54, guided", 13.58)
    assert [row["fid"] for name, row in rows.items() if not name[0].startswith("EDT")] == [None] * 7
    assert all(row["days"] is None and row["rate"] is None for row in rows.values())
    # DiT of 12 blocks, by the closed form: patches, timesteps, blocks, last layer.
    n, c = 256, 384
    dit = 16 * c * n + 256 * c + c * c + 12 * (6 * c * c + 12 * n * c * c + 2 * n * n * c) + 2 * c * c + 32 * n * c
    assert rows["DiT-S", 400]["gflops"] == pytest.approx(dit / 1e9)
    assert rows["DiT-S", 400]["exaflops"] == pytest.approx(6 * dit * 102.4e6 / 1e18)
    assert rows["DiT-XL", 7000]["pictures"] == 1792


def test_the_masked_pass_of_mdt_is_counted_on_the_tokens_that_are_left():
    """Against torch's own count of a masked forward pass."""
    network = MDT2DModel(
        sample_size=8, patch_size=1, in_channels=3, num_classes=5, depth=6, hidden_size=32, num_heads=2, decode_layers=2
    )
    tokens, kept = 64, round(64 * 0.6)
    keep = torch.zeros(1, tokens, dtype=torch.bool)
    keep[:, :kept] = True

    def count(masks):
        """Linear layers and convolutions by torch's counter; attention products, of which it knows some forms only."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.train()(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long), masks)
        found = counter.get_flop_counts()["Global"]
        return sum(count for name, count in found.items() if str(name) in ("aten.addmm", "aten.convolution")) / 2

    def attention(*numbers):
        return sum(2 * n**2 * 32 for n in numbers)

    full = count(None) + attention(*[tokens] * 6)
    assert full == sum(network.multiply_adds().values())
    # In- and out-blocks on the tokens kept, the block that guesses and those of the decoder on all.
    masked = count(TokenMasks((), None, keep)) + attention(*[kept] * 4, *[tokens] * 3)
    ours = costs.step_multiply_adds("MDTv2", network)
    # 64 x 0.6 tokens are no whole number.
    assert ours == pytest.approx(full + masked, rel=5e-3)
    assert ours < 2 * full * 0.98


def test_a_size_that_a_table_has_not_is_refused(tmp_path):
    with pytest.raises(UserError, match="table 7 has S, B and XL"):
        page_of(costs.table7, tmp_path, size="tiny")


def test_table7_measures_days_on_this_machine(tmp_path, monkeypatch):
    from edt_diffusion.studies.reproduce import speed

    rates = {("EDT", "S"): 20.0, ("MDTv2", "S"): 5.0, ("DiT", "S"): 10.0}
    monkeypatch.setattr(speed, "published_rates", lambda size, side, device: rates)
    page = page_of(costs.table7, tmp_path, size="S", measure=True)
    rows = rows_of(page)
    assert list(rows) == ["EDT-S", "MDTv2-S", "DiT-S"]
    assert rows["EDT-S"]["days"] == pytest.approx(102.4e6 / 20 / 86400)
    assert "what this device would take" in page.markdown()


def test_every_published_value_stands_in_the_design_notes():
    """The values, and no others: a value added from memory fails here until its source is named."""
    tables = (
        published.GFLOPS, published.PARAMETERS, published.FID, published.INCEPTION_SCORE, published.GUIDED_FID,
        published.GUIDED_INCEPTION_SCORE, published.TRAINING_SPEED, published.SAMPLING_SPEED,
    )  # fmt: skip
    values = sorted(cell.value for table in tables for cell in table.values())
    assert values == sorted([
        2.66, 10.20, 51.83, 708.44, 34.27, 19.18, 13.58, 7.52, 42.6, 74.4, 94.1, 142.4, 3.54, 355.8,
        3.93, 2.84, 1.92, 2.29, 2.29, 2.22,
    ])  # fmt: skip
    assert all(cell.source for table in tables for cell in table.values())


def test_a_page_is_written_as_markdown_and_json(tmp_path):
    page = reproduce(Request("table5", tmp_path / "t", command="edt reproduce table5"))
    text, facts = (tmp_path / "t/table.md").read_text(), json.loads((tmp_path / "t/table.json").read_text())
    assert facts == page.facts() | {"made": facts["made"]}
    assert "| EDT-B | 5 | 2, 2, 2, 3, 3 |" in text
    assert "not known to this project" in text
    assert "    edt reproduce table5\n" in text
    assert torch.__version__.split("+")[0] in text
    rows = {row["model"]: row for row in facts["grids"][0]["rows"]}
    assert rows["EDT-S"]["parameters"] == 38.329146
    assert rows["EDT-S"]["parameters_paper"] is None
