import argparse
import logging
import os
import pickle

import pytest
import torch
from tiny_backbones import tiny_backbone
from tiny_models import tiny_inputs, tiny_model

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.convert import FAMILIES, from_official, read_official, to_official
from edt_diffusion.models import DiT2DModel, MDT2DModel
from edt_diffusion.nn.attention import relative_position_index
from edt_diffusion.util.errors import UserError

SMALL = {"sample_size": 16, "dims": (16, 24, 32, 24, 16), "num_heads": (2, 3, 4, 3, 2)}
MODELS = {
    "the published XL's layout": {**SMALL, "depths": (5, 5, 4, 7, 7)},
    "odd depths": {**SMALL, "depths": (3, 1, 2, 5, 1)},
    "three stages": {},
    "seven stages": {"sample_size": 16, "depths": (1,) * 7, "dims": (8, 12, 16, 20, 16, 12, 8), "num_heads": (2,) * 7},
    "asymmetric widths": {"dims": (16, 24, 32), "num_heads": (4, 3, 2)},
    "equal widths and heads": {"depths": (2, 3, 1), "dims": (16, 16, 16), "num_heads": (2, 2, 2)},
    "unconditional": {"num_classes": None},
    "noise only": {"learn_sigma": False},
    "one channel, one class": {"in_channels": 1, "num_classes": 1},
    "patch 2": {"sample_size": 16, "patch_size": 2},
    "patch 4": {"sample_size": 16, "patch_size": 4},
    "rectangle": {"sample_size": (6, 10)},
    "MLP ratio 2.2 of width 28": {"dims": (28, 24, 28), "mlp_ratio": 2.2},
}


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_round_trip(case):
    model = tiny_model(**MODELS[case])
    official = to_official(model)
    given = {} if isinstance(model.config.sample_size, int) else {"sample_size": model.config.sample_size}
    back = from_official(official, **given)
    assert not back.training
    assert back.attention_modulation is None
    for name in ("sample_size", "patch_size", "in_channels", "num_classes", "learn_sigma"):
        assert back.config[name] == model.config[name], name
    for name in ("depths", "dims", "num_heads"):
        assert tuple(back.config[name]) == tuple(model.config[name]), name
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    inputs = tiny_inputs(model)
    assert torch.equal(back(**inputs).sample, model(**inputs).sample)
    again = to_official(back)
    assert again.keys() == official.keys()
    assert all(torch.equal(tensor, official[name]) for name, tensor in again.items())


def test_names_and_shapes_of_the_authors():
    """Section 2 of design/edt.md, at small widths: flat block numbers, joint qkv, resampling modules apart."""
    state = to_official(tiny_model())
    blocks = {
        "attn.rel_pos_bias.relative_position_bias_table", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
        "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
        "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
    }  # fmt: skip
    expected = {f"blocks.{i}.{name}" for i in range(5) for name in blocks} | {
        "pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "t_embedder.mlp.0.weight",
        "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight", "t_embedder.mlp.2.bias",
        "y_embedder.embedding_table.weight",
        "down_blocks.0.pos_embed", "down_blocks.0.adaLN_modulation.1.weight", "down_blocks.0.adaLN_modulation.1.bias",
        "down_blocks.0.reduction.weight", "up_blocks.0.expand.weight", "concat_blocks.0.pos_embed",
        "concat_blocks.0.adaLN_modulation.1.weight", "concat_blocks.0.adaLN_modulation.1.bias",
        "concat_blocks.0.cat.weight", "concat_blocks.0.cat.bias", "final_layer.linear.weight",
        "final_layer.linear.bias", "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
    }  # fmt: skip
    assert set(state) == expected
    assert state["blocks.2.attn.qkv.weight"].shape == (72, 24)
    assert state["blocks.2.attn.rel_pos_bias.relative_position_bias_table"].shape == (49, 3)
    assert state["down_blocks.0.adaLN_modulation.1.weight"].shape == (128, 16)
    assert state["concat_blocks.0.adaLN_modulation.1.weight"].shape == (64, 16)
    with torch.device("meta"):
        assert len(to_official(EDTTransformer2DModel.from_size("S"))) == 164
        assert len(to_official(EDTTransformer2DModel.from_size("XL"))) == 340


def test_q_k_v_are_the_thirds_of_the_joint_matrix():
    state = to_official(tiny_model())
    attention = from_official(state).blocks[0].attn
    for part, rows in zip("qkv", (slice(0, 16), slice(16, 32), slice(32, 48)), strict=True):
        linear = getattr(attention, f"to_{part}")
        assert torch.equal(linear.weight, state["blocks.0.attn.qkv.weight"][rows])
        assert torch.equal(linear.bias, state["blocks.0.attn.qkv.bias"][rows])


def test_the_model_does_not_share_memory_with_the_file():
    state = to_official(tiny_model())
    model = from_official(state)
    state["blocks.0.attn.qkv.weight"].zero_()
    state["pos_embed"].zero_()
    assert model.blocks[0].attn.to_q.weight.any()
    assert model.pos_embed.any()


@pytest.mark.parametrize("size", [(6, 10), [6, 10]])
def test_rectangles_need_their_size(size):
    state = to_official(tiny_model(sample_size=(6, 10)))
    with pytest.raises(ValueError, match=r"60 tokens are not a square grid: give sample_size=\(height, width\)"):
        from_official(state)
    assert from_official(state, sample_size=size).grids == [(6, 10), (3, 5), (6, 10)]
    with pytest.raises(ValueError, match=r"makes 64 tokens, the state dict has positions for 60"):
        from_official(state, sample_size=8)


def test_a_rectangle_of_as_many_tokens_is_not_taken_for_another():
    state = to_official(tiny_model(sample_size=(8, 8)))
    with pytest.raises(ValueError, match="tensors do not fit"):
        from_official(state, sample_size=(4, 16))
    turned = to_official(tiny_model(sample_size=(6, 10)))
    # (6, 10) and (10, 6) have tables of equal size; only the position tables tell.
    with pytest.raises(ValueError, match="exchanged"):
        from_official(turned, sample_size=(10, 6))


@pytest.mark.parametrize(
    "given",
    [
        {"depths": (2, 2, 1)},
        {"dims": (16, 24, 20)},
        {"num_heads": (4, 3, 2)},
        {"num_classes": 1000},
        {"num_classes": None},
        {"learn_sigma": False},
        {"patch_size": 2},
        {"in_channels": 4},
        {"mlp_ratio": 2.0},
    ],
)
def test_given_values_must_agree(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"{name}=.* was given, but the state dict says"):
        from_official(to_official(tiny_model()), **given)
    assert value != tiny_model().config[name]


def test_given_values_that_agree():
    model = tiny_model(mlp_ratio=2.7)
    names = ("sample_size", "patch_size", "in_channels", "num_classes", "learn_sigma", "depths", "dims", "num_heads")
    given = {name: model.config[name] for name in names}
    back = from_official(to_official(model), **{**given, "depths": [2, 1, 2]}, mlp_ratio=2.7, stage0_mask_block=0)
    assert back.config.mlp_ratio == 2.7
    assert back.config.stage0_mask_block == 0
    assert back.blocks[0].stage0_mask
    assert not back.blocks[1].stage0_mask
    with pytest.raises(TypeError, match="no_such_argument"):
        from_official(to_official(model), no_such_argument=1)
    with pytest.raises(ValueError, match="unknown checkpoint family 'EDTT': expected one of edt"):
        from_official(to_official(model), family="EDTT")


def test_missing_and_unexpected_entries():
    state = to_official(tiny_model())
    without = {name: tensor for name, tensor in state.items() if name != "blocks.3.attn.proj.bias"}
    with pytest.raises(ValueError, match=r"entries 1 missing \(blocks\.3\.attn\.proj\.bias\)$"):
        from_official(without)
    extra = {**state, **{f"extra.{i}": torch.zeros(1) for i in range(5)}}
    with pytest.raises(ValueError, match=r"entries 5 unexpected \(extra\.0, extra\.1, extra\.2, \.\.\.\)$"):
        from_official(extra)
    with pytest.raises(ValueError, match=r"1 missing .* and 1 unexpected"):
        from_official({**without, "extra.0": torch.zeros(1)})
    for name in ("pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.attn.qkv.weight"):
        broken = {key: tensor for key, tensor in state.items() if key != name}
        with pytest.raises(ValueError, match=f"{name}.*not an EDT checkpoint"):
            from_official(broken)
    with pytest.raises(ValueError, match="not an EDT checkpoint"):
        from_official({})
    with pytest.raises(ValueError, match=r"1 tensors do not fit, the first blocks\.0\.attn\.to_out\.0\.bias"):
        from_official({**state, "blocks.0.attn.proj.bias": torch.zeros(7)})


def test_weights_of_another_architecture_are_refused():
    state = to_official(tiny_model())
    dit = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(("down_blocks", "up_blocks", "concat_blocks")) and "rel_pos_bias" not in name
    }
    with pytest.raises(ValueError, match="not an EDT checkpoint"):
        from_official(dit)
    mdt = {name: tensor for name, tensor in state.items() if not name.startswith(("down_", "up_", "concat_"))}
    with pytest.raises(ValueError, match="no down_blocks in the state dict: this is not an EDT checkpoint"):
        from_official(mdt)
    with pytest.raises(ValueError, match="Linear: expected one of EDTTransformer2DModel"):
        to_official(torch.nn.Linear(1, 1))


@torch.no_grad()
def test_drifted_position_tables_are_kept_with_a_warning(caplog):
    model = tiny_model()
    state = to_official(model)
    with caplog.at_level(logging.WARNING, logger="edt_diffusion"):
        from_official(state)
        assert not caplog.records
        state["concat_blocks.0.pos_embed"][0, 3, 5] += 1.5e-4
        converted = from_official(state)
    assert torch.equal(converted.blocks[4].pos_embed, state["concat_blocks.0.pos_embed"])
    assert len(caplog.records) == 1
    assert "position table blocks.4.pos_embed is 1.50e-04 off its formula" in caplog.text
    inputs = tiny_inputs(model)
    assert not torch.equal(converted(**inputs).sample, model(**inputs).sample)


def test_the_prefix_of_parallel_training_is_dropped():
    model = tiny_model()
    prefixed = {f"module.{name}": tensor for name, tensor in to_official(model).items()}
    state = from_official(prefixed).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ---- files ----


@pytest.fixture
def checkpoint(tmp_path):
    """A file as the authors' training script writes it."""
    content = {
        "model": to_official(tiny_model(seed=1)),
        "ema": to_official(tiny_model(seed=2)),
        "opt": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3, "betas": (0.98, 0.92, 0.99)}]},
        "args": argparse.Namespace(model="EDT-S/2", image_size=256),
    }
    path = tmp_path / "0400000.pt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("weights", "seed"), [("ema", 2), ("model", 1)])
def test_read_official(checkpoint, weights, seed):
    state = read_official(checkpoint, weights)
    expected = to_official(tiny_model(seed=seed))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_read_official_takes_the_averaged_weights_unless_told_otherwise(checkpoint):
    assert torch.equal(read_official(str(checkpoint))["x_embedder.proj.bias"], tiny_model(seed=2).patch_embed.proj.bias)


def test_read_official_of_a_bare_state_dict(tmp_path):
    expected = to_official(tiny_model())
    torch.save(expected, tmp_path / "bare.pt")
    state = read_official(tmp_path / "bare.pt")
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    content = {"ema": to_official(tiny_model()), "args": Malicious(str(trace))}
    zipped, plain = tmp_path / "zipped.pt", tmp_path / "plain.pt"
    torch.save(content, zipped)
    plain.write_bytes(pickle.dumps({"ema": {}, "args": Malicious(str(trace))}))
    for path in (zipped, plain):
        with pytest.raises(UserError, match=f"{path.name} cannot be read as plain weights: .*holds code"):
            read_official(path)
    assert not trace.exists()
    torch.load(zipped, weights_only=False)  # the file does run its code where that is allowed
    assert trace.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(checkpoint, share):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"0400000\.pt cannot be read as plain weights: .*truncated"):
        read_official(checkpoint)


def test_other_files(tmp_path):
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        read_official(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="is a folder"):
        read_official(tmp_path)
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        read_official(text)
    for content in ({"model": {"a": torch.zeros(1)}, "step": 3}, {"ema": 3}, [torch.zeros(1)], {}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match="holds no 'ema' weights"):
            read_official(tmp_path / "other.pt")


def test_height_and_width_exchanged_are_refused():
    model = tiny_model(sample_size=(8, 16))
    state = to_official(model)
    with pytest.raises(ValueError, match=r"position table pos_embed .*sample_size=\(16, 8\).*exchanged"):
        from_official(state, sample_size=(16, 8))
    assert torch.equal(to_official(from_official(state, sample_size=(8, 16)))["pos_embed"], state["pos_embed"])


# ---- DiT and MDTv2 ----

BASELINES = {
    "dit": ("DiT", {}),
    "dit, patch 4": ("DiT", {"sample_size": 16, "patch_size": 4}),
    "dit, rectangle": ("DiT", {"sample_size": (6, 10)}),
    "dit, unconditional": ("DiT", {"num_classes": None}),
    "dit, MLP ratio 2.2 of width 28": ("DiT", {"hidden_size": 28, "mlp_ratio": 2.2}),
    "mdtv2": ("MDTv2", {}),
    "mdtv2, other decoder": ("MDTv2", {"depth": 9, "decode_layers": 5, "num_heads": 4}),
    "mdtv2, rectangle": ("MDTv2", {"sample_size": (6, 10)}),
    "mdtv2, noise only": ("MDTv2", {"learn_sigma": False, "num_classes": None}),
}


@pytest.mark.parametrize("case", BASELINES)
@torch.no_grad()
def test_round_trip_of_other_families(case):
    family, change = BASELINES[case]
    model = tiny_backbone(family, **change)
    official = to_official(model)
    given = {} if isinstance(model.config.sample_size, int) else {"sample_size": model.config.sample_size}
    given |= {"num_heads": 2} if family == "DiT" else {}
    back = from_official(official, family.lower(), **given)
    assert type(back) is type(model)
    names = ("sample_size", "patch_size", "in_channels", "num_classes", "learn_sigma", "depth", "hidden_size")
    for name in (*names, "num_heads", *(("decode_layers",) if family == "MDTv2" else ())):
        assert back.config[name] == model.config[name], name
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    again = to_official(back)
    assert again.keys() == official.keys()
    assert all(torch.equal(tensor, official[name]) for name, tensor in again.items())
    inputs = tiny_inputs(model)
    assert torch.equal(back(**inputs).sample, model(**inputs).sample)


def test_names_and_shapes_of_dit_and_mdtv2():
    """Section 13 of design/edt.md: DiT-S has 132 entries and no biases; MDTv2's tables end with three rows more."""
    with torch.device("meta"):
        dit = to_official(DiT2DModel.from_size("S"))
    assert len(dit) == 132
    assert not any("rel_pos_bias" in name for name in dit)
    state = to_official(tiny_backbone("MDTv2"))
    assert {name.split(".")[0] for name in state} == {
        "pos_embed", "decoder_pos_embed", "mask_token", "x_embedder", "t_embedder", "y_embedder", "en_inblocks",
        "en_outblocks", "de_blocks", "sideblocks", "final_layer",
    }  # fmt: skip
    for name in ("en_inblocks.1", "en_outblocks.1", "de_blocks.1", "sideblocks.0"):
        assert state[f"{name}.attn.rel_pos_bias.relative_position_bias_table"].shape == (15 * 15 + 3, 2)
        index = state[f"{name}.attn.rel_pos_bias.relative_position_index"]
        assert index.dtype == torch.int64
        assert torch.equal(index, relative_position_index(8, 8))
        assert (f"{name}.skip_linear.weight" in state) == (name.split(".")[0] in ("en_outblocks", "de_blocks"))
    assert state["de_blocks.0.skip_linear.weight"].shape == (16, 32)
    assert state["mask_token"].shape == (1, 1, 16)


def test_blocks_of_mdtv2_come_in_the_order_in_out_decoder():
    model = tiny_backbone("MDTv2")
    state = to_official(model)
    places = {"en_inblocks.0": 0, "en_inblocks.1": 1, "en_outblocks.0": 2, "en_outblocks.1": 3, "de_blocks.1": 6}
    for theirs, ours in places.items():
        assert torch.equal(state[f"{theirs}.mlp.fc1.weight"], model.blocks[ours].ff.net[0].proj.weight)
    assert torch.equal(state["sideblocks.0.mlp.fc1.weight"], model.blocks[4].block.ff.net[0].proj.weight)
    assert torch.equal(state["decoder_pos_embed"], model.blocks[4].pos_embed)


@pytest.mark.parametrize("family", ["EDT", "DiT", "MDTv2"])
def test_a_wrong_family_is_told_the_right_one(family):
    state = to_official(tiny_backbone(family))
    for given in set(FAMILIES) - {family.lower()}:
        with pytest.raises(
            ValueError, match=f"is not an? .+ checkpoint but one of {family}: give family {family.lower()}"
        ):
            from_official(state, given)


def test_heads_of_a_dit():
    state = to_official(tiny_backbone("DiT"))
    with pytest.raises(ValueError, match=r"no published size has width 16, .* give num_heads"):
        from_official(state, "dit")
    small = DiT2DModel.from_size("S", depth=1, sample_size=4)
    assert from_official(to_official(small), "dit").config.num_heads == 6


def test_strange_files_of_other_families():
    mdt, dit = to_official(tiny_backbone("MDTv2")), to_official(tiny_backbone("DiT"))

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in mdt.items() if key != name}

    with pytest.raises(ValueError, match="2 in-blocks, 1 out-blocks, 1 side blocks: expected as many in as out"):
        from_official(without("en_outblocks.1.attn.qkv.weight"), "mdtv2")
    with pytest.raises(ValueError, match=r"'sideblocks\.0\.attn\.qkv\.weight' is missing: this is not an MDTv2"):
        from_official(without("sideblocks.0.attn.qkv.weight"), "mdtv2")
    with pytest.raises(ValueError, match=r"1 missing \(mask_token\)"):
        from_official(without("mask_token"), "mdtv2")
    with pytest.raises(ValueError, match="1 unexpected"):
        from_official({**dit, "extra": torch.zeros(1)}, "dit", num_heads=2)
    with pytest.raises(ValueError, match="depth=3 was given, but the state dict says 4"):
        from_official(dit, "dit", num_heads=2, depth=3)
    with pytest.raises(ValueError, match="num_heads=4 was given, but the state dict says 2"):
        from_official(mdt, "mdtv2", num_heads=4)


def test_sides_exchanged_are_noticed_in_other_families():
    """DiT's fixed table tells, and MDTv2's saved index, whose own table is learned."""
    dit, mdt = (to_official(tiny_backbone(family, sample_size=(4, 8))) for family in ("DiT", "MDTv2"))
    with pytest.raises(ValueError, match=r"position table pos_embed .*sample_size=\(8, 4\).*exchanged"):
        from_official(dit, "dit", num_heads=2, sample_size=(8, 4))
    with pytest.raises(ValueError, match=r"relative_position_index is not that of sample_size=\(8, 4\).*exchanged"):
        from_official(mdt, "mdtv2", sample_size=(8, 4))
    moved = mdt["pos_embed"] + 1  # a learned table may be anything
    back = from_official({**mdt, "pos_embed": moved}, "mdtv2", sample_size=(4, 8))
    assert type(back) is MDT2DModel
    assert torch.equal(back.pos_embed, moved)


def test_the_authors_files_have_no_place_for_switches_of_ours():
    for change in ({"side_interpolater": True}, {"token_information_enhancement": False}):
        with pytest.raises(ValueError, match="no place for a side interpolater or for modules left out"):
            to_official(tiny_model(**change))
