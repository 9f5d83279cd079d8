"""DiT and MDTv2 against a second implementation in float64, and their sizes against counts by hand."""

from typing import Any

import pytest
import torch
from reference_networks import linear, reference, relative_bias
from tiny_backbones import TINY_OF, randomise, tiny_backbone, tiny_inputs
from torch.utils.flop_counter import FlopCounterMode

from edt_diffusion import TokenMasks
from edt_diffusion.models import BACKBONES, DiT2DModel, MaskPlan, MDT2DModel
from edt_diffusion.models.edt import DownSample, EDTTransformer2DModel, UpSample
from edt_diffusion.nn.attention import GridAttention
from edt_diffusion.nn.modulated_attention import FORMS
from edt_diffusion.nn.modulation import modulation_matrix
from edt_diffusion.nn.resample import merge_2x2, split_2x2
from edt_diffusion.nn.transformer_block import AdaLNZeroBlock, SideInterpolater, Skips
from edt_diffusion.profiling.counting import counting

BASELINES = ["DiT", "MDTv2"]


def assert_near(out: torch.Tensor, expected: torch.Tensor, share: float = 2e-5) -> None:
    """Equal to a share of the largest value: float32 against float64 through a whole network."""
    torch.testing.assert_close(out.double(), expected, atol=share * float(expected.abs().max()), rtol=0)


# ---- sizes ----

# Of DiT with N tokens, patch p, width D, d blocks, 1000 classes and 4 channels, its table of positions not counted:
#   blocks     d (18 D^2 + 15 D): attention 4 D^2 + 4 D, MLP 8 D^2 + 5 D, adaLN 6 D^2 + 6 D
#   ends       4 p^2 D + D + 256 D + D + D^2 + D + 1001 D + 2 D^2 + 2 D + 8 p^2 D + 8 p^2
# MDTv2 has besides: in its d - h blocks with a long skip 2 D^2 + D, in all d blocks and the side block a table of
# (2 n - 1)^2 + 3 rows of h heads, one more block, a mask token, and two tables of positions that are trained.


def dit_parameters(depth: int, width: int, patch: int) -> int:
    blocks = depth * (18 * width**2 + 15 * width)
    return blocks + 3 * width**2 + width * (12 * patch**2 + 256 + 1001 + 5) + 8 * patch**2


def mdt_parameters(depth: int, width: int, heads: int, decode: int, side: int) -> int:
    encoder = (depth - decode) // 2
    tables = (depth + 1) * ((2 * side - 1) ** 2 + 3) * heads
    skips = (encoder + decode) * (2 * width**2 + width)
    return dit_parameters(depth + 1, width, 2) + tables + skips + width + 2 * side**2 * width


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_published_sizes(size):
    depth, width, heads = SIZES[size]
    with torch.device("meta"):
        for patch in (2, 4, 8):
            model = DiT2DModel.from_size(f"DiT-{size}/{patch}")
            assert model.config.patch_size == patch
            assert model.num_parameters() == dit_parameters(depth, width, patch)
        model = MDT2DModel.from_size(size)
        assert model.num_parameters() == mdt_parameters(depth, width, heads, 4, 16)
        assert [len(model.attention_layers()), *model.stage_depths] == [depth, (depth - 4) // 2, (depth - 4) // 2, 4]


def test_dit_s_2_is_that_of_its_authors():
    """132 entries of 32,963,360 numbers, the table of positions among them; about 6.1 G multiply-adds (table 4)."""
    with torch.device("meta"):
        model = DiT2DModel.from_size("S/2")
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 32_963_360
    assert sum(model.multiply_adds().values()) / 1e9 == pytest.approx(6.06, abs=0.05)


LAYOUTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "patch 4, rectangle": {"sample_size": (8, 16), "patch_size": 4},
    "patch 8": {"sample_size": 16, "patch_size": 8},
    "tall": {"sample_size": (6, 4), "patch_size": 2},
    "unconditional": {"num_classes": None},
    "noise only, one channel": {"learn_sigma": False, "in_channels": 1},
    "wide MLP": {"mlp_ratio": 2.7},
}


@pytest.mark.parametrize("family", BASELINES)
@pytest.mark.parametrize("case", LAYOUTS)
@torch.no_grad()
def test_predictions_against_the_reference(family, case):
    model = tiny_backbone(family, **LAYOUTS[case])
    inputs = tiny_inputs(model)
    expected = reference(model, inputs)
    assert expected.std() > 0.1
    assert_near(model(**inputs).sample, expected)


@pytest.mark.parametrize("family", BASELINES)
@pytest.mark.parametrize("case", LAYOUTS)
@torch.no_grad()
def test_multiply_adds_against_two_counts(family, case):
    """torch's counter sees every matrix product, two operations each; ours watches modules."""
    model = tiny_backbone(family, **LAYOUTS[case])
    model.set_attention_backend("_native_math")
    inputs = tiny_inputs(model, batch=1)
    with FlopCounterMode(display=False) as counter, counting(model) as counted:
        model(**inputs)
    stated = sum(model.multiply_adds().values())
    assert counter.get_total_flops() == 2 * stated
    assert counted.total == stated


@pytest.mark.parametrize(("depth", "decode"), [(4, 2), (8, 2), (9, 3), (10, 4)])
@torch.no_grad()
def test_long_skips_of_mdt(depth, decode):
    """Each depth has another pairing of in- and out-blocks, which the reference states by number."""
    model = tiny_backbone("MDTv2", depth=depth, decode_layers=decode)
    inputs = tiny_inputs(model)
    out = model(**inputs).sample
    assert_near(out, reference(model, inputs))
    # A block's own skip projection matters, so that a wrong partner would show.
    for block in model.blocks:
        if getattr(block, "skip_linear", None) is not None:
            kept = block.skip_linear.weight.clone()
            block.skip_linear.weight[:, 16:] = 0
            assert (model(**inputs).sample - out).abs().max() > 1e-3
            block.skip_linear.weight.copy_(kept)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("DiT", {"depth": 0}, "depth=0: expected a positive integer"),
        ("DiT", {"num_heads": 3}, "hidden_size=16, num_heads=3: expected a width that 4 and the number of heads"),
        ("DiT", {"sample_size": 9, "patch_size": 2}, "sample_size=9 cannot be divided by 2"),
        ("MDTv2", {"decode_layers": 3}, "decode_layers=3 of depth=6: expected .* an even number"),
        ("MDTv2", {"decode_layers": 6}, "decode_layers=6 of depth=6"),
        ("MDTv2", {"decode_layers": 0}, "decode_layers=0 of depth=6"),
        ("MDTv2", {"decode_layers": "4"}, "decode_layers='4' of depth=6"),
    ],
)
def test_impossible_layouts(family, change, message):
    with pytest.raises(ValueError, match=message):
        BACKBONES[family](**{**TINY_OF[family], **change})


def test_unknown_sizes():
    with pytest.raises(ValueError, match="unknown DiT size 'XXL': expected one of S, B, L, XL"):
        DiT2DModel.from_size("DiT-XXL/2")
    with pytest.raises(ValueError, match="expected a patch size after the slash, as in MDTv2-S/2"):
        MDT2DModel.from_size("S/two")


@pytest.mark.parametrize("family", BASELINES)
@torch.no_grad()
def test_mixtures_of_classes(family):
    """Weights of the rows of the class table: one row alone is that class, others are the mixed condition."""
    model = tiny_backbone(family)
    inputs = tiny_inputs(model)
    rows = torch.nn.functional.one_hot(inputs["class_labels"], 6).float()
    torch.testing.assert_close(model(**{**inputs, "class_labels": rows}).sample, model(**inputs).sample)
    mixture = torch.tensor([[0.5, 0, 0.5, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
    out = model(**{**inputs, "class_labels": mixture}).sample
    table = model.class_embedder.weight
    mixed = (table[0] + table[2]) / 2
    table[0] = mixed
    named = model(**{**inputs, "class_labels": torch.tensor([0, 1])}).sample
    torch.testing.assert_close(out, named, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", BASELINES)
def test_every_parameter_that_a_full_pass_uses_gets_a_gradient(family):
    model = tiny_backbone(family).train()
    model(**tiny_inputs(model)).sample.square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == set(model.masked_only())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name not in without)
    assert bool(without) == (family == "MDTv2")
    if without:
        assert {name.split(".", 2)[2].split(".")[0] for name in without} == {"block", "mask_token"}


@pytest.mark.parametrize("family", BASELINES)
def test_gradients_are_those_of_the_reference(family):
    """Autograd through the second implementation, with masks where there are any."""
    model = tiny_backbone(family, sample_size=4)
    inputs = tiny_inputs(model)
    masks = MaskPlan((), input=(0.4, 0.5)).draw(0, 0, [0, 1], model.mask_grids) if model.mask_grids else None
    kept = None if masks is None else masks.kept_at_input()
    weight = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(3))
    (model(**inputs, token_masks=masks).sample * weight).sum().backward()
    named = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    double: Any = type(model)(**{**TINY_OF[family], "sample_size": 4})
    double.state_dict = lambda: {**dict(model.named_buffers()), **named}
    (reference(double, inputs, kept) * weight.double()).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in named.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        wanted = named[name].grad
        # That of a key's bias is zero, as the softmax does not see it, and what is computed is noise.
        atol = 1e-4 * float(wanted.abs().max()) + 1e-7 * largest
        torch.testing.assert_close(parameter.grad.double(), wanted, atol=atol, rtol=0)


def test_initial_weights_make_a_network_of_zeros():
    for family in BASELINES:
        model = BACKBONES[family](**TINY_OF[family])
        assert not model(**tiny_inputs(model)).sample.any()
        for block in model.blocks:
            if isinstance(block, SideInterpolater):
                assert torch.equal(block.pos_embed, model.pos_embed)
                assert 0 < block.mask_token.std() < 0.04
            elif getattr(block, "skip_linear", None) is not None:
                assert not block.skip_linear.bias.any()


# ---- attention modulation ----


def amm_of(model: Any, block: int, formula: str = "exp") -> dict[int, torch.Tensor]:
    return {block: modulation_matrix(*model.grids[0], formula)}


@pytest.mark.parametrize("family", BASELINES)
@torch.no_grad()
def test_modulation_of_any_block(family):
    model = tiny_backbone(family, sample_size=(3, 4))
    inputs = tiny_inputs(model)
    plain = model(**inputs).sample
    for number in range(len(model.attention_layers())):
        model.set_attention_modulation([number], "cos")
        expected = reference(model, inputs, amm=amm_of(model, number, "cos"))
        assert_near(model(**inputs).sample, expected)
        assert (expected - plain).abs().max() > 1e-3
        with model.suspend_attention_modulation():
            assert torch.equal(model(**inputs).sample, plain)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_attention_with_and_without_bias_in_every_form(biased, dtype):
    """Roundings to bfloat16, of 2^-9 each, make about half a per cent; AMM is a third of the result."""
    attention = GridAttention(16, 2, (4, 4), position_bias=biased)
    randomise(attention)
    attention.modulation = modulation_matrix(4, 4)
    attention = attention.to(dtype).eval()
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = {name: value.double() for name, value in attention.state_dict().items()}
    bias = relative_bias(weights["position_bias.table"], (4, 4), list(range(16))) if biased else None

    def expected(matrix: torch.Tensor | None) -> torch.Tensor:
        out = []
        for tokens in x.double():
            query, key, value = (linear(weights, f"to_{part}", tokens).unflatten(1, (2, 8)) for part in "qkv")
            scores = torch.einsum("ihd,jhd->hij", query, key) / 8**0.5
            share = torch.softmax(scores if bias is None else scores + bias, dim=-1)
            share = share if matrix is None else share * matrix
            out.append(linear(weights, "to_out.0", torch.einsum("hij,jhd->ihd", share, value).flatten(1)))
        return torch.stack(out)

    bound = 1e-6 if dtype == torch.float32 else 0.02
    wanted, plain = expected(modulation_matrix(4, 4).double()), expected(None)
    assert (wanted - plain).norm() > 0.1 * wanted.norm()
    for form in (None, *FORMS):
        attention.processor.form = form
        assert (attention(x).double() - wanted).norm() < bound * wanted.norm(), form
    assert (attention(x, modulate=False).double() - plain).norm() < bound * plain.norm()


@pytest.mark.parametrize("family", BASELINES)
@torch.no_grad()
def test_bfloat16(family):
    model = tiny_backbone(family, sample_size=4)
    model.set_attention_modulation([1, 3])
    inputs = tiny_inputs(model)
    half = model.to(torch.bfloat16)
    expected = reference(half, inputs, amm=amm_of(model, 1) | amm_of(model, 3))
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    masks = kept_all(model) if family == "MDTv2" else None
    for given in (None, masks):
        out = half(**inputs, token_masks=given).sample
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).norm() < 0.03 * expected.norm()


@torch.no_grad()
def test_modulation_goes_by_the_place_of_the_tokens_that_are_kept():
    """In a pass with masks, a block of the encoder has the pairs of kept tokens; the side block has no AMM."""
    model = tiny_backbone("MDTv2")
    inputs = tiny_inputs(model)
    masks = MaskPlan((), input=(0.3, 0.5)).draw(0, 0, [0, 1], model.mask_grids)
    for number in (0, 3, 4):
        model.set_attention_modulation([number])
        expected = reference(model, inputs, masks.kept_at_input(), amm_of(model, number))
        out = model(**inputs, token_masks=masks).sample
        assert_near(out, expected)
        assert (expected - reference(model, inputs, masks.kept_at_input())).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "size", "sample_size", "guidance", "blocks"),
    [
        ("DiT", "S", 32, 1.0, (8, 10)),
        ("DiT", "S", 32, 1.5, (8, 10)),
        ("DiT", "S", 32, 4.0, None),
        ("DiT", "XL", 32, 1.0, (15, 17, 19, 22, 24)),
        ("DiT", "XL", 32, 1.5, None),
        ("DiT", "B", 32, 1.0, None),
        ("DiT", "S", 64, 1.0, None),
        ("MDTv2", "S", 32, 1.0, (8,)),
        ("MDTv2", "S", 32, 3.8, (8,)),
        ("MDTv2", "B", 32, 1.0, None),
    ],
)
def test_published_placements(family, size, sample_size, guidance, blocks):
    """Section 13 of design/edt.md: blocks counted in the order in, out, decoder."""
    with torch.device("meta"):
        model = BACKBONES[family].from_size(size, sample_size=sample_size)
    found = model.published_modulation(guidance)
    assert (None if found is None else found.blocks) == blocks
    suggested = model.suggested_modulation(guidance)
    assert suggested is not None
    if blocks is not None:
        assert suggested == found
        model.set_attention_modulation(list(blocks))
        modulated = [block for block, (layer, _) in enumerate(model.attention_layers()) if layer.modulation is not None]
        assert modulated == list(blocks)
    if family == "MDTv2" and size == "S":
        layer = model.attention_layers()[8][0]
        assert model.blocks[9].skip_linear is not None
        assert model.blocks[9].attn is layer  # after four in-, four out-blocks and the side interpolater


# ---- masks ----


def kept_all(model: Any, batch: int = 2) -> TokenMasks:
    height, width = model.grids[0]
    return TokenMasks(input=torch.ones(batch, height * width, dtype=torch.bool))


@pytest.mark.parametrize("sample_size", [8, (4, 8)])
@torch.no_grad()
def test_masked_passes_of_mdt_against_the_reference(sample_size):
    """Only the kept tokens enter, with the biases of their places; in the gaps stands what the side block makes."""
    model = tiny_backbone("MDTv2", sample_size=sample_size)
    inputs = tiny_inputs(model)
    masks = MaskPlan((), input=(0.3, 0.5)).draw(0, 1, [0, 1], model.mask_grids)
    kept = masks.kept_at_input()
    assert not torch.equal(kept[0], kept[1])
    expected = reference(model, inputs, kept)
    for dtype in (torch.bool, torch.uint8, torch.float32):
        out = model(**inputs, token_masks=masks.to(dtype=dtype)).sample
        assert_near(out, expected)
    assert (expected - model(**inputs).sample).abs().max() > 0.1


@torch.no_grad()
def test_a_mask_that_keeps_all_tokens_is_a_full_pass():
    model = tiny_backbone("MDTv2")
    inputs = tiny_inputs(model)
    out = model(**inputs, token_masks=kept_all(model)).sample
    torch.testing.assert_close(out, model(**inputs).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_is_left_out_reaches_the_decoder_only_through_its_own_skip():
    """With the skips of the decoder blocks cut, a token that is left out has no influence at all."""
    model = tiny_backbone("MDTv2")
    inputs = tiny_inputs(model)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[:, 10:20] = False
    changed = {**inputs, "hidden_states": inputs["hidden_states"].clone()}
    changed["hidden_states"].flatten(2)[:, :, 10:20] += 1  # patch 1: tokens are pixels
    masks = TokenMasks(input=mask)
    assert (model(**changed, token_masks=masks).sample - model(**inputs, token_masks=masks).sample).abs().max() > 1e-2
    for number in (5, 6):
        model.blocks[number].skip_linear.weight[:, 16:] = 0
    assert torch.equal(model(**changed, token_masks=masks).sample, model(**inputs, token_masks=masks).sample)


@torch.no_grad()
def test_side_interpolater_keeps_what_is_there():
    torch.manual_seed(0)
    for learned in (True, False):
        guess = AdaLNZeroBlock(8, 2, 8, (3, 4), 4.0)
        side = SideInterpolater(guess, 8, (3, 4), learned)
        randomise(side)
        kept = torch.tensor([[0, 3, 7, 11], [1, 2, 5, 6]])
        x, temb = torch.randn(2, 4, 8), torch.randn(2, 8)
        out = side(x, temb, Skips(kept=kept))
        assert out.shape == (2, 12, 8)
        for image in range(2):
            added = side.pos_embed[0, kept[image]] if learned else 0
            assert torch.equal(out[image, kept[image]], x[image] + added)
        whole = torch.randn(2, 12, 8)
        assert torch.equal(side(whole, temb, Skips()), whole + side.pos_embed if learned else whole)
        # A gap is a function of its place, of the mask token and of all that is there.
        side.mask_token.add_(1)
        gaps = [[i for i in range(12) if i not in kept[image]] for image in range(2)]
        assert all((side(x, temb, Skips(kept=kept))[i, gaps[i]] != out[i, gaps[i]]).all() for i in range(2))


def test_masks_that_do_not_fit():
    dit, mdt = tiny_backbone("DiT"), tiny_backbone("MDTv2")
    with pytest.raises(ValueError, match="DiT2DModel takes no token_masks: train it with full passes"):
        dit(**tiny_inputs(dit), token_masks=kept_all(dit))
    uneven = torch.ones(2, 64, dtype=torch.bool)
    uneven[0, 3] = False
    for masks, message in (
        (TokenMasks(input=torch.ones(2, 63)), r"token_masks.input has shape \(2, 63\), expected \(2, 64\)"),
        (TokenMasks(input=uneven), "keeps 63 to 64 tokens of an image: expected as many in each"),
        (TokenMasks(input=torch.zeros(2, 64)), "keeps 0 to 0 tokens"),
        (TokenMasks(input=torch.ones(2, 64), kept_tokens=63), "kept_tokens=63, but token_masks.input keeps 64"),
        (TokenMasks((torch.ones(2, 64),)), "holds 1 masks, but the model has 0 down-sampling"),
        (TokenMasks(stage0=torch.ones(2, 64)), "token_masks.stage0 is for models with stages"),
    ):
        with pytest.raises(ValueError, match=message):
            mdt(**tiny_inputs(mdt), token_masks=masks)


# ---- EDT's switches ----


def edt_five(**change: Any) -> EDTTransformer2DModel:
    return tiny_backbone("EDT", depths=(2, 1, 1, 1, 1), dims=(16, 24, 32, 24, 16), num_heads=(2, 3, 4, 3, 2), **change)


@pytest.mark.parametrize("enhanced", [True, False])
@pytest.mark.parametrize("supplemented", [True, False])
@torch.no_grad()
def test_edt_without_enhancement_or_supplement(enhanced, supplemented):
    """Table 4 of the paper. The adaLN of a down-sampling from C channels is D -> 8 C with biases, that of a fusion of C
    and C' is D -> 2 (C + C'). Tables are buffers, not parameters.
    """
    model = edt_five(token_information_enhancement=enhanced, positional_encoding_supplement=supplemented)
    whole = edt_five()
    widths = [8 * 16, 8 * 24, 2 * (24 + 24), 2 * (16 + 16)]  # long skips carry the width of stages 1 and 0
    saved = 0 if enhanced else sum(16 * width + width for width in widths)
    assert whole.num_parameters() - model.num_parameters() == saved
    spared = 0 if enhanced else sum(16 * width for width in widths)
    assert sum(whole.multiply_adds().values()) - sum(model.multiply_adds().values()) == spared
    tables = {name for name in model.state_dict() if name.endswith("pos_embed")}
    assert len(tables) == (5 if supplemented else 1)
    inputs = tiny_inputs(model)
    out = model(**inputs).sample
    model.set_attention_backend("_native_math")
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert counter.get_total_flops() == 2 * 2 * sum(model.multiply_adds().values())
    # Without the supplement it is the network whose tables are zero.
    if enhanced and not supplemented:
        whole.load_state_dict(model.state_dict(), strict=False)
        for block in whole.blocks:
            if isinstance(getattr(block, "pos_embed", None), torch.Tensor):
                block.pos_embed.zero_()
        torch.testing.assert_close(whole(**inputs).sample, out, atol=1e-5, rtol=0)


@torch.no_grad()
def test_modules_without_enhancement_reduce_and_fuse_tokens_as_they_are():
    generator = torch.Generator().manual_seed(0)
    x, temb = torch.randn(2, 16, 8, generator=generator), torch.randn(2, 8, generator=generator)
    down = DownSample(8, 12, 8, (4, 4), 0, False, enhanced=False, supplemented=False)
    torch.testing.assert_close(down(x, temb, Skips()), merge_2x2(x, (4, 4)) @ down.reduction.weight.T)
    up = UpSample(8, 12, 4, 8, (4, 4), enhanced=False, supplemented=False)
    skips, skip = Skips(), torch.randn(2, 64, 4, generator=generator)
    skips.push(skip)
    joint = torch.cat([split_2x2(x @ up.expand.weight.T, (4, 4)), skip], dim=-1)
    torch.testing.assert_close(up(x, temb, skips), joint @ up.fuse.weight.T + up.fuse.bias)


@torch.no_grad()
def test_a_side_interpolater_changes_no_bit_of_a_full_pass_of_edt():
    plain = edt_five()
    model = edt_five(side_interpolater=True)
    (place,) = [i for i, block in enumerate(model.blocks) if isinstance(block, SideInterpolater)]
    assert place == plain.stage_depths[0]  # before the first down-sampling
    state = {}
    for name, value in plain.state_dict().items():
        number = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        state[name.replace(f"blocks.{number}.", f"blocks.{number + (number >= place)}.")] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == {name for name in model.state_dict() if name.startswith(f"blocks.{place}.")}
    inputs = tiny_inputs(model)
    assert torch.equal(model(**inputs).sample, plain(**inputs).sample)
    assert model.multiply_adds() == plain.multiply_adds()
    assert set(model.masked_only()) == {n for n, _ in model.named_parameters() if n.startswith(f"blocks.{place}.")}
    assert len(model.attention_layers()) == len(plain.attention_layers())
    # A pass that keeps all tokens is a full one too.
    torch.testing.assert_close(
        model(**inputs, token_masks=kept_all(model)).sample, plain(**inputs).sample, atol=1e-5, rtol=0
    )
    masks = MaskPlan((), input=(0.3, 0.5)).draw(0, 0, [0, 1], model.mask_grids)
    assert (model(**inputs, token_masks=masks).sample - plain(**inputs).sample).abs().max() > 1e-2
    down = [torch.ones(2, 64), torch.ones(2, 16)]
    both = model(**inputs, token_masks=TokenMasks(tuple(down), input=masks.input)).sample
    assert torch.equal(both, model(**inputs, token_masks=masks).sample)
    with pytest.raises(ValueError, match="needs a model built with side_interpolater=True"):
        plain(**inputs, token_masks=masks)
    with pytest.raises(ValueError, match="give one of them"):
        model(**inputs, token_masks=TokenMasks(stage0=torch.ones(2, 64), input=masks.input))


def test_side_interpolater_of_edt_gets_its_gradient_from_masked_passes_alone():
    model = edt_five(side_interpolater=True).train()
    inputs = tiny_inputs(model)
    model(**inputs).sample.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set(model.masked_only())
    masks = MaskPlan((), input=(0.3, 0.5)).draw(0, 0, [0, 1], model.mask_grids)
    model(**inputs, token_masks=masks).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
