"""The configuration of a run: the components' own settings in one tree, read from YAML plus dotted overrides."""

from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .data import DataConfig
from .models import BACKBONES
from .objectives.config import ObjectiveConfig
from .training.config import EMAConfig, OptimizerConfig
from .training.trainer import TrainConfig
from .util.errors import UserError
from .util.lookup import lookup, nearest


class SamplesConfig(BaseModel):
    """Pictures made during training, from fixed seeds (`samples:`)."""

    model_config = ConfigDict(extra="forbid")

    per_class: int = Field(8, ge=1)
    max_classes: int = Field(10, ge=1)
    scheduler: str = "ddim"
    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float = Field(2.0, ge=0)
    seed: int = 0


class RunConfig(BaseModel):
    """Everything that decides a training run; `model` holds a backbone's name, a size, and constructor arguments."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 0
    model: dict[str, Any] = Field(default_factory=lambda: {"name": "EDT", "size": "S"})
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    train: TrainConfig = TrainConfig()  # pyright: ignore[reportCallIssue]
    samples: SamplesConfig = SamplesConfig()  # pyright: ignore[reportCallIssue]

    @field_validator("model")
    @classmethod
    def _known_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        backbone = lookup(BACKBONES, str(model.get("name", "EDT")), "model")
        known = [name for name in signature(backbone.__init__).parameters if name != "self"]
        for key in model:
            if key not in (*known, "name", "size"):
                guess = nearest(key, known)
                raise UserError(f"unknown key 'model.{key}'" + (f" (did you mean 'model.{guess}'?)" if guess else ""))
        return model


def presets() -> dict[str, str]:
    """Names of the shipped configurations and their texts."""
    folder = files("edt_diffusion") / "presets"
    return {p.name.removesuffix(".yaml"): p.read_text() for p in folder.iterdir() if p.name.endswith(".yaml")}


def load_config(source: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a configuration.

    Args:
        source: a YAML file, or the name of a preset.
        overrides: "key.path=value" strings; values are read as YAML.

    Raises:
        UserError: for a missing file, bad YAML, an unknown key (with the nearest right one) or a value out of range.
    """
    path = Path(source)
    if path.is_file():
        text = path.read_text()
    elif (text := presets().get(str(source), "")) == "":
        raise UserError(f"no configuration {str(source)!r}: expected a YAML file, or a preset ({', '.join(sorted(presets()))})")
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no mapping: expected keys such as 'model', 'data' and 'train'")
    for override in overrides or []:
        _override(tree, override)
    return parse_config(tree)


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
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent!r} is a value, not a group of settings")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        node[last] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
        return str(cause)
    if first["type"] == "extra_forbidden":
        model: Any = RunConfig
        for part in first["loc"][:-1]:
            model = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        guess = nearest(str(first["loc"][-1]), getattr(model, "model_fields", {}))
        prefix = ".".join(str(part) for part in first["loc"][:-1])
        hint = f" (did you mean '{prefix + '.' if prefix else ''}{guess}'?)" if guess else ""
        return f"unknown key '{location}' in the configuration{hint}"
    if first["type"] == "missing":
        return f"the configuration lacks '{location}'"
    return f"{location}={first.get('input')!r} in the configuration: {first['msg'].removeprefix('Value error, ')}"
