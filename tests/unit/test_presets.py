import re

import pytest
import torch

from edt_diffusion.config import load_config, presets
from edt_diffusion.models import BACKBONES
from edt_diffusion.models.summary import describe
from edt_diffusion.objectives.config import default_masks, usual_passes
from edt_diffusion.training.memory import estimate_training_memory

PAPER = [f"edt-{size}-{pixels}" for size in ("s", "b", "xl") for pixels in (256, 512)]
STARRED = [f"edt-{size}-256-star" for size in ("s", "b", "xl")]
BASELINES = ["dit-s-256", "mdtv2-s-256"]
OWN = ["digits", "small-32", "card-8gb-256", "cpu-256"]
UNITS = {"tera": 1e12, "peta": 1e15, "exa": 1e18}
HEADER = re.compile(
    r"([\d.]+) M parameters, ([\d.]+) G multiply-adds a picture, ([\d.]+) (tera|peta|exa)FLOPs of training"
)
MEMORY = re.compile(
    r"with (\d+) samples a micro-batch: ([\d.]+) GiB(?:, ([\d.]+) GiB with train.mixed_precision=bf16)?"
)


def model_of(config):
    """The network of a preset on the meta device, for as many classes as its figures are for."""
    given = {key: value for key, value in config.model.items() if key not in ("name", "size")}
    size, channels, classes = config.data.size // 8, 4, 1000 if config.model.get("size") else 10
    if config.data.size < 256:  # pixels
        size, channels = config.data.size, config.data.channels
    backbone = BACKBONES[config.model["name"]]
    with torch.device("meta"):
        given = {"sample_size": size, "in_channels": channels, "num_classes": classes, **given}
        return backbone.from_size(config.model["size"], **given) if config.model.get("size") else backbone(**given)


def passes_of(config):
    return len((config.objective.passes or usual_passes(config.model)).split("+"))


def header(name):
    return " ".join(line.lstrip("# ") for line in presets()[name].split("\nseed:")[0].splitlines())


def significant(number, shown):
    """Whether `shown`, as text, is `number` rounded to that many places."""
    places = len(shown.partition(".")[2])
    return f"{number:.{places}f}" == shown


def test_the_shipped_presets_are_these():
    assert sorted(presets()) == sorted([*PAPER, *STARRED, *BASELINES, *OWN])


@pytest.mark.parametrize("name", sorted(presets()))
def test_the_header_states_the_cost(name):
    config = load_config(name)
    facts = describe(model_of(config))
    found = HEADER.search(header(name))
    assert found is not None
    parameters, multiply_adds, training, unit = found.groups()
    assert significant(facts["parameters"]["total"] / 1e6, parameters)
    assert significant(facts["multiply_adds"] / 1e9, multiply_adds)
    # A backward pass costs two forward passes, a multiply-add two operations.
    passes = passes_of(config)
    operations = 3 * passes * 2 * facts["multiply_adds"] * config.train.batch_size * config.train.steps
    assert significant(operations / UNITS[unit], training)
    assert len(multiply_adds.replace(".", "").lstrip("0")) >= 2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("-xl-" in name)) for name in sorted(presets())]
)
def test_the_header_states_the_memory(name):
    config = load_config(name)
    model = model_of(config)
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    found = MEMORY.search(header(name))
    assert found is not None
    batch, plain, half = found.groups()
    wanted = {"no": plain, "bf16": half} if half else {config.train.mixed_precision: plain}
    passes = passes_of(config)
    for precision, gibibytes in wanted.items():
        estimate = estimate_training_memory(
            model, batch=int(batch), passes=passes, joint=True, precision=precision, masks=passes == 2,
            optimizer_states={"adan": 4, "adamw": 2}[config.optimizer.name],
        )  # fmt: skip
        # The estimate follows the model's code; the header is for people.
        assert estimate.total / 2**30 == pytest.approx(float(gibibytes), rel=0.05, abs=0.06)


@pytest.mark.parametrize("name", sorted(presets()))
def test_the_header_is_a_recipe(name):
    text = presets()[name]
    assert max(map(len, text.splitlines())) <= 120
    if name.endswith(("256", "512", "-star")):
        assert f"edt train {name} --data latents/" in text
        assert f"--size {load_config(name).data.size} --flips both" in text


@pytest.mark.parametrize("name", [*PAPER, *STARRED])
def test_paper_runs_have_the_settings_of_the_paper(name):
    """Those of arXiv 2410.23788 and its authors' code."""
    config = load_config(name)
    size, pixels = name.split("-")[1].upper(), int(name.split("-")[2])
    assert config.model == {"name": "EDT", "size": size}
    assert (config.data.size, config.data.flip) == (pixels, True)
    assert model_of(config).config.sample_size == pixels // 8
    assert (config.train.steps, config.train.batch_size) == (400_000, 256)
    assert (config.train.mixed_precision, config.train.max_grad_norm) == ("no", 0.0)
    assert config.ema.decay == 0.9999
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.schedule, optimizer.weight_decay) == ("adan", "paper", 0.0)
    assert optimizer.warmup_steps == 0
    assert optimizer.betas is None  # Adan's own, (0.98, 0.92, 0.99)
    rate = optimizer.rate(config.train.steps)
    start = 5e-4 if size == "XL" else 1e-3
    assert [rate(0), rate(200_000), rate(400_000), rate(500_000)] == pytest.approx(
        [start, (start + 5e-5) / 2, 5e-5, 5e-5]
    )
    objective = config.objective
    assert objective.name == "learned_variance"
    assert objective.timesteps in (None, "loss_second_moment")
    assert objective.loss_weighting in (None, "min_snr")
    assert (objective.min_snr_gamma, objective.label_dropout) == (5.0, 0.1)
    assert passes_of(config) == (1 if name in STARRED else 2)
    masks = objective.masks or default_masks(config.model)
    assert masks.down == ((0.4, 0.5), (0.1, 0.2))
    assert masks.stage0 == ((0.15, 0.25) if size == "XL" else None)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_the_settings_of_their_authors(name):
    """DiT's plain loss and AdamW; MDTv2's Min-SNR, clipping and masks at the input."""
    config = load_config(name)
    assert (config.data.size, config.train.steps, config.train.batch_size) == (256, 400_000, 256)
    assert config.ema.decay == 0.9999
    objective, optimizer = config.objective, config.optimizer
    rate = optimizer.rate(config.train.steps)
    assert optimizer.weight_decay == 0
    told = (objective.loss_weighting, objective.timesteps, objective.passes, optimizer.name)
    if name == "dit-s-256":
        assert told == ("none", "uniform", "full", "adamw")
        assert [rate(0), rate(400_000)] == [1e-4, 1e-4]
        assert config.train.max_grad_norm == 0
    else:
        assert told == ("min_snr", "loss_second_moment", "full+masked", "adan")
        assert rate(0) == 5e-4
        assert config.train.max_grad_norm == 1
        assert (objective.min_snr_gamma, objective.masks) == (5.0, default_masks(config.model))
    assert model_of(config).grids[0] == (16, 16)
