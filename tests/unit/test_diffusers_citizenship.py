"""What diffusers and peft give a model that keeps their contracts; a new version of either may break it silently."""

import copy
import functools
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from peft import LoraConfig
from tiny_backbones import TINY_OF, tiny_backbone
from tiny_models import tiny_inputs, tiny_model

from edt_diffusion import ClassConditionalPipeline, EDTTransformer2DModel
from edt_diffusion.models import BACKBONES, MaskPlan
from edt_diffusion.models.edt import DownSample, EDTBlock, UpSample
from edt_diffusion.nn.transformer_block import AdaLNZeroBlock, SideInterpolater
from edt_diffusion.pipelines import make_scheduler
from edt_diffusion.pipelines.precision import offload_network


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


# ---- every backbone ----

FAMILIES = list(TINY_OF)


def with_amm(family: str) -> Any:
    model = tiny_backbone(family)
    model.set_attention_modulation([1, 3])
    return model


def input_masks(model: Any) -> Any:
    """Masks of MDT's kind for those that take them, else None."""
    fits = any(isinstance(block, SideInterpolater) for block in model.blocks)
    return MaskPlan((), input=(0.4, 0.4)).draw(0, 0, [0, 1], model.mask_grids) if fits else None


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_and_loaded_alone_and_in_a_pipeline(tmp_path, family):
    model = with_amm(family)
    expected = call(model, context=None)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(call(loaded, context=None), expected)
    assert loaded.attention_modulation == model.attention_modulation
    pipe = ClassConditionalPipeline(model, make_scheduler("ddim"))
    pipe.save_pretrained(tmp_path / "pipe")
    again = ClassConditionalPipeline.from_pretrained(tmp_path / "pipe")
    assert type(again.transformer) is BACKBONES[family]
    assert torch.equal(call(again.transformer, context=None), expected)
    asked: dict[str, Any] = {"class_labels": [0, 3], "num_inference_steps": 3, "guidance_scale": 2.0}
    pictures = [p(**asked, seeds=[4, 5], output_type="np").images for p in (pipe, again)]
    assert pictures[0].shape[:3] == (2, 8, 8)
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_block_is_registered_and_every_backend_computes_the_same(family):
    model = with_amm(family)
    kinds = {type(block) for block in model.blocks}
    assert all(TransformerBlockRegistry.get(kind).return_hidden_states_index == 0 for kind in kinds)
    assert {kind.__name__ for kind in kinds} == set(model._no_split_modules) - (
        {"SideInterpolater"} if family == "EDT" else set()
    )
    expected = call(model)
    for backend in ("_native_math", "native"):
        model.set_attention_backend(backend)
        torch.testing.assert_close(call(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stored_in_float8_and_offloaded(family):
    model = tiny_backbone(family)
    expected = call(model, context=None)
    offloaded = offload_network(copy.deepcopy(model), "cpu")
    assert torch.equal(call(offloaded, context=None), expected)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    small = ("attn.to_q.weight", "attn.to_out.0.weight", "ff.net.2.weight", "skip_linear.weight", "adaln.linear.weight")
    kept = (
        "pos_embed",
        "mask_token",
        "position_bias.table",
        "patch_embed.proj.weight",
        "norm_out.modulation.linear.bias",
    )
    for name, dtype in stored.items():
        if name.endswith(small):
            assert dtype == torch.float8_e4m3fn, name
        if name.endswith(kept):
            assert dtype == torch.float32, name
    assert 0 < float((call(model, context=None) - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_names_of_adapted_layers(family):
    model = tiny_backbone(family)
    expected = call(model)
    model.add_adapter(LORA)
    assert torch.equal(call(model), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attentions = len(model.attention_layers()) + (family == "MDTv2")  # that of the side block
    assert len(trained) == 4 * 2 * attentions
    assert all(".attn.to_" in name and ".lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("family", "stages"), [("DiT", [0]), ("DiT", True), *[("MDTv2", s) for s in ([0], [1], [2], [0, 2], True)]]
)
def test_checkpointing_changes_no_bit_of_a_gradient(family, stages):
    """EDT's are in test_edt_model.py. The blocks of the stages named are called twice, the side interpolater once."""
    model = with_amm(family).train()
    calls: list[int] = []
    for number, block in enumerate(model.blocks):
        name = "transform" if isinstance(block, AdaLNZeroBlock) else "forward"
        inner = getattr(block, name)

        def counted(*args: Any, _inner: Any = inner, _number: int = number) -> torch.Tensor:
            calls.append(_number)
            return _inner(*args)

        setattr(block, name, counted)
    for masks in {None, input_masks(model)}:

        def gradients(masks: Any = masks) -> list[torch.Tensor]:
            calls.clear()
            loss = model(**tiny_inputs(model), token_masks=masks).sample.square().sum()
            idle = model.masked_only() if masks is None else []
            trained = [p for name, p in model.named_parameters() if name not in idle]
            return list(torch.autograd.grad(loss, trained))

        model.set_checkpointed_stages(None)
        plain = gradients()
        assert len(calls) == len(model.blocks)
        model.set_checkpointed_stages(stages)
        recomputed = gradients()
        wanted = range(len(model.grids)) if stages is True else stages
        twice = {n for n in calls if calls.count(n) == 2}
        assert twice == {
            n for n, (block, stage) in enumerate(zip(model.blocks, model.block_stages, strict=True))
            if stage in wanted and isinstance(block, AdaLNZeroBlock)
        }  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch asks for it while tracing
@pytest.mark.parametrize(("family", "change", "graphs"), [("DiT", {"depth": 5}, 1), ("MDTv2", {"depth": 10}, 4)])
def test_graphs_of_compiled_blocks_do_not_grow_with_the_depth(family, change, graphs):
    """MDTv2: an in-block, the first out-block (whose long skip is its input), the other out-blocks, a decoder block.

    The number of tokens that masks leave varies from step to step: it becomes a variable of the graphs.
    """
    torch.compiler.reset()
    model = tiny_backbone(family, **change)
    made: list[Any] = []

    def count(graph: Any, _example_inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    inputs = tiny_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).sample
        masked = MaskPlan((), input=(0.3, 0.5))
        masks = [masked.draw(0, step, [0, 1], model.mask_grids) for step in range(4)] if model.mask_grids else []
        eager = [model(**inputs, token_masks=m).sample for m in masks]
        model.compile_repeated_blocks(fullgraph=True, backend=count)
        torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=0)
        assert len(made) == graphs
        for number, (given, wanted) in enumerate(zip(masks, eager, strict=True)):
            torch.testing.assert_close(model(**inputs, token_masks=given).sample, wanted, atol=1e-5, rtol=0)
            if number == 1:
                seen = len(made)
        assert not masks or (len({int(m.input.sum()) for m in masks}) > 2 and len(made) == seen)
    torch.compiler.reset()
