"""The configuration of a run: the components' own settings in one tree, read from YAML plus dotted overrides."""

from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .data import DataConfig
from .evaluation.config import EvaluationConfig
from .models import BACKBONES
from .objectives import OBJECTIVES
from .objectives.config import ObjectiveConfig, default_masks, resolved, usual_passes
from .pipelines import SCHEDULERS
from .pipelines.schedulers import fitting_schedulers
from .training.config import OptimizerConfig, TrainConfig
from .training.ema import EMAConfig
from .training.finetune import FinetuneConfig
from .training.record import read_record
from .training.state import CheckpointStore
from .training.validation import ValidationConfig
from .util.errors import UserError
from .util.lookup import lookup, nearest

# Settings that do not change what is trained: the length of the run, how often it saves and tells, and how the same
# sums are spread over memory and processes (these may change the last bits).
_HARMLESS = (
    "train.steps:", "train.log_every:", "train.save_every:", "train.sample_every:", "train.keep_checkpoints:",
    "train.keep_every:", "train.best_metric:", "train.best_mode:", "train.timestep_bins:", "train.trackers:",
    "train.micro_batches:", "train.gradient_checkpointing:", "train.joint_passes:", "train.sharding:",
    "train.deepspeed:", "train.compile:", "samples.", "evaluation.", "validation.every:", "validation.pictures:",
    "validation.batch_size:", "data.workers:", "data.cache:", "data.verify:", "data.codec_batch:",
)  # fmt: skip

# What of `model:` the pictures decide.
_OF_PICTURES = ("num_classes", "sample_size", "in_channels")


class SamplesConfig(BaseModel):
    """Pictures made during training, from fixed seeds (`samples:`).

    Attributes:
        scheduler: null is "ddim", or "euler" for flow matching.
        attention_modulation: "auto" makes them twice, without AMM and with it (the published placement, or one at like
            places: `suggested_modulation` of the backbones); "off" once, without; "saved" once, as the model's
            configuration says.
    """

    model_config = ConfigDict(extra="forbid")

    per_class: int = Field(default=8, ge=1)
    max_classes: int = Field(default=10, ge=1)
    scheduler: str | None = None
    attention_modulation: Literal["auto", "off", "saved"] = "auto"
    num_inference_steps: int = Field(default=25, ge=1, le=1000)
    guidance_scale: float = Field(default=2.0, ge=0)
    decode_batch: int = Field(default=16, ge=1)
    seed: int = 0

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        if name is not None:
            lookup(SCHEDULERS, name, "scheduler")
        return name

    @field_validator("attention_modulation", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads it as a boolean


class RunConfig(BaseModel):
    """Everything that decides a training run; `model` holds a backbone's name, a size, and constructor arguments."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(default=0, ge=0, lt=2**32)
    model: dict[str, Any] = Field(default_factory=lambda: {"name": "EDT", "size": "S"})
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    finetune: FinetuneConfig | None = None
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="after")
    def _can_be_sampled(self) -> "RunConfig":
        fitting = fitting_schedulers(OBJECTIVES[self.objective.name].prediction_type)
        for group, name in (("samples", self.samples.scheduler), ("evaluation", self.evaluation.scheduler)):
            if name is not None and name not in fitting:
                raise UserError(
                    f"{group}.scheduler={name} cannot sample a model trained with objective.name="
                    f"{self.objective.name}: choose {' or '.join(fitting)}, or null for the usual one"
                )
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> "RunConfig":
        if self.ema.snapshot_every is not None and not self.ema.power:
            raise UserError(
                f"ema.snapshot_every={self.ema.snapshot_every} does nothing without averages to keep: name their "
                "widths, as ema.power=[0.05,0.10], or leave it out"
            )
        if self.finetune is not None and self.finetune.model is None and (given := self.finetune.given()):
            raise UserError(
                f"finetune.{given[0]} needs a trained model to start from: name it with --from (finetune.model), or "
                "leave it out"
            )
        return self

    @field_validator("model")
    @classmethod
    def _known_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        model = {"name": "EDT", **model}
        backbone = lookup(BACKBONES, str(model["name"]), "model")
        known = [name for name in signature(backbone.__init__).parameters if name != "self"]
        for key in model:
            if key not in (*known, "name", "size"):
                owners = [name for name, kind in BACKBONES.items() if key in signature(kind.__init__).parameters]
                if owners and key != "self":
                    name = model["name"]
                    raise UserError(
                        f"model.{key} is a setting of {' and '.join(owners)}, not of {name}: leave it out; all of the "
                        f"model is replaced by model='{{name: {name}, size: S}}'"
                    )
                guess = nearest(key, known)
                hint = f" (did you mean 'model.{guess}'?)" if guess else ""
                raise UserError(f"unknown key 'model.{key}' in the configuration{hint}")
        return model


def presets() -> dict[str, str]:
    """Names of the shipped configurations and their texts."""
    folder = files("edt_diffusion") / "presets"
    return {p.name.removesuffix(".yaml"): p.read_text() for p in folder.iterdir() if p.name.endswith(".yaml")}


def load_config(source: str | Path, overrides: list[str] | None = None, other_pictures: bool = False) -> RunConfig:
    """Read a configuration.

    Args:
        source: a YAML file, or the name of a preset.
        overrides: "key.path=value" strings; values are read as YAML.
        other_pictures: leave out what a run's own configuration took from its pictures and its origin.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key (with the nearest right one) or a value out of range.
    """
    path = Path(source)
    try:
        tree = yaml.safe_load(path.read_text("utf-8") if path.is_file() else _preset(str(source))) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping: expected keys such as 'model', 'data' and 'train'")
    tree = {key: value for key, value in tree.items() if value is not None}  # a group with all its keys commented out
    if other_pictures:
        tree.pop("finetune", None)
        tree["model"] = {key: value for key, value in (tree.get("model") or {}).items() if key not in _OF_PICTURES}
    for override in overrides or []:
        _override(tree, override)
    return parse_config(tree)


def _preset(name: str) -> str:
    known = presets()
    if name in known:
        return known[name]
    guess = nearest(name, known)
    hint = f" (did you mean {guess!r}?)" if guess else ""
    if Path(name).is_dir():
        hint = "; a folder of pictures is given by --data"
    raise UserError(f"no configuration {name!r}: expected a YAML file, or a preset ({', '.join(sorted(known))}){hint}")


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """Check a tree of plain values; every problem is a `UserError` of one line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def to_yaml(config: RunConfig) -> str:
    """The configuration, complete, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Lines "key.path: old -> new" of settings that differ."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def run_source(source: str, folder: Path) -> str:
    """Where to read the settings of a run in `folder` that is asked for by `source`.

    A preset may change with the package, a run may not: where the folder holds a run of the same preset, that run's own
    configuration. A file of the user's is always read.
    """
    if Path(source).is_file() or source not in presets() or not _holds_run(folder):
        return source
    return str(folder / "config.yaml") if read_record(folder).get("preset", source) == source else source


def begun_config(folder: Path) -> RunConfig | None:
    """The settings of the run in `folder`; None if it holds none, or one that has saved nothing yet."""
    return settled(load_config(folder / "config.yaml")) if _holds_run(folder) else None


def settled(config: RunConfig, begun: RunConfig | None = None, validated: bool = False) -> RunConfig:
    """Put values for nulls that mean "as the run has it": those of the run that is continued, if there is one.

    Args:
        config: settings as asked for.
        begun: those of the run in the folder.
        validated: whether pictures are held out, on which the best weights can be chosen.
    """
    first = begun or config
    decay_steps = config.optimizer.decay_steps or first.optimizer.decay_steps or first.train.steps
    objective = resolved(config.objective, None if begun is None else begun.objective)
    masks = objective.masks or first.objective.masks or default_masks(config.model)
    passes = objective.passes or first.objective.passes or usual_passes(config.model)
    best = config.train.best_metric or ("val_loss" if validated else _measured(config))
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update={"decay_steps": decay_steps}),
            "objective": objective.model_copy(update={"masks": masks, "passes": passes}),
            "train": config.train.model_copy(update={"best_metric": best}),
        }
    )


def _measured(config: RunConfig) -> str | None:
    """What tells the best weights where nothing is held out: the Fréchet distance, if it is measured."""
    wanted = config.evaluation
    return "fid" if wanted.every and "fid" in (wanted.metrics or ["fid"]) else None


def _holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and bool(CheckpointStore(folder / "checkpoints").steps())


def refuse_changes(begun: RunConfig, config: RunConfig, folder: Path) -> None:
    """Refuse to go on with other settings than the run in `folder` began with.

    Raises:
        UserError: a setting differs that decides what is trained.
    """
    changed = [line for line in differences(begun, config) if not line.startswith(_HARMLESS)]
    if changed:
        listed = "; ".join([*changed[:4], *(["..."] if len(changed) > 4 else [])])
        raise UserError(
            f"{folder} holds a run with other settings ({listed}): "
            "choose another --out, or go on all the same with --allow-changes"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key.path=value, such as train.steps=1000")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent!r} is a value, not a group of settings")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        node[last] = value


def _explain(error: ValidationError) -> str:
    """One line about the first problem: where, what was given, what was expected."""
    problems = error.errors()
    first = problems[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
        return str(cause)
    location, siblings = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        guess = nearest(str(first["loc"][-1]), siblings)
        hint = f" (did you mean '{'.'.join([*location.split('.')[:-1], guess])}'?)" if guess else ""
        return f"unknown key '{location}' in the configuration{hint}"
    if first["type"] == "missing":
        return f"the configuration lacks '{location}'"
    # A value of several possible types has a problem with each.
    reasons = dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in problems if _place(p["loc"])[0] == location)
    given = "" if isinstance(first.get("input"), dict) else f"={first.get('input')!r}"
    return f"{location}{given} in the configuration: {', or '.join(reasons).replace('Input should', 'it should')}"


def _place(loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """Dotted path of a problem without pydantic's names of types, and the keys that exist beside its last part."""
    model: Any = RunConfig
    parts, siblings = [], []
    for part in loc:
        siblings = list(getattr(model, "model_fields", {}))
        if siblings or isinstance(part, int):
            parts.append(str(part))
        annotation = model.model_fields[part].annotation if part in siblings else None
        # Of a group that may be null, the group.
        model = next((kind for kind in get_args(annotation) if hasattr(kind, "model_fields")), annotation)
    return ".".join(parts), siblings
