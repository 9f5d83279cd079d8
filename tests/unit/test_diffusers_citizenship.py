"""What diffusers and peft give a model that keeps their contracts; a new version of either may break it silently."""

import functools
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from peft import LoraConfig
from tiny_models import tiny_inputs, tiny_model

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.models.edt import DownSample, EDTBlock, UpSample


def call(model: EDTTransformer2DModel, seed: int = 1, context: str | None = "cond_uncond", **change) -> torch.Tensor:
    inputs = {**tiny_inputs(model, seed=seed), **change}
    if context is None:
        return model(**inputs, return_dict=False)[0]
    with model.cache_context(context):
        return model(**inputs, return_dict=False)[0]


@pytest.fixture
def executed(monkeypatch) -> list[str]:
    """Names of the block classes in the order in which blocks were computed, not skipped."""
    order: list[str] = []
    for kind in (EDTBlock, DownSample, UpSample):

        @functools.wraps(kind.forward)  # diffusers reads the signature
        def forward(self, *args, _kind=kind, _forward=kind.forward):
            order.append(_kind.__name__)
            return _forward(self, *args)

        monkeypatch.setattr(kind, "forward", forward)
    return order


ALL = ["EDTBlock", "EDTBlock", "DownSample", "EDTBlock", "UpSample", "EDTBlock", "EDTBlock"]


def test_every_member_of_the_block_list_is_registered():
    kinds = {type(block) for block in tiny_model().blocks}
    assert kinds == {EDTBlock, DownSample, UpSample}
    assert all(TransformerBlockRegistry.get(kind).return_hidden_states_index == 0 for kind in kinds)


@pytest.mark.parametrize("blocks", [None, [0, 3]])
@torch.no_grad()
def test_first_block_cache_on_the_same_input_twice(executed, blocks):
    model = tiny_model()
    model.set_attention_modulation(blocks)
    expected = call(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    executed.clear()
    assert torch.equal(call(model), expected)
    assert executed == ALL
    executed.clear()
    # The rest of the network is a residual, added back: equal but for the rounding of one subtraction.
    torch.testing.assert_close(call(model), expected, atol=1e-5, rtol=0)
    assert executed == ["EDTBlock"]
    model.disable_cache()
    assert torch.equal(call(model), expected)


@pytest.mark.parametrize("threshold", [0.0, -1.0])
@torch.no_grad()
def test_first_block_cache_that_never_skips_is_no_cache(executed, threshold):
    model = tiny_model()
    seeds = (1, 2, 1, 3)
    expected = [call(model, seed) for seed in seeds]
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    executed.clear()
    outputs = [call(model, seed) for seed in seeds]
    assert executed == 4 * ALL
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@torch.no_grad()
def test_first_block_cache_adds_the_old_rest_to_a_new_first_block():
    model = tiny_model()
    seen: dict[str, torch.Tensor] = {}
    first, last = model.blocks[0], model.blocks[-1]
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    model.norm_out.register_forward_pre_hook(lambda _, args: seen.update(rest=args[0]))
    call(model, 1)
    after_last = seen["rest"]
    model.disable_cache()
    hook = first.register_forward_hook(lambda _, __, out: seen.update(first=out))
    call(model, 1)
    first_of_one = seen["first"]
    call(model, 2)
    first_of_two = seen["first"]
    hook.remove()
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    call(model, 1)
    call(model, 2)
    torch.testing.assert_close(seen["rest"], first_of_two + (after_last - first_of_one), atol=1e-5, rtol=0)
    assert last is model.blocks[-1]


@torch.no_grad()
def test_first_block_cache_keeps_contexts_apart():
    model = tiny_model()
    expected = call(model, 2)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    call(model, 1, context="one")
    assert torch.equal(call(model, 2, context="two"), expected)
    assert (call(model, 2, context="one") - expected).abs().max() > 1e-2


@torch.no_grad()
def test_taylor_cache_of_order_zero_on_the_same_input():
    model = tiny_model()
    expected = [call(model, seed) for seed in (1, 2)]
    config: dict[str, Any] = {"cache_identifiers": [r"blocks\.\d+\.(attn|ff)"], "max_order": 0}
    config |= {"disable_cache_before_step": 1, "taylor_factors_dtype": torch.float32}
    model.enable_cache(TaylorSeerCacheConfig(cache_interval=3, **config))
    for _ in range(4):
        torch.testing.assert_close(call(model, 1), expected[0], atol=1e-5, rtol=0)
    model.disable_cache()
    model.enable_cache(TaylorSeerCacheConfig(cache_interval=1, **config))
    for seed in (1, 2, 1, 2):
        assert torch.equal(call(model, seed), expected[seed - 1])


@torch.no_grad()
def test_layerwise_casting_to_float8():
    """Weights are stored in eight bits; three of mantissa make an error of at most 2^-4 in each."""
    model = tiny_model()
    expected = call(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    out = call(model)
    assert out.dtype == torch.float32
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for block in (0, 3, 5):
        for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"):
            assert stored[f"blocks.{block}.{layer}.weight"] == torch.float8_e4m3fn
    for name in ("patch_embed.proj.weight", "norm_out.modulation.linear.weight", "blocks.0.attn.position_bias.table"):
        assert stored[name] == torch.float32
    assert model.pos_embed.dtype == torch.float32
    error = float((out - expected).norm() / expected.norm())
    assert 0 < error < 0.1
    # What it computes is the network with rounded weights, exactly.
    rounded = tiny_model()
    for name, parameter in rounded.named_parameters():
        parameter.copy_(parameter.to(stored[name]).float())
    torch.testing.assert_close(out, call(rounded), atol=1e-5, rtol=0)


LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def test_lora_starts_at_the_base_and_trains_nothing_else():
    model = tiny_model().train()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    output = torch.no_grad()(call)
    expected = output(model)
    model.add_adapter(LORA)
    assert torch.equal(output(model), expected)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 5 * 4 * 2  # five blocks, four projections, two factors
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        call(model).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)
    assert (output(model) - expected).abs().max() > 1e-4
    unchanged = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if name not in trainable}
    assert unchanged.keys() == base.keys()
    assert all(torch.equal(parameter, base[name]) for name, parameter in unchanged.items())
    model.disable_adapters()
    assert torch.equal(output(model), expected)


@torch.no_grad()
def test_lora_saved_and_loaded(tmp_path):
    model = tiny_model()
    model.add_adapter(LORA)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_lora_adapter(tmp_path)
    other = tiny_model()
    assert (call(other) - call(model)).abs().max() > 1e-3
    other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    assert torch.equal(call(other), call(model))


@torch.no_grad()
def test_lora_is_its_formula():
    """W x + (alpha / r) B A x on every adapted projection, so merging it into W changes nothing."""
    model, merged = tiny_model(), tiny_model()
    model.add_adapter(LORA)
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    weights = dict(merged.named_parameters())
    for name, down in factors.items():
        if ".lora_A." in name:
            up = factors[name.replace(".lora_A.", ".lora_B.")]
            weights[name.split(".lora_A.")[0] + ".weight"].add_(up @ down * 4 / 2)
    torch.testing.assert_close(call(model), call(merged), atol=1e-5, rtol=0)
