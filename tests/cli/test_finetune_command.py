"""`edt train --from`: other classes, another size, LoRA, frozen parts; and the mistakes one can make with it."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train_options import assert_same, model_of, tensors_of

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.assemble import finetuning
from edt_diffusion.pipelines.loading import load_pipeline

LORA = "finetune.lora.rank=2"
STILL = "optimizer.lr=1e-30"  # too little to move a float32
EMBEDDER = "model/class_embedder.weight"


@pytest.fixture(scope="session")
def other_classes(tmp_path_factory) -> Path:
    """Pictures of three classes, of which the source knows two, in other rows."""
    root = tmp_path_factory.mktemp("other")
    draws = np.random.default_rng(5)
    for name in ("apple", "church", "tench"):
        (root / name).mkdir()
        for index in range(3):
            Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def tune(edt, run, other_classes, work):
    """`edt train --from` a run of four steps on other classes; it must succeed."""

    def start(out: str, *arguments: object, config: object = None) -> list[str]:
        first = [] if config is None else [config]
        said = edt("train", *first, "--from", run, "--data", other_classes, "--out", out, "--quiet", *arguments)
        assert said.code == 0, said
        return said.out

    return start


@pytest.fixture
def refused(edt, run, other_classes, work):
    """The line with which `edt train` refuses; nothing may have been written."""

    def start(*arguments: object, origin: object = run, out: str | None = "new") -> str:
        there = [] if out is None else ["--out", out]
        said = edt("train", "--from", origin, "--data", other_classes, *there, *arguments)
        assert (said.code, said.out, len(said.err)) == (2, [], 1), said
        assert not Path("new").exists()
        return said.err[0]

    return start


# ---- what is taken over ----


def test_classes_are_taken_over_by_their_names(tune, run):
    tune("new", "train.steps=1", STILL)
    before, after = tensors_of(run, 4), tensors_of(Path("new"), 1)
    # What was averaged is taken, as that is what a trained folder holds.
    old, new = model_of(run)["class_embedder.weight"], after[EMBEDDER]
    church, tench, null = old
    assert torch.equal(new, torch.stack([null, church, tench, null]))  # apple starts as the null class
    assert not torch.equal(church, tench)
    rest = [name for name in before if name.startswith("model/") and name != EMBEDDER]
    assert len(rest) > 50
    assert [name for name in rest if not torch.equal(after[name], model_of(run)[name.removeprefix("model/")])] == []
    assert load_pipeline("new").class_names == ["apple", "church", "tench"]
    settings = Path("new/config.yaml").read_text()
    assert "seed: 1\n" in settings  # those of the run
    assert "batch_size: 4\n" in settings


def test_a_configuration_of_its_own_takes_the_architecture_only(tune, run, tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text("seed: 9\ndata: {size: 8, channels: 1}\ntrain: {steps: 1, batch_size: 2, sample_every: 0}\n")
    tune("new", STILL, config=config)
    old, new = model_of(run), tensors_of(Path("new"), 1)
    assert torch.equal(new[EMBEDDER][1:3], old["class_embedder.weight"][:2])
    assert torch.equal(new["model/blocks.0.attn.to_q.weight"], old["blocks.0.attn.to_q.weight"])
    assert "seed: 9\n" in Path("new/config.yaml").read_text()
    shutil.rmtree(run / "model")
    tune("new", STILL, "train.steps=2", config=config)  # and it goes on, though it names no model


def test_another_size(tune, run):
    tune("new", "data.size=16", "train.steps=1", STILL)
    old, new = model_of(run), tensors_of(Path("new"), 1)
    assert torch.equal(new["model/blocks.0.attn.to_q.weight"], old["blocks.0.attn.to_q.weight"])
    assert old["blocks.0.attn.position_bias.table"].shape == (15 * 15, 2)
    assert new["model/blocks.0.attn.position_bias.table"].shape == (31 * 31, 2)
    images = load_pipeline("new")([0], num_inference_steps=2, output_type="np").images
    assert images.shape[1:3] == (16, 16)


@pytest.mark.parametrize("settings", [[], [LORA, "finetune.lora.dropout=0.1"], ["finetune.freeze=[stage0,final]"]])
def test_it_goes_on_without_the_model_it_began_with(tune, run, settings):
    tune("whole", *settings)
    tune("halves", "train.steps=2", *settings)
    shutil.rmtree(run)
    tune("halves", "train.steps=4", *settings)
    assert_same(Path("halves"), Path("whole"), 4)


# ---- low-rank adapters and frozen parts ----


def test_low_rank_adapters_leave_the_base_as_it_was(tune, run):
    tune("new", LORA, "train.steps=3")
    new, base = tensors_of(Path("new"), 3), model_of(run)
    plain = {
        name.removeprefix("model/").replace(".base_layer.", "."): tensor
        for name, tensor in new.items()
        if name.startswith("model/") and ".lora_" not in name and name != EMBEDDER
    }
    assert plain.keys() == base.keys() - {"class_embedder.weight"}
    assert [name for name in plain if not torch.equal(plain[name], base[name])] == []
    factors = [name for name in new if name.startswith("model/") and ".lora_B." in name]
    assert len(factors) == 20  # four layers in each of five blocks
    assert all(bool(new[name].any()) for name in factors)
    exported = model_of(Path("new"))
    assert exported.keys() == base.keys()  # merged: a plain model
    assert not torch.equal(exported["blocks.0.attn.to_q.weight"], base["blocks.0.attn.to_q.weight"])
    pipeline = ClassConditionalPipeline.from_pretrained("new/model")
    assert pipeline([1], num_inference_steps=2, output_type="np").images.shape[0] == 1
    files = sorted(path.name for path in Path("new/model/lora").iterdir())
    assert files == ["other_trained_weights.safetensors", "pytorch_lora_weights.safetensors"]


def test_adapters_with_dropout_go_on_bitwise_and_the_dropout_does_something(tune):
    dropout = [LORA, "finetune.lora.dropout=0.1"]
    tune("whole", *dropout)
    tune("halves", "train.steps=1", *dropout)
    tune("halves", "train.steps=4", *dropout)
    assert_same(Path("halves"), Path("whole"), 4)
    tune("without", LORA)
    with_, without = tensors_of(Path("whole"), 4), tensors_of(Path("without"), 4)
    assert any(not torch.equal(with_[name], without[name]) for name in without if ".lora_" in name)


def test_frozen_parts_stay_bit_for_bit(tune, run):
    tune("new", "finetune.freeze=[stage0,patch_embed]")
    base, new = model_of(run), tensors_of(Path("new"), 4)
    equal = {name for name in base if name != "class_embedder.weight" and torch.equal(new[f"model/{name}"], base[name])}
    tables = {name for name in base if name.endswith("pos_embed")}  # never trained
    stage0 = {name for name in base if name.startswith(("blocks.0.", "patch_embed."))}
    assert equal == stage0 | tables
    assert not any(f"ema/{name}" in new for name in stage0)


# ---- mistakes ----


def test_nothing_to_start_from(refused, tmp_path):
    said = refused(origin="nothing")
    assert "--from nothing" in said
    assert "no run folder" in said
    assert "nothing does not exist: expected a run folder, a diffusers folder" in refused("small-32", origin="nothing")


def test_a_run_is_not_overwritten_by_what_starts_from_it(refused):
    assert "--from without a configuration takes the settings of that run: name a folder with --out" in refused(
        out=None
    )


def test_an_architecture_that_does_not_fit(refused):
    said = refused("model.dims=[24,16,16,16,24]")
    assert "dims=[24, 16, 16, 16, 24], the trained one [16, 16, 16, 16, 16]" in said
    assert "set model.dims=[16, 16, 16, 16, 16]" in said


def test_parts_that_are_not_there_and_all_of_them(refused):
    said = refused("finetune.freeze=[stage7]")
    assert "unknown part to freeze 'stage7': expected one of stage0" in said
    assert "freezes the whole model: leave a part out, or add LoRA" in refused("finetune.freeze=[all]")
    assert "unknown LoRA target 'to_x'" in refused("finetune.lora.targets=[to_x]")


def test_adapters_without_their_package(refused, monkeypatch):
    prepare = finetuning.prepare_finetuning

    def without(*arguments):  # not before: diffusers has seen that it is there, and imports it to load a model
        monkeypatch.setitem(sys.modules, "peft", None)
        return prepare(*arguments)

    monkeypatch.setattr(finetuning, "prepare_finetuning", without)
    assert refused(LORA).endswith("LoRA needs peft, which is not installed: pip install 'edt-diffusion[finetune]'")


def test_other_adapters_or_frozen_parts_than_the_run_began_with(edt, tune, run, other_classes):
    tune("new", LORA, "train.steps=2")
    for change, words in (
        ("finetune.lora.rank=3", "finetune.lora.rank: 2 -> 3"),
        ("finetune.freeze=[stage0]", "finetune.freeze: [] -> ['stage0']"),
    ):
        said = edt("train", "--from", run, "--data", other_classes, "--out", "new", change)
        assert (said.code, said.out, len(said.err)) == (2, [], 1), said
        assert words in said.err[0]


def weights_in(pipeline: str) -> dict[str, torch.Tensor]:
    return load_file(Path(pipeline) / "transformer" / "diffusion_pytorch_model.safetensors")


def test_averages_of_adapters_become_a_model_to_sample_from(edt, tune, run):
    width = "ema.power=[0.05]"
    tune("new", LORA, width, "ema.snapshot_every=1", "ema.decay=0.5", "optimizer.lr=0.05", "train.steps=3")
    said = edt("ema", "new", "--sigma-rel", "0.05")
    assert (said.code, said.err) == (0, []), said
    # The average of that width itself, from the checkpoint, added up by hand.
    saved = tensors_of(Path("new"), 3)
    base = {name.removeprefix("model/"): value for name, value in saved.items() if name.startswith("model/")}
    average = {name.split("/", 1)[1]: value for name, value in saved.items() if name.startswith("ema-0.050/")}
    made, exported = weights_in("new/ema-0.050"), weights_in("new/model")
    layer = "blocks.0.attn.to_q"
    up, down = (average[f"{layer}.lora_{side}.default.weight"] for side in "BA")
    expected = base[f"{layer}.base_layer.weight"] + up @ down
    torch.testing.assert_close(made[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(exported[f"{layer}.weight"], expected, rtol=1e-3, atol=1e-4)  # another average
    torch.testing.assert_close(made["class_embedder.weight"], average["class_embedder.weight"])
    assert torch.equal(made["blocks.0.ff.net.2.weight"], base["blocks.0.ff.net.2.weight"])
    assert made.keys() == exported.keys()
    assert Path("new/ema-0.050/lora/pytorch_lora_weights.safetensors").is_file()
    assert edt("sample", "new/ema-0.050", "-n", 1, "--steps", 2, "--out", "s", "--quiet").code == 0
    shutil.rmtree("new/checkpoints")
    said = edt("ema", "new", "--sigma-rel", "0.05", "--out", "again")
    assert (said.code, len(said.err), Path("again").exists()) == (2, 1, False)
    assert "new holds no checkpoint" in said.err[0]
