import json
import re
from inspect import signature

import pytest
import torch
import yaml

from edt_diffusion.config import (
    RunConfig,
    differences,
    load_config,
    parse_config,
    presets,
    run_source,
    settled,
    to_yaml,
)
from edt_diffusion.models import BACKBONES, EDTTransformer2DModel
from edt_diffusion.objectives.config import default_masks
from edt_diffusion.util.errors import UserError

MINIMAL = "data:\n  path: pictures\n  size: 16\n"


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str):
        path = tmp_path / "edt.yaml"
        path.write_text(text, "utf-8")
        return path

    return write


def complaint(tree: dict) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tree)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_paper_s(yaml_file):
    config = load_config(yaml_file(MINIMAL))
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.final_lr) == ("adan", 1e-3, 5e-5)
    assert (config.optimizer.schedule, config.optimizer.decay_steps) == ("paper", 400_000)
    assert config.objective.masks is None  # the published ones of the size, see below
    assert config.objective.label_dropout == 0.1
    assert config.ema.decay == 0.9999
    assert config.train.batch_size == 256


def test_overrides_win_over_the_file_and_are_read_as_yaml(yaml_file):
    path = yaml_file(MINIMAL + "train:\n  steps: 10\n  log_every: 7\n")
    config = load_config(
        path,
        ["train.steps=20", "optimizer.lr=2e-4", "model.depths=[1, 2, 1]", "data.label_column=null", "data.flip=true"],
    )
    assert (config.train.steps, config.train.log_every) == (20, 7)
    assert config.optimizer.lr == 2e-4
    assert config.model["depths"] == [1, 2, 1]
    assert config.data.label_column is None
    assert config.data.flip is True


def test_an_override_may_hold_an_equals_sign_and_text_that_is_no_yaml(yaml_file):
    config = load_config(yaml_file(MINIMAL), ["data.path=a=b: [c"])
    assert config.data.path == "a=b: [c"


def test_a_bare_no_is_a_precision(yaml_file):
    """YAML 1.1 reads `no` as false."""
    assert yaml.safe_load("no") is False
    path = yaml_file(MINIMAL + "train:\n  mixed_precision: no\n")
    assert load_config(path).train.mixed_precision == "no"
    assert load_config(path, ["train.mixed_precision=no"]).train.mixed_precision == "no"


def test_a_group_whose_keys_are_commented_out_keeps_its_defaults(yaml_file):
    path = yaml_file(MINIMAL + "train:\n  # steps: 10\nseed: null\n")
    assert load_config(path) == load_config(yaml_file(MINIMAL))
    path = yaml_file(MINIMAL + "train:\n  # steps: 10\n")
    assert load_config(path, ["train.steps=3"]).train.steps == 3


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_loads_and_its_model_can_be_built(name):
    config = load_config(name)
    latents = re.search(r"-(256|512)(-star)?$", name)
    pixels = int(latents.group(1)) if latents else {"digits": 8, "small-32": 32}[name]
    channels = 1 if name == "digits" else 3
    assert (config.data.size, config.data.channels) == (pixels, channels)
    shape = {"sample_size": pixels, "in_channels": channels}
    if latents:
        shape = {"sample_size": pixels // 8, "in_channels": 4}
    arguments = {key: value for key, value in config.model.items() if key not in ("name", "size")}
    build = BACKBONES[config.model.get("name", "EDT")]
    size = config.model.get("size")
    with torch.device("meta"):
        model = build.from_size(size, **shape) if size else build(**arguments, **shape, num_classes=10)
    assert len(default_masks(config.model).down) == len(model.down_grids)
    assert (default_masks(config.model).input is not None) == (config.model.get("name") == "MDTv2")


def test_the_shipped_presets_are_these():
    paper = [f"edt-{size}-{pixels}" for size in ("s", "b", "xl") for pixels in (256, 512)]
    unmasked = [f"edt-{size}-256-star" for size in ("s", "b", "xl")]
    baselines = ["dit-s-256", "mdtv2-s-256"]
    assert set(presets()) == {"digits", "small-32", "card-8gb-256", "cpu-256", *paper, *unmasked, *baselines}


@pytest.mark.parametrize("name", sorted(presets()))
def test_to_yaml_is_read_back_equal(name, yaml_file):
    config = load_config(name, ["train.mixed_precision=no", "data.path='2024'"])
    again = load_config(yaml_file(to_yaml(config)))
    assert again == config
    assert differences(config, again) == []


def test_differences_name_the_keys_and_both_values(yaml_file):
    path = yaml_file(MINIMAL + "model:\n  patch_size: 2\n")
    old = load_config(path)
    new = load_config(path, ["objective.masks.stage0=[0.15, 0.25]", "seed=3", "model.dims=[8]"])
    assert differences(old, new) == [
        "seed: 0 -> 3",
        "model.dims: None -> [8]",
        "objective.masks.down: None -> [[0.4, 0.5], [0.1, 0.2]]",
        "objective.masks.stage0: None -> [0.15, 0.25]",
    ]
    assert differences(new, old)[0] == "seed: 3 -> 0"


def test_the_only_backbone_need_not_be_named(yaml_file):
    named = load_config(yaml_file(MINIMAL + "model:\n  name: EDT\n  patch_size: 2\n"))
    assert differences(named, load_config(yaml_file(MINIMAL + "model:\n  patch_size: 2\n"))) == []


@pytest.mark.parametrize(
    ("tree", "given", "suggestion"),
    [
        ({"sead": 1}, "'sead'", "'seed'"),
        ({"trian": {"steps": 1}}, "'trian'", "'train'"),
        ({"train": {"stepz": 1}}, "'train.stepz'", "'train.steps'"),
        ({"data": {"size": 8, "limmit": 1}}, "'data.limmit'", "'data.limit'"),
        ({"objective": {"masks": {"stage_0": None}}}, "'objective.masks.stage_0'", "'objective.masks.stage0'"),
        ({"model": {"depht": [1]}}, "'model.depht'", "'model.depths'"),
        ({"samples": {"seeed": 1}}, "'samples.seeed'", "'samples.seed'"),
    ],
)
def test_unknown_keys_at_every_depth_get_the_nearest_suggestion(tree, given, suggestion):
    message = complaint({"data": {"size": 8}, **tree})
    assert message == f"unknown key {given} in the configuration (did you mean {suggestion}?)"


def test_an_unknown_key_unlike_any_other_gets_no_suggestion():
    assert complaint({"data": {"size": 8}, "zzz": 1}) == "unknown key 'zzz' in the configuration"


def test_model_keys_are_the_constructor_s():
    parameters = [name for name in signature(EDTTransformer2DModel.__init__).parameters if name != "self"]
    assert {"sample_size", "patch_size", "in_channels", "num_classes", "learn_sigma", "depths", "dims"} < set(
        parameters
    )
    config = parse_config({"data": {"size": 8}, "model": dict.fromkeys(parameters) | {"name": "EDT", "size": "S"}})
    assert set(config.model) == {*parameters, "name", "size"}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"train": {"steps": 0}}, ("train.steps=0", "greater than or equal to 1")),
        ({"train": {"steps": "many"}}, ("train.steps='many'", "integer")),
        ({"train": {"mixed_precision": "fp8"}}, ("'fp8'", "'no', 'bf16' or 'fp16'")),
        ({"train": {"batch_size": 10, "micro_batches": 4}}, ("batch_size=10", "micro_batches=4", "such as 12")),
        ({"train": 3}, ("train=3", "dictionary")),
        ({"seed": -1}, ("seed=-1", "greater than or equal to 0")),
        ({"seed": 2**32}, ("seed=4294967296", "less than 4294967296")),
        ({"optimizer": {"lr": -1}}, ("optimizer.lr=-1", "greater than 0")),
        ({"optimizer": {"name": "adam"}}, ("'adam'", "adan, adamw")),
        ({"optimizer": {"schedule": "cosin"}}, ("'cosin'", "paper, constant, cosine", "did you mean 'cosine'")),
        ({"optimizer": {"betas": [0.9, 0.99]}}, ("adan takes 3 betas", "2 were given")),
        ({"optimizer": {"betas": [0.9, 0.9, 1.0]}}, ("betas=[0.9, 0.9, 1.0]", "from 0 up to")),
        ({"ema": {"decay": 1}}, ("ema.decay=1", "less than 1")),
        ({"samples": {"scheduler": "dimm"}}, ("'dimm'", "ddpm, ddim, dpm++", "did you mean 'ddim'")),
        ({"samples": {"num_inference_steps": 1001}}, ("=1001", "less than or equal to 1000")),
        ({"objective": {"passes": "both"}}, ("'both'", "'full+masked', 'full' or 'masked'")),
        ({"objective": {"masks": {"down": [[0.5, 0.4], [0, 1]]}}}, ("(0.5, 0.4)", "low <= high")),
        ({"objective": {"timesteps": "unifrom"}}, ("'unifrom'", "did you mean 'uniform'")),
        ({"model": {"name": "DTI"}}, ("'DTI'", "EDT")),
        ({"model": 3}, ("model=3", "dictionary")),
        ({"data": {"size": "big"}}, ("data.size='big'", "integer")),
        ({"data": {"size": 0}}, ("data.size=0", "greater than 0")),
    ],
)
def test_bad_values_are_one_line_with_value_and_expectation(tree, words):
    message = complaint({"data": {"size": 8}, **tree})
    for word in words:
        assert word in message
    assert "pydantic" not in message
    assert "constrained" not in message


@pytest.mark.parametrize("override", ["train.steps", "=3", "seed.x=1", "train.steps.x=1"])
def test_bad_overrides_are_quoted(override, yaml_file):
    path = yaml_file(MINIMAL + "seed: 1\ntrain:\n  steps: 2\n")
    with pytest.raises(UserError, match=re.escape(repr(override))):
        load_config(path, [override])


def test_files_that_hold_no_configuration(tmp_path, yaml_file):
    for text, word in (("- 1\n", "no mapping"), ("data: {size: 8\na: [\n", "not valid YAML"), ("1: 2\n", "strings")):
        with pytest.raises(UserError, match=word):
            load_config(yaml_file(text + ("data: {size: 8}\n" if word == "strings" else "")))
    binary = tmp_path / "picture.png"
    binary.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(binary)
    with pytest.raises(UserError, match="the configuration lacks 'data'"):
        load_config(yaml_file(""))


def test_a_misspelt_preset_gets_the_right_one_and_a_folder_the_right_option(tmp_path):
    with pytest.raises(UserError, match=r"'small-23'.*digits, dit-s-256.*small-32.*did you mean 'small-32'"):
        load_config("small-23")
    with pytest.raises(UserError, match="--data"):
        load_config(tmp_path)


def test_the_config_is_a_plain_tree_that_pydantic_round_trips():
    config = load_config("digits")
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_masks_are_those_published_for_the_size():
    pair = ((0.4, 0.5), (0.1, 0.2))
    for size, stage0 in (("S", None), ("B", None), ("XL", (0.15, 0.25)), ("EDT-XL/2", (0.15, 0.25))):
        masks = default_masks({"name": "EDT", "size": size})
        assert (masks.down, masks.stage0) == (pair, stage0)
    assert default_masks({"depths": [1, 1, 1]}).down == pair[:1]
    assert default_masks({"depths": [1] * 7}).down == (*pair, pair[1])


def test_nulls_become_numbers_and_those_of_the_run_that_goes_on_stay():
    config = load_config("digits", ["train.steps=70"])
    assert config.optimizer.decay_steps is None
    first = settled(config)
    assert first.optimizer.decay_steps == 70
    assert first.objective.masks == default_masks(config.model)
    longer = load_config("digits", ["train.steps=90"])
    assert settled(longer, first).optimizer.decay_steps == 70
    assert settled(longer, config).optimizer.decay_steps == 70  # as an older version left it
    own = settled(load_config("digits", ["objective.masks.down=[[0.1, 0.2], [0, 0]]"]))
    assert settled(longer, own).objective.masks == own.objective.masks
    full = settled(load_config("digits", ["objective.passes=full"]), own)
    again = load_config("digits", ["objective.passes=full+masked"])
    assert settled(again, full).objective.masks == own.objective.masks  # they were not in use in between
    explicit = load_config("digits", ["optimizer.decay_steps=5"])
    assert settled(explicit, first).optimizer.decay_steps == 5


def test_a_preset_is_read_from_the_run_it_began(tmp_path):
    assert run_source("digits", tmp_path) == "digits"
    (tmp_path / "config.yaml").write_text("x")
    assert run_source("digits", tmp_path) == "digits"  # nothing saved yet
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    own = str(tmp_path / "config.yaml")
    assert run_source("digits", tmp_path) == own  # an older version did not write which preset it was
    for written, expected in (("digits", own), ("small-32", "digits"), (None, "digits")):
        (tmp_path / "data.json").write_text(json.dumps({"preset": written}))
        assert run_source("digits", tmp_path) == expected
    assert run_source(own, tmp_path / "elsewhere") == own
    assert run_source("digitz", tmp_path) == "digitz"


@pytest.mark.parametrize(
    ("idle", "said", "remedy"),
    [
        ({"ema": {"snapshot_every": 5}}, "ema.snapshot_every=5 does nothing", {"ema": {"power": [0.05]}}),
        (
            {"train": {"spikes": "off", "spike_threshold": 5}},
            "train.spike_threshold=5 does nothing with train.spikes=off",
            {"train": {"spikes": "skip"}},
        ),
        (
            {"train": {"best_mode": "max"}},
            "train.best_mode=max needs train.best_metric",
            {"train": {"best_metric": "a"}},
        ),
        ({"validation": {"every": 5}}, "validation.every=5 does nothing", {"validation": {"share": 0.1}}),
        ({"validation": {"pictures": 5}}, "validation.pictures=5 does nothing", {"validation": {"path": "held"}}),
        ({"validation": {"batch_size": 5}}, "validation.batch_size=5 does nothing", {"validation": {"share": 0.1}}),
        ({"finetune": {"freeze": ["final"]}}, "finetune.freeze needs a trained model", {"finetune": {"model": "a"}}),
        ({"finetune": {"lora": {"rank": 8}}}, "finetune.lora needs a trained model", {"finetune": {"model": "a"}}),
        (
            {"finetune": {"new_classes": "mean"}},
            "finetune.new_classes needs a trained model",
            {"finetune": {"model": "a"}},
        ),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(idle, said, remedy):
    data = {"data": {"path": "pictures", "size": 16}}
    with pytest.raises(UserError, match=re.escape(said)) as told:
        parse_config({**data, **idle})
    assert "\n" not in str(told.value)
    group, values = next(iter(idle.items()))
    config = parse_config({**data, group: {**values, **remedy[group]}})
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


def test_a_saved_configuration_may_name_settings_that_do_nothing_at_their_usual_values():
    told = {"train": {"spikes": "off"}, "finetune": {"model": None}}
    config = parse_config({"data": {"path": "pictures", "size": 16}, **told})
    saved = yaml.safe_load(to_yaml(config))
    assert (saved["train"]["spike_threshold"], saved["validation"]["pictures"]) == (10.0, 512)
    assert parse_config(saved) == config
