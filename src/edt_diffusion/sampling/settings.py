"""How samples are made: one point of a sweep, and the sweep itself."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..caching import parse_cache
from ..pipelines import SCHEDULERS
from ..pipelines.guidance import parse_schedule, schedule_word
from ..pipelines.precision import PRECISIONS
from ..util.errors import UserError
from ..util.lookup import lookup, nearest


class SamplingSetting(BaseModel):
    """Everything beside the model, the labels and the seeds that decides how a sample looks.

    Attributes:
        guidance: scale of classifier-free guidance; 1 is off.
        guidance_schedule: how it changes over the steps, as `pipelines.guidance.parse_schedule` takes it.
        channels: "all", or "authors" for guidance of the first three channels.
        scheduler: a name of `pipelines.SCHEDULERS`; None is the pipeline's own.
        steps: None is the scheduler's usual number.
        amm: attention modulation, as `pipelines.modulation.choose_modulation` takes it.
        precision: a name of `pipelines.precision.PRECISIONS`, of the network; the autoencoder works in float32.
        cache: feature cache, as `caching.parse_cache` takes it; "none" is off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    guidance: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    guidance_schedule: str = "constant"
    channels: Literal["all", "authors"] = "all"
    scheduler: str | None = None
    steps: int | None = Field(default=None, ge=1)
    amm: str = "saved"
    precision: str = "fp32"
    cache: str = "none"

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        if name is not None:
            lookup(SCHEDULERS, name, "scheduler")
        return name

    @field_validator("precision")
    @classmethod
    def _known_precision(cls, name: str) -> str:
        lookup(PRECISIONS, name, "precision")
        return name

    @field_validator("guidance_schedule")
    @classmethod
    def _known_schedule(cls, word: str) -> str:
        return schedule_word(parse_schedule(word))

    @field_validator("cache")
    @classmethod
    def _known_cache(cls, word: str) -> str:
        setting = parse_cache(word.replace("+", ","))
        return "none" if setting is None else str(setting)

    @staticmethod
    def shown(axis: str, value: Any) -> str:
        """One field as labels write it, such as "guidance=2"."""
        return f"{axis}={_text(value)}"

    def label(self) -> str:
        """A short name such as "guidance=2 amm=on steps=20": guidance, AMM, and what differs from the defaults."""
        default = SamplingSetting()
        others = [name for name in type(self).model_fields if getattr(self, name) != getattr(default, name)]
        shown = dict.fromkeys(["guidance", "amm", *others])
        return " ".join(f"{name}={_text(getattr(self, name))}" for name in shown)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)  # names of different settings differ


def parse_sweep(words: Sequence[str], base: Mapping[str, Any]) -> tuple[list[SamplingSetting], list[str]]:
    """Every combination of the values that a sweep names.

    Args:
        words: such as ["guidance=1,1.5,2", "amm=off,on"]; what belongs to one value is joined by "+": blocks of
            attention modulation, settings of a cache ("cache=none,taylor:interval=4+order=2").
        base: fields of `SamplingSetting` for what the sweep does not vary.

    Returns:
        The settings, the last axis varying fastest, and the names of the axes.

    Raises:
        UserError: a word of another form, an unknown field (with the nearest one), a field named twice, or a value out
            of range.
    """
    axes: dict[str, list[str]] = {}
    known = SamplingSetting.model_fields
    for word in words:
        name, sign, values = word.partition("=")
        if not sign or not values.strip(","):
            raise UserError(f"{word!r} is no axis of a sweep: expected such as guidance=1,1.5,2")
        if name not in known:
            guess = nearest(name, known)
            hint = f" (did you mean {guess!r}?)" if guess else ""
            raise UserError(f"unknown axis {name!r} of a sweep: expected one of {', '.join(known)}{hint}")
        if name in axes:
            raise UserError(f"the axis {name!r} of the sweep is given twice: join its values by commas")
        axes[name] = list(dict.fromkeys(value.strip() for value in values.split(",") if value.strip()))
    combinations = itertools.product(*axes.values())
    settings = [parse_setting({**base, **dict(zip(axes, values, strict=True))}) for values in combinations]
    return list(dict.fromkeys(settings)), list(axes)


def parse_setting(fields: Mapping[str, Any]) -> SamplingSetting:
    """Check plain values or words; every problem is a `UserError` of one line."""
    for name in ("scheduler", "steps"):
        if fields.get(name) in ("none", "None", "default"):
            fields = {**fields, name: None}
    try:
        return SamplingSetting.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
            raise cause from None
        name = str(first["loc"][0]) if first["loc"] else "setting"
        raise UserError(f"{name}={first['input']}: {_expectation(name)}") from None


def _expectation(name: str) -> str:
    field = SamplingSetting.model_fields.get(name)
    words = get_args(field.annotation) if field is not None else ()
    if words and all(isinstance(word, str) for word in words):
        return f"expected {' or '.join(words)}"
    return {
        "guidance": "expected a finite number of 0 or more (1 is off)",
        "steps": "expected an integer of 1 or more",
    }.get(name, "expected another value")
