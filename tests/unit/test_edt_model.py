import itertools
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from tiny_models import TINY, randomise, tiny_inputs, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from edt_diffusion import EDTTransformer2DModel, TokenMasks
from edt_diffusion.models.edt import DownSample, EDTBlock, Skips, UpSample
from edt_diffusion.nn.embeddings import PatchEmbed, sincos_position_table, unpatchify
from edt_diffusion.nn.resample import merge_2x2, split_2x2

# ---- size ----

PUBLISHED = {  # (size, sample_size): total, trainable, 10^9 multiply-adds; design/edt.md, section 1
    ("S", 32): (38_550_458, 38_329_146, 2.667),
    ("S", 64): (39_337_594, 38_452_346, 13.299),
    ("B", 32): (152_704_724, 152_262_100, 10.218),
    ("B", 64): (154_278_996, 152_508_500, 46.059),
    ("XL", 32): (699_187_034, 698_523_098, 53.440),
    ("XL", 64): (702_098_138, 699_442_394, 233.662),
}


@pytest.mark.parametrize(("size", "sample_size"), PUBLISHED)
def test_parameters_and_multiply_adds(size, sample_size):
    with torch.device("meta"):
        model = EDTTransformer2DModel.from_size(size, sample_size=sample_size)
    total, trainable, multiply_adds = PUBLISHED[size, sample_size]
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert model.num_parameters() == trainable
    assert round(sum(model.multiply_adds().values()) / 1e9, 3) == multiply_adds


def test_published_xl_size_is_that_of_another_layout():
    """708.44 M parameters and 51.83 G are not the released depths but, for instance, [5, 5, 4, 7, 7]."""
    with torch.device("meta"):
        model = EDTTransformer2DModel.from_size("XL", depths=(5, 5, 4, 7, 7))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 708.44
    assert round(sum(model.multiply_adds().values()) / 1e9, 2) == 51.83


CUSTOM = {
    "three stages": {},
    "one stage": {"depths": (3,), "dims": (16,), "num_heads": (2,)},
    "seven stages": {
        "sample_size": 16,
        "depths": (1, 1, 1, 2, 1, 1, 1),
        "dims": (8, 12, 16, 20, 16, 12, 8),
        "num_heads": (1, 2, 2, 5, 2, 2, 1),
    },
    "asymmetric widths": {"dims": (16, 24, 32), "num_heads": (4, 3, 2)},
    "equal widths": {"dims": (16, 16, 16), "num_heads": (2, 2, 2)},
    "rectangle": {"sample_size": (6, 10)},
    "tall rectangle, patch 2": {"sample_size": (16, 4), "patch_size": 2},
    "one channel": {"in_channels": 1},
    "unconditional": {"num_classes": None},
    "noise only": {"learn_sigma": False},
    "narrow MLP": {"mlp_ratio": 1.5},
}


@pytest.mark.parametrize("case", CUSTOM)
@torch.no_grad()
def test_custom_layouts(case):
    config = {**TINY, **CUSTOM[case]}
    model = tiny_model(**CUSTOM[case])
    inputs = tiny_inputs(model)
    out = model(**inputs).sample
    channels = config["in_channels"] * (2 if config.get("learn_sigma", True) else 1)
    assert out.shape == (2, channels, *inputs["hidden_states"].shape[2:])
    assert torch.equal(out, model(**inputs, return_dict=False)[0])
    # Every image is computed on its own, and every part of the input matters.
    alone = model(**{name: value[:1] for name, value in inputs.items()}).sample
    torch.testing.assert_close(alone, out[:1], atol=1e-5, rtol=0)
    for name in inputs:
        changed = {**inputs, name: inputs[name].roll(1, 0)}
        assert (model(**changed).sample - out).abs().max() > 1e-3


@pytest.mark.parametrize("case", CUSTOM)
@torch.no_grad()
def test_multiply_adds_against_torchs_own_count(case):
    """torch counts two operations per multiply-add of every convolution and matrix product."""
    model = tiny_model(**CUSTOM[case])
    model.set_attention_backend("_native_math")
    inputs = tiny_inputs(model, batch=1)
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert counter.get_total_flops() == 2 * sum(model.multiply_adds().values())


def test_from_size():
    with torch.device("meta"):
        small = EDTTransformer2DModel.from_size("S", num_classes=10, sample_size=(16, 32), depths=[1, 1, 2, 1, 1])
        named = EDTTransformer2DModel.from_size("EDT-B/2")
    assert small.config.num_classes == 10
    assert small.grids == [(8, 16), (4, 8), (2, 4), (4, 8), (8, 16)]
    assert small.mask_grids == ((8, 16), (4, 8))
    assert tuple(small.config.dims) == (312, 416, 520, 416, 312)
    assert len(small.attention_layers()) == 6
    assert tuple(named.config.num_heads) == (12, 16, 20, 16, 12)
    with pytest.raises(ValueError, match="unknown EDT size 'L': expected one of S, B, XL"):
        EDTTransformer2DModel.from_size("L")
    with pytest.raises(TypeError, match="no_such_argument"):
        EDTTransformer2DModel.from_size("S", no_such_argument=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sample_size": 6, "patch_size": 2}, r"sample_size=6 cannot be divided by 4 .*use 8 x 8"),
        ({"sample_size": (8, 9)}, r"sample_size=\(8, 9\) cannot be divided by 2 .*use 8 x 8"),
        ({"sample_size": 0}, "sample_size=0: expected a positive integer"),
        ({"sample_size": (8, 8, 8)}, "expected a positive integer or"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"num_classes": 0}, "num_classes=0: .* None for an unconditional model"),
        ({"mlp_ratio": 0}, "mlp_ratio=0: expected a positive"),
        ({"mlp_ratio": -2.0}, "mlp_ratio=-2.0"),
        ({"depths": (1, 1)}, "have 2, 3 and 3 entries: expected the same odd number"),
        ({"depths": (1, 1), "dims": (16, 16), "num_heads": (2, 2)}, "same odd number"),
        ({"depths": (1, 0, 1)}, r"depths=\(1, 0, 1\): expected one positive integer per stage"),
        ({"depths": 3}, "depths=3: expected one positive integer per stage"),
        ({"depths": (1, 1.5, 1)}, r"depths=\(1, 1.5, 1\)"),
        ({"dims": ("a", "b", "c")}, r"dims=\('a', 'b', 'c'\)"),
        ({"learn_sigma": "maybe"}, "learn_sigma='maybe': expected true or false"),
        ({"mlp_ratio": "abc"}, "mlp_ratio='abc': expected a positive number"),
        ({"attention_modulation": [7]}, r"attention_modulation=\[7\]: expected blocks"),
        ({"attention_modulation": {"blocks": 0}}, "blocks=0: expected a list of block indices"),
        ({"attention_modulation": {"block": [0]}}, "attention_modulation={'block'"),
        ({"dims": (16, 18, 16)}, "stage 1 has depth 1, width 18"),
        ({"num_heads": (2, 5, 2)}, "stage 1 has depth 1, width 24, 5 heads"),
        ({"stage0_mask_block": 2}, "stage0_mask_block=2: stage 0 has blocks 0 to 1"),
    ],
)
def test_impossible_layouts(overrides, message):
    with pytest.raises(ValueError, match=message):
        EDTTransformer2DModel(**{**TINY, **overrides})


# ---- initial weights ----

WIDE = {"sample_size": 8, "patch_size": 1, "in_channels": 16, "dims": (128, 160, 96), "num_heads": (2, 2, 2)}


@pytest.fixture(scope="module")
def fresh() -> EDTTransformer2DModel:
    torch.manual_seed(0)
    return EDTTransformer2DModel(**{**TINY, **WIDE, "num_classes": 100})


def test_a_new_model_returns_zero(fresh):
    out = fresh(**tiny_inputs(fresh)).sample
    assert out.shape == (2, 32, 8, 8)
    assert not out.any()


def test_initial_weights(fresh):
    """Section 2 of design/edt.md. The bound of xavier is sqrt(6 / (fan_in + fan_out))."""
    uniform, normal, zero = {}, {}, set()
    uniform["patch_embed.proj.weight"] = math.sqrt(6 / (16 + 128))
    for layer in ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "class_embedder"):
        normal[f"{layer}.weight"] = 0.02
    zero |= {"proj_out.weight", "norm_out.modulation.linear.weight"}
    for number, block in enumerate(fresh.blocks):
        name = f"blocks.{number}"
        if isinstance(block, EDTBlock):
            dim = block.attn.to_q.in_features
            normal[f"{name}.attn.position_bias.table"] = 0.02
            for part in "qkv":  # as one joint matrix (3 dim, dim)
                uniform[f"{name}.attn.to_{part}.weight"] = math.sqrt(6 / (dim + 3 * dim))
            uniform[f"{name}.attn.to_out.0.weight"] = math.sqrt(6 / (dim + dim))
            for layer in ("net.0.proj", "net.2"):
                uniform[f"{name}.ff.{layer}.weight"] = math.sqrt(6 / (dim + 4 * dim))
            zero.add(f"{name}.adaln.linear.weight")
        elif isinstance(block, DownSample):
            uniform[f"{name}.norm.modulation.linear.weight"] = math.sqrt(6 / (128 + 8 * 128))
            uniform[f"{name}.reduction.weight"] = math.sqrt(6 / (4 * 128 + 160))
        else:
            uniform[f"{name}.norm.modulation.linear.weight"] = math.sqrt(6 / (128 + 2 * (96 + 128)))
            uniform[f"{name}.expand.weight"] = math.sqrt(6 / (160 + 4 * 96))
            uniform[f"{name}.fuse.weight"] = math.sqrt(6 / (96 + 128 + 96))
    parameters = dict(fresh.named_parameters())
    biases = {name for name in parameters if name.endswith(".bias")}
    assert set(uniform) | set(normal) | zero | biases == set(parameters)
    for name in zero | biases:
        assert not parameters[name].any(), name
    for name, bound in uniform.items():
        weight = parameters[name]
        assert 0.99 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    for name, deviation in normal.items():
        weight = parameters[name]
        spread = 5 / math.sqrt(2 * weight.numel())  # five standard errors
        assert weight.std().item() == pytest.approx(deviation, rel=spread), name
        assert weight.abs().max() > 2.5 * deviation, name  # a normal one, not a uniform one


def test_position_tables_are_saved_but_not_trained(fresh):
    tables = {name for name in fresh.state_dict() if "pos_embed" in name}
    assert tables == {"pos_embed", "blocks.2.pos_embed", "blocks.4.pos_embed"}
    assert not tables & {name for name, _ in fresh.named_parameters()}
    assert torch.equal(fresh.blocks[2].pos_embed, sincos_position_table(160, 4, 4))
    assert torch.equal(fresh.blocks[4].pos_embed, sincos_position_table(96, 8, 8))


def test_position_table_of_a_rectangle():
    table = sincos_position_table(8, 3, 5)[0]
    for token, (row, column) in enumerate(itertools.product(range(3), range(5))):
        expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
        assert table[token].tolist() == pytest.approx(expected, abs=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_position_table(6, 3, 5)


# ---- parts ----


def test_rearrangements_against_loops():
    tokens = torch.arange(2 * 4 * 6 * 3.0).reshape(2, 24, 3)
    merged = merge_2x2(tokens, (4, 6))
    for row, column in itertools.product(range(2), range(3)):
        cells = [(2 * row + dy) * 6 + 2 * column + dx for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))]
        assert torch.equal(merged[:, row * 3 + column], torch.cat([tokens[:, cell] for cell in cells], dim=1))
    wide = torch.arange(2 * 6 * 12.0).reshape(2, 6, 12)
    split = split_2x2(wide, (2, 3))
    for row, column, dy, dx in itertools.product(range(2), range(3), range(2), range(2)):
        part = (2 * dy + dx) * 3
        out = split[:, (2 * row + dy) * 6 + 2 * column + dx]
        assert torch.equal(out, wide[:, row * 3 + column, part : part + 3])
    patches = torch.arange(2 * 6 * 8.0).reshape(2, 6, 8)
    image = unpatchify(patches, 2, (2, 3), 2)
    for channel, row, column, p, q in itertools.product(range(2), range(2), range(3), range(2), range(2)):
        value = patches[:, row * 3 + column, (2 * p + q) * 2 + channel]
        assert torch.equal(image[:, channel, 2 * row + p, 2 * column + q], value)


@torch.no_grad()
def test_patches_against_loops():
    embed = PatchEmbed(2, 3, 8)
    images = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    tokens = embed(images)
    for row, column in itertools.product(range(2), range(3)):
        patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
        expected = patch @ embed.proj.weight.flatten(1).T + embed.proj.bias
        torch.testing.assert_close(tokens[:, row * 3 + column], expected, atol=1e-6, rtol=0)


def normed(x: torch.Tensor) -> torch.Tensor:
    """Layer norm without affine, eps 1e-6, written out."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def down_reference(down: DownSample, x: torch.Tensor, temb: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The down-sampling module token by token, in float64."""
    weights = {name: value.double() for name, value in down.state_dict().items()}
    height, width = down.grid
    channels = x.shape[-1]
    condition = temb.double() * torch.sigmoid(temb.double())
    shift_scale = condition @ weights["norm.modulation.linear.weight"].T + weights["norm.modulation.linear.bias"]
    shift, scale = shift_scale[:, : 4 * channels], shift_scale[:, 4 * channels :]
    out = []
    for row, column in itertools.product(range(0, height, 2), range(0, width, 2)):
        cells = [(row + dy) * width + column + dx for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))]
        merged = torch.cat([x[:, cell].double() for cell in cells], dim=1)
        merged = normed(merged) * (1 + scale) + shift
        for quarter, cell in enumerate(cells):
            if keep is not None:
                merged[:, quarter * channels : (quarter + 1) * channels] *= keep[:, cell, None].double()
        out.append(merged @ weights["reduction.weight"].T)
    return torch.stack(out, dim=1) + weights["pos_embed"]


def random_masks(model: EDTTransformer2DModel, batch: int = 2, share: float = 0.5, stage0: bool = False) -> TokenMasks:
    generator = torch.Generator().manual_seed(5)
    draws = [torch.rand(batch, h * w, generator=generator) >= share for h, w in model.mask_grids]
    first = torch.rand(batch, draws[0].shape[1], generator=generator) >= share
    return TokenMasks(tuple(draws), first if stage0 else None)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_down_sampling_against_loops(masked):
    down = DownSample(8, 12, 16, (4, 6), 0, is_skip=True)
    randomise(down)
    generator = torch.Generator().manual_seed(2)
    x, temb = torch.randn(2, 24, 8, generator=generator), torch.randn(2, 16, generator=generator)
    keep = torch.rand(2, 24, generator=generator) >= 0.5 if masked else None
    skips = Skips(TokenMasks((keep,)) if masked else None)
    out = down(x, temb, skips)
    torch.testing.assert_close(out.double(), down_reference(down, x, temb, keep), atol=1e-5, rtol=0)
    assert torch.equal(skips.pop(), out)  # the long skip carries the mask's effect
    if masked:
        assert (down_reference(down, x, temb, None) - out).abs().max() > 0.1


@torch.no_grad()
def test_a_hidden_token_changes_its_own_merged_token_only():
    down = DownSample(8, 12, 16, (4, 6), 0, is_skip=False)
    randomise(down)
    x, temb = torch.randn(1, 24, 8), torch.randn(1, 16)
    keep = torch.ones(1, 24)
    keep[0, 2 * 6 + 5] = 0  # row 2, column 5: merged cell (1, 2), number 5
    full = down(x, temb, Skips(None))
    masked = down(x, temb, Skips(TokenMasks((keep,))))
    assert (full != masked).any(-1).squeeze(0).nonzero().flatten().tolist() == [5]


@torch.no_grad()
def test_up_sampling_against_loops():
    up = UpSample(12, 8, 4, 16, (2, 3))
    randomise(up)
    weights = {name: value.double() for name, value in up.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    x, temb = torch.randn(2, 6, 12, generator=generator), torch.randn(2, 16, generator=generator)
    skip = torch.randn(2, 24, 4, generator=generator)
    skips = Skips(None)
    skips.push(skip)
    out = up(x, temb, skips).double()
    condition = temb.double() * torch.sigmoid(temb.double())
    shift, scale = (
        condition @ weights["norm.modulation.linear.weight"].T + weights["norm.modulation.linear.bias"]
    ).chunk(2, dim=1)
    for row, column, dy, dx in itertools.product(range(2), range(3), range(2), range(2)):
        token = (2 * row + dy) * 6 + 2 * column + dx
        part = (2 * dy + dx) * 8
        expanded = x[:, row * 3 + column].double() @ weights["expand.weight"][part : part + 8].T
        joint = normed(torch.cat([expanded, skip[:, token].double()], dim=1)) * (1 + scale) + shift
        expected = joint @ weights["fuse.weight"].T + weights["fuse.bias"] + weights["pos_embed"][0, token]
        torch.testing.assert_close(out[:, token], expected, atol=1e-5, rtol=0)


def forward_by_hand(model: EDTTransformer2DModel, inputs: dict, before_block=lambda number, x: x) -> torch.Tensor:
    """The model's forward from its parts, without masks; `before_block` may change the tokens before a block."""
    temb = model.timestep_embedder(model.time_proj(inputs["timestep"])) + model.class_embedder(inputs["class_labels"])
    x = model.patch_embed(inputs["hidden_states"]) + model.pos_embed
    skips = Skips(None)
    skips.push(x)
    for number, block in enumerate(model.blocks):
        x = block(before_block(number, x), temb, skips)
    x = model.proj_out(model.norm_out(x, temb))
    return unpatchify(x, model.config.patch_size, model.grids[-1], model.out_channels)


# ---- masks ----


@pytest.mark.parametrize("stage0", [False, True])
@torch.no_grad()
def test_dtypes_of_masks(stage0):
    model = tiny_model()
    inputs = tiny_inputs(model)
    masks = random_masks(model, stage0=stage0)
    full = model(**inputs).sample
    out = model(**inputs, token_masks=masks).sample
    assert (out - full).abs().max() > 1e-2
    for dtype in (torch.uint8, torch.float32, torch.float64, torch.int64):
        assert torch.equal(model(**inputs, token_masks=masks.to(dtype=dtype)).sample, out)
    assert torch.equal(model.train()(**inputs, token_masks=masks).sample, out)


@torch.no_grad()
def test_masks_of_ones_are_no_masks():
    model = tiny_model()
    inputs = tiny_inputs(model)
    ones = TokenMasks((torch.ones(2, 64),), torch.ones(2, 64))
    assert torch.equal(model(**inputs, token_masks=ones).sample, model(**inputs).sample)


@pytest.mark.parametrize(
    ("depth", "given", "acts_before"), [(1, None, 0), (2, None, 1), (5, None, 4), (6, None, 4), (6, 2, 2)]
)
@torch.no_grad()
def test_stage0_mask_replaces_tokens_by_their_positions(depth, given, acts_before):
    model = tiny_model(depths=(depth, 1, 1), stage0_mask_block=given)
    inputs = tiny_inputs(model)
    keep = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) >= 0.4

    def replace(number, x):
        if number != acts_before:
            return x
        return x * keep[..., None] + (1 - keep[..., None].float()) * model.pos_embed

    out = model(**inputs, token_masks=TokenMasks((torch.ones(2, 64),), keep)).sample
    torch.testing.assert_close(out, forward_by_hand(model, inputs, replace), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(**inputs).sample, forward_by_hand(model, inputs), atol=1e-6, rtol=0)
    assert (out - model(**inputs).sample).abs().max() > 1e-2


@torch.no_grad()
def test_each_mask_goes_to_its_own_module():
    model = tiny_model(depths=(1,) * 5, dims=(16, 24, 32, 24, 16), num_heads=(2,) * 5)
    inputs = tiny_inputs(model)
    ones = [torch.ones(2, h * w) for h, w in model.mask_grids]
    assert [mask.shape[1] for mask in ones] == [64, 16]
    seen: dict[int, tuple] = {}
    for index in range(2):
        seen.clear()
        masks = list(ones)
        masks[index] = (torch.arange(ones[index].shape[1]) % 3 > 0).float().expand(2, -1)
        downs = [block for block in model.blocks if isinstance(block, DownSample)]
        hooks = [
            down.register_forward_hook(lambda down, args, out: seen.update({down.index: (args, out)})) for down in downs
        ]
        model(**inputs, token_masks=TokenMasks(tuple(masks)))
        for hook in hooks:
            hook.remove()
        for down in downs:
            (x, temb, _), out = seen[down.index]
            expected = down_reference(down, x, temb, masks[down.index])
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (TokenMasks((torch.ones(2, 64), torch.ones(2, 16))), "holds 2 masks"),
        (TokenMasks((torch.ones(2, 16),)), r"down\[0\] has shape \(2, 16\), expected \(2, 64\).*8x8 grid"),
        (TokenMasks((torch.ones(1, 64),)), r"down\[0\] has shape \(1, 64\), expected \(2, 64\)"),
        (TokenMasks((torch.ones(2, 8, 8),)), r"expected \(2, 64\)"),
        (TokenMasks((torch.ones(2, 64),), torch.ones(2, 16)), r"stage0 has shape \(2, 16\), expected \(2, 64\)"),
    ],
)
def test_wrong_masks(masks, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(**tiny_inputs(model), token_masks=masks)


# ---- gradients ----


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("blocks", [None, [0, 3]])
@pytest.mark.parametrize("suspended", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(masked, blocks, suspended):
    model = tiny_model().train()
    model.set_attention_modulation(blocks)
    inputs = tiny_inputs(model)
    masks = random_masks(model, stage0=True) if masked else None
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda *_: calls.append(1))
        for block in model.blocks
        if isinstance(block, EDTBlock)
    ]

    def gradients() -> list[torch.Tensor]:
        calls.clear()
        # As in training: the suspension of AMM has ended when the backward pass recomputes the blocks.
        with model.suspend_attention_modulation() if suspended else nullcontext():
            loss = model(**inputs, token_masks=masks).sample.square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    plain = gradients()
    assert len(calls) == 5
    model.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert len(calls) == 10  # every transformer block ran a second time
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    model.disable_gradient_checkpointing()
    gradients()
    assert len(calls) == 5
    for hook in hooks:
        hook.remove()


def gradients_and_recomputed(model, inputs, masks) -> tuple[list[torch.Tensor], list[int]]:
    """Gradients of one step, and the numbers of the blocks that ran twice in it."""
    calls: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(model.blocks)
    ]
    with model.suspend_attention_modulation():
        loss = model(**inputs, token_masks=masks).sample.square().sum()
    gradients = list(torch.autograd.grad(loss, list(model.parameters())))
    for hook in hooks:
        hook.remove()
    return gradients, sorted(number for number in set(calls) if calls.count(number) == 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("stages", "blocks"),  # blocks 0 1 | down | 3 | up | 5 6
    [([0], [0, 1]), ([2, 1, 2], [3, 5, 6]), ((0, 2), [0, 1, 5, 6]), (True, [0, 1, 3, 5, 6]), ([], []), (None, [])],
)
def test_checkpointed_stages(stages, blocks, masked):
    model = tiny_model().train()
    model.set_attention_modulation([0, 3])
    inputs = tiny_inputs(model)
    masks = random_masks(model, stage0=True) if masked else None
    plain, recomputed = gradients_and_recomputed(model, inputs, masks)
    assert recomputed == []
    model.set_checkpointed_stages([1])
    model.set_checkpointed_stages(stages)
    checkpointed, recomputed = gradients_and_recomputed(model, inputs, masks)
    assert recomputed == blocks
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert model.is_gradient_checkpointing == bool(blocks)


def test_checkpointed_stages_and_diffusers_switch():
    model = tiny_model().train()
    inputs = tiny_inputs(model)
    model.set_checkpointed_stages([1])
    model.enable_gradient_checkpointing()
    assert gradients_and_recomputed(model, inputs, None)[1] == [0, 1, 3, 5, 6]
    model.set_checkpointed_stages([1])
    model.disable_gradient_checkpointing()
    assert gradients_and_recomputed(model, inputs, None)[1] == []


@pytest.mark.parametrize("stages", [[3], [-1], [0, 1.0], ["0"], [True], 1, "1"])
def test_unknown_stages(stages):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"stages .*: expected a list of numbers from 0 to 2, or true for all"):
        model.set_checkpointed_stages(stages)
    assert not model.is_gradient_checkpointing


def test_gradient_against_finite_differences():
    model = tiny_model(dims=(8, 12, 8), sample_size=4).double()
    inputs = tiny_inputs(model, batch=1)
    inputs["hidden_states"] = inputs["hidden_states"].double()
    masks = random_masks(model, batch=1, stage0=True)
    model.time_proj.forward = (lambda old: lambda t: old(t).double())(model.time_proj.forward)

    def loss() -> torch.Tensor:
        return model(**inputs, token_masks=masks).sample.square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), directions, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


# ---- files and precision ----


@pytest.mark.parametrize("case", CUSTOM)
@torch.no_grad()
def test_save_and_load(tmp_path, case):
    model = tiny_model(**CUSTOM[case])
    if min(model.grids[0]) >= 3:
        model.set_attention_modulation([0], "cos", 2.5)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = EDTTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.attention_modulation == model.attention_modulation
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    inputs = tiny_inputs(model)
    assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


@torch.no_grad()
def test_loaded_position_tables_are_the_files(tmp_path):
    """Weights of the authors carry tables that their averaging has moved; a save must keep them."""
    model = tiny_model()
    model.pos_embed += 1e-4
    model.save_pretrained(tmp_path)
    assert torch.equal(EDTTransformer2DModel.from_pretrained(tmp_path).pos_embed, model.pos_embed)


@pytest.mark.parametrize("blocks", [None, [0, 3]])
@pytest.mark.parametrize("grad", [False, True])
def test_pure_bfloat16(blocks, grad):
    model = tiny_model()
    model.set_attention_modulation(blocks)
    inputs = tiny_inputs(model)
    with torch.set_grad_enabled(grad):
        expected = model(**inputs, token_masks=random_masks(model)).sample.detach()
        half = model.bfloat16()
        inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
        out = half(**inputs, token_masks=random_masks(model)).sample
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_bfloat16_keeps_large_timesteps_apart():
    """In bfloat16 itself 997 and 999 are one number; the sinusoid is computed in float32."""
    model = tiny_model().bfloat16()
    inputs = tiny_inputs(model)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    a, b = (model(**{**inputs, "timestep": torch.tensor([t, t])}).sample for t in (997, 999))
    assert not torch.equal(a, b)


@torch.no_grad()
def test_forms_of_the_timestep():
    model = tiny_model()
    inputs = {**tiny_inputs(model), "timestep": torch.tensor([7, 7])}
    expected = model(**inputs).sample
    for same in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        assert torch.equal(model(**{**inputs, "timestep": same}).sample, expected)


# ---- wrong inputs ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 3, 8, 10)},
            r"input of shape \(2, 3, 8, 10\): this model takes .*, 3, 8, 8\)",
        ),
        ({"hidden_states": torch.zeros(2, 4, 8, 8)}, "another sample_size or in_channels"),
        ({"hidden_states": torch.zeros(3, 8, 8)}, "input of shape"),
        ({"class_labels": torch.tensor([0, 6])}, r"class label 6: expected 0 to 5 \(5 = no class\)"),
        ({"class_labels": torch.tensor([-1, 0])}, "class label -1"),
        ({"class_labels": None}, r"needs class_labels \(num_classes=5\)"),
        ({"class_labels": torch.tensor([1])}, r"class_labels of shape \(1,\): expected \(2,\)"),
        ({"class_labels": torch.tensor([1, 2, 3])}, r"class_labels of shape \(3,\)"),
        ({"timestep": torch.tensor([1, 2, 3])}, r"timestep of shape \(3,\)"),
    ],
)
def test_wrong_inputs(change, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(**{**tiny_inputs(model), **change})


def test_labels_for_an_unconditional_model():
    model = tiny_model(num_classes=None)
    with pytest.raises(ValueError, match="is unconditional and takes no class_labels"):
        model(**tiny_inputs(model), class_labels=torch.tensor([0, 0]))


def test_sizes_are_found_in_any_case():
    with torch.device("meta"):
        for name in ("s", "S", "edt-s/2", "EDT-S/2"):
            assert tuple(EDTTransformer2DModel.from_size(name).config.dims) == (312, 416, 520, 416, 312)


def test_the_whole_model_traces_into_one_graph():
    model = tiny_model()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        eager = model(**inputs).sample
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).sample
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


FIVE_STAGES = {
    "sample_size": 16,
    "depths": (2, 1, 1, 1, 2),
    "dims": (16, 24, 32, 24, 16),
    "num_heads": (2, 3, 4, 3, 2),
}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch asks for it while tracing
@pytest.mark.slow
def test_what_compiles_anew():
    """A graph for each of three shapes of a stage, in training and in inference; none more for masks or checkpoints."""
    model = tiny_model(**FIVE_STAGES).train()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph, _example_inputs):
        graphs.append(graph)
        return graph.forward

    def gradients(batch: int = 2, masks: TokenMasks | None = None) -> list[torch.Tensor]:
        loss = model(**tiny_inputs(model, batch), token_masks=masks).sample.square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    plain_masks = [random_masks(model, stage0=stage0) for stage0 in (False, True)]
    with torch.no_grad():
        prediction = model.eval()(**tiny_inputs(model)).sample
    model.train()
    eager = [gradients(masks=masks) for masks in (None, *plain_masks)]
    model.compile_repeated_blocks(fullgraph=True, backend=count)
    for masks, expected in zip((None, *plain_masks), eager, strict=True):
        compiled = gradients(masks=masks)
        for a, b in zip(compiled, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) + 1e-4)
    assert len(graphs) == 3
    model.set_checkpointed_stages([0, 4])
    gradients(masks=plain_masks[1])
    assert len(graphs) == 3
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs(model)).sample, prediction, atol=1e-5, rtol=1e-5)
        assert len(graphs) == 6
        model.set_attention_modulation([3])
        model(**tiny_inputs(model))
        assert len(graphs) == 7
    for batch in (3, 4, 5):  # past torch's limit of 8; the batch is a variable from the second size on
        gradients(batch)
    assert len(graphs) == 10


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch asks for it while tracing
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++ is not installed")
def test_compiled_training_step(monkeypatch):
    model = tiny_model(depths=(1, 1, 1), dims=(8, 12, 8), num_heads=(1, 1, 1), sample_size=4).train()
    inputs, masks = tiny_inputs(model), random_masks(model, stage0=True)

    def step() -> torch.Tensor:
        loss = model(**inputs, token_masks=masks).sample.square().sum()
        # As one vector: the gradient of a key's bias is zero (softmax does not see it), and what is computed is noise.
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    gradient = step()
    # The middle block stays as it is: each shape takes a C++ compiler ten seconds and more.
    monkeypatch.setattr(model.blocks[2], "compile", lambda **_: None)
    model.compile_repeated_blocks(fullgraph=True)
    assert (step() - gradient).norm() < 1e-5 * gradient.norm()


def test_a_model_built_in_inference_mode_runs():
    expected = tiny_model()
    inputs = tiny_inputs(expected)
    with torch.inference_mode():
        model = tiny_model()
        for _ in range(2):  # the second time with kept biases
            assert torch.equal(model(**inputs).sample, expected(**inputs).sample)


def test_float_masks_mix_in_stage_0_as_they_scale_in_down_sampling():
    """A keep value k gives k x + (1 - k) position, linear in k before the block: checked at the block's input."""
    model = tiny_model(stage0_mask_block=0)
    inputs = tiny_inputs(model, batch=1)
    seen: list[torch.Tensor] = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0]))
    ones = tuple(torch.ones(1, height * width) for height, width in model.mask_grids)
    with torch.no_grad():
        for keep in (1.0, 0.0, 0.3):
            model(**inputs, token_masks=TokenMasks(ones, torch.full((1, 64), keep)))
    torch.testing.assert_close(seen[1], model.pos_embed)
    torch.testing.assert_close(seen[2], 0.3 * seen[0] + 0.7 * seen[1])
