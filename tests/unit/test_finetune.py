"""Frozen parts and low-rank adapters."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from stores import small_kl
from tiny_backbones import tiny_backbone
from tiny_models import tiny_inputs, tiny_model

from edt_diffusion import ClassConditionalPipeline, EDTTransformer2DModel
from edt_diffusion.assemble import finetuning
from edt_diffusion.config import parse_config
from edt_diffusion.data.codec import LatentScaling
from edt_diffusion.pipelines import make_scheduler
from edt_diffusion.training.ema import EMA
from edt_diffusion.training.finetune import (
    FinetuneConfig,
    freeze_parts,
    parameter_parts,
    prepare_finetuning,
    trainable_summary,
)
from edt_diffusion.training.lora import (
    LORA_FILE,
    REST_FILE,
    LoraSettings,
    add_lora,
    has_adapters,
    load_lora,
    lora_state_dict,
    merged_state_dict,
    save_lora,
    without_adapters,
)
from edt_diffusion.util.errors import UserError


@torch.no_grad()
def predict(model: EDTTransformer2DModel) -> torch.Tensor:
    return model(**tiny_inputs(model)).sample


def train(model: EDTTransformer2DModel, steps: int = 3, ema: EMA | None = None) -> torch.optim.Optimizer:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (model(**tiny_inputs(model, batch=4, seed=step)).sample - 1).square().mean().backward()
        optimizer.step()
        if ema is not None:
            ema.update(model)
    model.eval()
    return optimizer


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# ---- frozen parts ----


def test_parts_are_the_whole_model():
    model = tiny_model()
    parts = parameter_parts(model)
    assert list(parts) == [
        "stage0", "stage1", "stage2", "down", "up", "patch_embed", "timestep_embedder", "class_embedder",
        "position_bias", "final", "all",
    ]  # fmt: skip
    names = [name for part, members in parts.items() if part not in ("position_bias", "all") for name in members]
    assert sorted(names) == sorted(parts["all"]) == sorted(name for name, _ in model.named_parameters())
    assert {name.split(".")[1] for name in parts["stage0"]} == {"0", "1"}
    assert {name.split(".")[1] for name in parts["stage2"]} == {"5", "6"}
    assert len(parts["position_bias"]) == 5
    assert "class_embedder" not in parameter_parts(tiny_model(num_classes=None))
    assert "down" not in parameter_parts(tiny_model(depths=(2,), dims=(16,), num_heads=(2,)))


@pytest.mark.parametrize(
    "names", [["stage0", "down"], ["stage1", "up", "final"], ["position_bias"], ["patch_embed", "timestep_embedder"]]
)
def test_frozen_parameters_stay_and_cost_nothing(names):
    model = tiny_model()
    before = weights(model)
    frozen = freeze_parts(model, names)
    parts = parameter_parts(model)
    assert set(frozen) == {name for part in names for name in parts[part]}
    ema = EMA(model)
    optimizer = train(model, ema=ema)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
        assert (parameter.grad is None) == (name in frozen)
        assert (id(parameter) in held) == (name not in frozen)
        assert (parameter in optimizer.state) == (name not in frozen)
    assert set(ema.state_dict()["parameters"]) == set(before) - set(frozen)


def test_freezing_leaves_the_gradients_of_the_rest_as_they_are():
    def gradients(*names: str) -> dict[str, torch.Tensor]:
        model = tiny_model().train()
        freeze_parts(model, names)
        model.set_checkpointed_stages([0, 2])
        model(**tiny_inputs(model)).sample.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    full, part = gradients(), gradients("stage1", "patch_embed")
    assert part.keys() < full.keys()
    for name, gradient in part.items():  # a frozen bias takes another attention kernel, so bits may differ
        torch.testing.assert_close(gradient, full[name], atol=1e-5 * float(full[name].abs().max()) + 1e-5, rtol=0)


def test_unknown_parts_and_a_wholly_frozen_model():
    model = tiny_model()
    with pytest.raises(UserError, match="unknown part to freeze 'stage3': expected one of stage0, stage1"):
        freeze_parts(model, ["stage3"])
    with pytest.raises(UserError, match="unknown part to freeze 'class_embedder'"):
        freeze_parts(tiny_model(num_classes=None), ["class_embedder"])
    with pytest.raises(UserError, match=r"finetune.freeze=\['all'\] freezes the whole model: leave a part out, or add"):
        prepare_finetuning(model, FinetuneConfig(freeze=("all",)), seed=0)


def test_settings():
    config = FinetuneConfig.model_validate({"freeze": ["stage0"], "lora": {"rank": 4, "targets": ["to_q"]}})
    assert config.freeze == ("stage0",)
    assert config.lora == LoraSettings(rank=4, targets=("to_q",))
    for wrong in ({"frozen": ["stage0"]}, {"lora": {"rank": 0}}, {"lora": {"dropout": 1.0}}, {"lora": {"r": 4}}):
        with pytest.raises(ValidationError):
            FinetuneConfig.model_validate(wrong)
    with pytest.raises(ValidationError, match="unknown start of new classes 'men'"):
        FinetuneConfig(new_classes="men")
    with pytest.raises(ValidationError, match="drop one of them"):
        FinetuneConfig(freeze=("class_embedder",), lora=LoraSettings())
    FinetuneConfig(freeze=("class_embedder",), lora=LoraSettings(train_classes=False))


def test_summary():
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    stage0 = sum(p.numel() for block in model.blocks[:2] for p in block.parameters())
    summary = prepare_finetuning(model, FinetuneConfig(freeze=("stage0",)), seed=0)
    assert (summary.trainable, summary.total, summary.adapters) == (total - stage0, total, 0)
    assert summary.parts["stage0"] == (0, stage0)
    assert summary.lines() == [
        f"trains {total - stage0:,} of {total:,} parameters ({100 * (total - stage0) / total:.1f} %)",
        "frozen: stage0",
    ]
    model = tiny_model()
    summary = prepare_finetuning(model, FinetuneConfig(lora=LoraSettings(rank=3)), seed=0)
    # Two factors of 3 x C beside each of four projections: blocks of width 16, 16, 24, 16, 16.
    assert summary.adapters == 4 * 2 * 3 * (4 * 16 + 24)
    assert summary.trainable == summary.adapters + 6 * 16  # and the class table
    assert "low-rank adapters: 2,112 parameters" in summary.lines()


# ---- LoRA ----


def adapted(seed: int = 0, model_seed: int = 0, **settings: Any) -> EDTTransformer2DModel:
    model = tiny_model(model_seed)
    add_lora(model, LoraSettings(**{"rank": 2, "alpha": 3.0, **settings}), seed)
    return model


def test_adapters_start_without_effect_from_the_seed_alone():
    expected = predict(tiny_model())
    first = tiny_model()
    state = torch.get_rng_state()
    add_lora(first, LoraSettings(rank=2), seed=5)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is taken from the global generator
    torch.manual_seed(2)
    second, third = adapted(seed=5), adapted(seed=6)
    assert torch.equal(predict(first), expected)
    a, b, c = (lora_state_dict(model) for model in (first, second, third))
    assert a.keys() == b.keys() == c.keys()
    assert len(a) == 5 * 4 * 2
    downs = [name for name in a if "lora_A" in name]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in downs)
    assert len({tuple(a[name].flatten()[:4].tolist()) for name in downs}) == len(downs)  # layers differ too
    assert all(not a[name].any() for name in a if name not in downs)
    wide = a["transformer.blocks.3.attn.to_q.lora_A.weight"]
    assert wide.shape == (2, 24)
    assert 0.8 * 24**-0.5 < wide.abs().max() <= 24**-0.5


def test_adapters_are_float32_in_a_bfloat16_model():
    model = tiny_model().to(torch.bfloat16)
    add_lora(model, LoraSettings(rank=2), seed=0)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "lora_" not in name} == {torch.bfloat16}
    inputs = tiny_inputs(model)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    assert model(**inputs).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("classes", [False, True])
def test_training_moves_the_adapters_and_what_was_asked_for(classes):
    model = adapted(train_classes=classes)
    before = weights(model)
    ema = EMA(model)
    train(model, ema=ema)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    wanted = {name for name in before if "lora_" in name} | ({"class_embedder.weight"} if classes else set())
    assert changed == wanted == set(ema.state_dict()["parameters"])


def test_merged_weights_are_the_adapted_function():
    model = adapted(targets=("to_q", "to_out.0", "ff.net.0.proj", "ff.net.2"))
    model.set_attention_modulation([0])
    train(model)
    merged = merged_state_dict(model)
    assert merged.keys() == tiny_model().state_dict().keys()
    # W + (alpha / rank) B A, from the factors.
    factors = {name.removeprefix("transformer."): value for name, value in lora_state_dict(model).items()}
    up, down = (factors[f"blocks.3.ff.net.2.lora_{part}.weight"] for part in "BA")
    by_hand = tiny_model().blocks[3].ff.net[2].weight + 3.0 / 2 * up @ down
    torch.testing.assert_close(merged["blocks.3.ff.net.2.weight"], by_hand, atol=1e-6, rtol=0)
    plain = without_adapters(model)
    assert not has_adapters(plain)
    assert plain.attention_modulation == model.attention_modulation
    assert (predict(model) - predict(tiny_model())).abs().max() > 0.1
    torch.testing.assert_close(predict(plain), predict(model), atol=1e-5, rtol=0)
    assert without_adapters(plain) is plain


@pytest.mark.parametrize("classes", [False, True])
def test_base_and_adapter_files_are_the_merged_model(tmp_path, classes):
    model = adapted(train_classes=classes)
    train(model)
    save_lora(model, tmp_path / "lora")
    assert (tmp_path / "lora" / REST_FILE).is_file() == classes
    base = tiny_model()
    load_lora(base, tmp_path / "lora")
    assert torch.equal(predict(base), predict(model))
    torch.testing.assert_close(predict(base), predict(without_adapters(model)), atol=1e-6 * 10, rtol=1e-6)
    without_adapters(model).save_pretrained(tmp_path / "merged")
    loaded = EDTTransformer2DModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(predict(loaded), predict(without_adapters(model)))
    if not classes:  # then diffusers alone reads the file
        base = tiny_model()
        base.load_lora_adapter(str(tmp_path / "lora"), weight_name=LORA_FILE)
        assert torch.equal(predict(base), predict(model))


def test_adapter_files_of_another_model(tmp_path):
    save_lora(adapted(), tmp_path / "lora")
    with pytest.raises(UserError, match=r"class_embedder.weight of shape \(6, 16\), the model \(4, 16\)"):
        load_lora(tiny_model(num_classes=3), tmp_path / "lora")
    with pytest.raises(UserError, match=f"holds no {LORA_FILE}"):
        load_lora(tiny_model(), tmp_path)


def test_parts_frozen_by_name_get_no_adapters_and_all_gives_them_everywhere():
    model = tiny_model()
    before = weights(model)
    prepare_finetuning(model, FinetuneConfig(freeze=("stage0",), lora=LoraSettings(rank=2)), seed=0)
    layers = {name.split(".")[2] for name in lora_state_dict(model)}
    assert layers == {"3", "5", "6"}
    train(model)
    merged = merged_state_dict(model)
    for name in before:
        if name.startswith(("blocks.0.", "blocks.1.")):
            assert torch.equal(merged[name], before[name])
    everywhere = tiny_model()
    prepare_finetuning(everywhere, FinetuneConfig(freeze=("all",), lora=LoraSettings(rank=2)), seed=0)
    assert {name.split(".")[2] for name in lora_state_dict(everywhere)} == {"0", "1", "3", "5", "6"}
    assert freeze_parts(everywhere, ["stage0"])  # also after the adapters were added, which go on
    assert trainable_summary(everywhere).adapters == 4 * 2 * 2 * (4 * 16 + 24)


def test_mistakes():
    with pytest.raises(UserError, match=r"unknown LoRA target 'to_qq': expected .*did you mean 'to_[qkv]'"):
        adapted(targets=("to_v", "to_qq"))
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(adapted(), LoraSettings(), 0)
    everything = FinetuneConfig(freeze=("stage0", "stage1", "stage2"), lora=LoraSettings())
    with pytest.raises(UserError, match=r"every layer of the LoRA targets to_q, to_k, to_v, to_out\.0 is frozen"):
        prepare_finetuning(tiny_model(), everything, seed=0)


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_model()
    with pytest.raises(UserError, match=r"pip install 'edt-diffusion\[finetune\]'"):
        add_lora(model, LoraSettings(), 0)
    assert without_adapters(model) is model


@pytest.mark.slow
def test_the_package_imports_without_peft():
    code = "import sys; sys.modules['peft'] = None; import edt_diffusion.training.finetune"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


# ---- what a fine-tuning run is told ----


def test_other_autoencoders_and_other_figures_are_told():
    model = tiny_model(in_channels=2)

    def source(vae, **figures):
        return ClassConditionalPipeline(model, make_scheduler("ddpm"), vae=vae, **figures)

    usual = source(small_kl())
    assert finetuning.latent_lines(None, small_kl(), None) == []
    assert finetuning.latent_lines(source(None), small_kl(), None) == []
    assert finetuning.latent_lines(usual, small_kl(), None) == []
    assert finetuning.latent_lines(usual, small_kl(), LatentScaling((0.25,) * 2, (0.5,) * 2)) == []
    (other,) = finetuning.latent_lines(usual, small_kl(seed=1), None)
    assert other.startswith("the model's autoencoder is not the one of these latents")
    (scaled,) = finetuning.latent_lines(usual, small_kl(), LatentScaling((0.25,) * 2, (0.6,) * 2))
    assert scaled.startswith("the model's latents were shifted and scaled by other figures")
    measured = {"latents_mean": [0.1, 0.2], "latents_std": [3.0, 0.7]}
    assert (
        finetuning.latent_lines(source(small_kl(), **measured), small_kl(), LatentScaling.measured(*measured.values()))
        == []
    )
    assert finetuning.latent_lines(source(small_kl(), **measured), small_kl(), None) == [scaled]
    (pixels,) = finetuning.latent_lines(usual, None, None)
    assert "this run trains on pixels" in pixels


def test_another_prediction_is_told():
    config = parse_config({
        "data": {"path": "pictures", "size": 8}, "finetune": {"model": "a"}, "objective": {"name": "flow"},
    })  # fmt: skip

    def told(prediction: str) -> list[str]:
        name = "euler" if prediction == "flow" else "ddpm"
        source = ClassConditionalPipeline(tiny_model(), make_scheduler(name, prediction_type=prediction))
        lines = finetuning.prepare(config, tiny_model(learn_sigma=False), None, source)
        return [line for line in lines if line.startswith("the model predicted")]

    rest = "this run trains velocity: its output layer starts from weights made for something else"
    assert told("epsilon") == [f"the model predicted noise, {rest}"]
    assert told("v_prediction") == [f"the model predicted v, {rest}"]
    assert told("flow") == []


# ---- other backbones ----


def test_parts_of_other_backbones_are_the_whole_model():
    ends = ["patch_embed", "timestep_embedder", "class_embedder"]
    expected = {
        "DiT": ["stage0", *ends, "final", "all"],
        "MDTv2": ["stage0", "stage1", "stage2", "side", "positions", *ends, "position_bias", "final", "all"],
        "EDT": ["stage0", "stage1", "stage2", "down", "up", "side", *ends, "position_bias", "final", "all"],
    }
    for family, wanted in expected.items():
        model = tiny_backbone(family, **({"side_interpolater": True} if family == "EDT" else {}))
        parts = parameter_parts(model)
        assert list(parts) == wanted
        names = [name for part, members in parts.items() if part not in ("position_bias", "all") for name in members]
        assert sorted(names) == sorted(parts["all"]) == sorted(name for name, _ in model.named_parameters())
        if family == "MDTv2":
            assert parts["positions"] == ["pos_embed", "blocks.4.pos_embed"]
            assert {name.split(".")[1] for name in parts["stage1"]} == {"2", "3"}
            assert sorted(parts["side"]) == sorted(model.masked_only())


@pytest.mark.parametrize("family", ["DiT", "MDTv2"])
def test_adapters_of_other_backbones(tmp_path, family):
    """Merged they are the adapted function, saved and loaded too; what no pass uses gets none."""
    model = tiny_backbone(family)
    for name in model.masked_only():
        model.get_parameter(name).requires_grad_(False)
    summary = prepare_finetuning(model, FinetuneConfig(lora=LoraSettings(rank=2)), seed=0)
    assert summary.adapters == len(model.attention_layers()) * 4 * 2 * 2 * 16
    assert not any(".lora_" in name and ".block." in name for name, _ in model.named_parameters())
    train(model)
    expected = predict(model)
    torch.testing.assert_close(predict(without_adapters(model)), expected, atol=1e-5, rtol=0)
    assert type(without_adapters(model)) is type(model)
    save_lora(model, tmp_path / "lora")
    again = tiny_backbone(family)
    load_lora(again, tmp_path / "lora")
    torch.testing.assert_close(predict(again), expected, atol=1e-5, rtol=0)


def test_adapters_of_the_side_interpolater_where_masked_passes_are_trained():
    model = tiny_backbone("MDTv2")
    summary = prepare_finetuning(model, FinetuneConfig(freeze=("all",), lora=LoraSettings(rank=2)), seed=0)
    assert summary.adapters == (len(model.attention_layers()) + 1) * 4 * 2 * 2 * 16
