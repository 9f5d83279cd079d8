"""The network against outputs of the authors' code. Tolerances are those stated with the golden arrays:
rule A atol 5e-6, rule B atol 6e-5 (fp32 on the CPU); matrices and position tables 1e-6; integers exact."""

import hashlib

import numpy as np
import pytest
import torch
from golden_models import filled_model, filled_state, inputs, largest_error, load

from edt_diffusion import EDTTransformer2DModel, TokenMasks
from edt_diffusion.nn.attention import relative_position_index
from edt_diffusion.nn.embeddings import sincos_position_table
from edt_diffusion.nn.modulation import modulation_matrix
from edt_diffusion.pipelines.guidance import combine

TOLERANCE = {"A": 5e-6, "B": 6e-5}


@pytest.fixture(scope="module")
def small_b() -> EDTTransformer2DModel:
    return filled_model("S", "B")


def check(record_property, actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    error = largest_error(actual, expected)
    record_property("largest_error", error)
    assert actual.shape == expected.shape
    assert error <= tolerance


@pytest.mark.parametrize("rule", ["A", "B"])
def test_fill_rule_reproduces_the_recorded_weights(rule):
    golden = load("fill_check")
    state = filled_state(EDTTransformer2DModel.from_size("S"), rule)
    assert sorted(state) == list(golden["S_32_names"])
    assert [tuple(state[n].shape) for n in sorted(state)] == [
        tuple(int(x) for x in str(s).replace("(", "").replace(")", "").replace("x", ",").split(",") if x)
        for s in golden["S_32_shapes"]
    ]
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().numpy().tobytes())
    assert digest.hexdigest() == str(golden[f"S_32_{rule}_sha256"])


@pytest.mark.parametrize(("size", "rule", "file"), [("S", "A", "edt_s2_256_A"), ("S", "B", "edt_s2_256_B")])
@pytest.mark.parametrize("variant", ["noamm", "amm"])
@torch.no_grad()
def test_forward_256(record_property, size, rule, file, variant):
    golden = load(file)
    model = filled_model(size, rule)
    model.set_attention_modulation(golden[f"amm_blocks_{variant}"].tolist())
    out = model(inputs(golden), torch.from_numpy(golden["t"]), torch.from_numpy(golden["y"]), return_dict=False)[0]
    check(record_property, out, golden[f"out_{variant}"], TOLERANCE[rule])


@torch.no_grad()
def test_forward_256_with_the_automatic_preset(record_property, small_b):
    golden = load("edt_s2_256_B")
    small_b.set_attention_modulation(preset="auto", guidance_scale=1.0)
    out = small_b(inputs(golden), torch.from_numpy(golden["t"]), torch.from_numpy(golden["y"])).sample
    check(record_property, out, golden["out_amm"], TOLERANCE["B"])


def test_forward_with_amm_is_the_same_with_gradients_on(record_property, small_b):
    golden = load("edt_s2_256_B")
    small_b.set_attention_modulation([7, 10])
    out = small_b(inputs(golden), torch.from_numpy(golden["t"]), torch.from_numpy(golden["y"])).sample
    assert out.requires_grad
    check(record_property, out.detach(), golden["out_amm"], TOLERANCE["B"])


@pytest.mark.slow
@torch.no_grad()
def test_forward_b(record_property):
    golden = load("edt_b2_256_B")
    out = filled_model("B", "B")(inputs(golden), torch.from_numpy(golden["t"]), torch.from_numpy(golden["y"])).sample
    check(record_property, out, golden["out_noamm"], TOLERANCE["B"])


@pytest.mark.parametrize("variant", ["noamm", "amm_cos13"])
@torch.no_grad()
def test_forward_512(record_property, variant):
    golden = load("edt_s2_512_A")
    model = filled_model("S", "A", sample_size=64)
    model.set_attention_modulation(golden[f"amm_blocks_{variant}"].tolist(), formula="cos")
    out = model(inputs(golden, side=64), torch.from_numpy(golden["t"]), torch.from_numpy(golden["y"])).sample
    check(record_property, out, golden[f"out_{variant}"], TOLERANCE["A"])


@torch.no_grad()
def test_guided_forward_in_the_authors_three_channel_form(record_property, small_b):
    golden = load("edt_s2_256_cfg2_B")
    small_b.set_attention_modulation(golden["amm_blocks_amm"].tolist())
    x = inputs(golden)
    t, y = torch.from_numpy(golden["t"]), torch.from_numpy(golden["y"])
    cond, uncond = small_b(torch.cat([x, x]), t, y).sample.chunk(2)
    scale = float(golden["scale"])
    halves = [combine(cond, uncond, scale, guided_channels=3), uncond.clone()]
    halves[1][:, :3] = halves[0][:, :3]
    check(record_property, torch.cat(halves), golden["out_amm"], TOLERANCE["B"])


@pytest.mark.parametrize("variant", ["masked", "unmasked"])
@pytest.mark.parametrize("amm", [None, [7, 10]])
def test_masked_training_forward(record_property, small_b, variant, amm):
    golden = load("edt_s2_train_masked_B")
    small_b.train()
    small_b.set_attention_modulation(amm)
    masks = TokenMasks(tuple(torch.from_numpy(golden[f"mask_down{i}_keep"]) for i in range(2)))
    with small_b.suspend_attention_modulation():
        out = small_b(
            inputs(golden),
            torch.from_numpy(golden["t"]),
            torch.from_numpy(golden["y_effective"]),
            token_masks=masks if variant == "masked" else None,
        ).sample
    small_b.eval()
    check(record_property, out.detach(), golden[f"out_{variant}"], TOLERANCE["B"])


@torch.no_grad()
def test_activations_of_every_module(record_property, small_b):
    golden = load("edt_s2_activations_B")
    small_b.set_attention_modulation([7, 10])
    x = inputs({**golden, "x_head": load("edt_s2_256_B")["x_head"]})
    modules: dict[str, torch.nn.Module] = {"x_embedder": small_b.patch_embed, "t_embedder": small_b.timestep_embedder}
    modules["y_embedder"] = small_b.class_embedder
    counts = {"EDTBlock": 0, "DownSample": 0, "UpSample": 0}
    names = {"EDTBlock": "blocks", "DownSample": "down_blocks", "UpSample": "concat_blocks"}
    for block in small_b.blocks:
        kind = type(block).__name__
        modules[f"{names[kind]}.{counts[kind]}"] = block
        if kind == "EDTBlock":
            modules[f"blocks.{counts[kind]}.attn"] = block.attn
            modules[f"blocks.{counts[kind]}.mlp"] = block.ff
        counts[kind] += 1
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
        for name, module in modules.items()
    ]
    small_b(x, torch.from_numpy(golden["t"]), torch.from_numpy(golden["y"]))
    for hook in hooks:
        hook.remove()
    recorded = {key.removesuffix("__head") for key in golden if key.endswith("__head")}
    # `up_blocks` (before the long skip) and `final_layer` are not modules of ours; what follows them is compared.
    assert recorded - set(seen) == {"up_blocks.0", "up_blocks.1", "final_layer"}
    worst = 0.0
    for name in sorted(recorded & set(seen)):
        out = seen[name]
        assert tuple(out.shape) == tuple(golden[f"{name}__shape"])
        head = out[:, :24] if out.ndim == 2 else out[:, [0, 1, out.shape[1] // 2, out.shape[1] - 1], :24]
        worst = max(worst, largest_error(head, golden[f"{name}__head"]))
        np.testing.assert_allclose([out.mean(), out.std()], golden[f"{name}__mean_std"], atol=6e-5)
    record_property("largest_error", worst)
    assert worst <= TOLERANCE["B"]


@pytest.mark.parametrize(
    ("key", "side", "formula"), [("exp_n8", 8, "exp"), ("exp_n16", 16, "exp"), ("cos13_n32", 32, "cos")]
)
def test_amm_matrices(record_property, key, side, formula):
    expected = load("amm_matrices")[key]
    matrix = modulation_matrix(side, side, formula)
    np.testing.assert_array_equal((matrix > 0).numpy(), expected > 0)
    check(record_property, matrix, expected, 1e-6)


def test_relative_position_index():
    np.testing.assert_array_equal(relative_position_index(4, 4).numpy(), load("relpos_index")["index_n4"])


@pytest.mark.parametrize(("dim", "side"), [(312, 16), (416, 8), (520, 4)])
def test_position_tables(record_property, dim, side):
    expected = load("sincos_pos_embed")[f"dim{dim}_n{side}"]
    check(record_property, sincos_position_table(dim, side, side)[0], expected, 1e-6)
