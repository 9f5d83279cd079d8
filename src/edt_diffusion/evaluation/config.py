"""The settings of evaluation during a training run (`evaluation:` in a configuration)."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..pipelines import SCHEDULERS
from ..sampling.labels import POLICIES
from ..util.errors import UserError
from ..util.lookup import lookup
from .measure import choose_metrics


class EvaluationConfig(BaseModel):
    """Metrics of samples now and then while a run trains, by the code of `edt evaluate`.

    Attributes:
        every: steps between evaluations; 0 is never.
        samples: how many are made, from the same seeds and labels every time.
        reference: real pictures or an `.npz` of statistics; null takes those that are trained on.
        extractor: as `edt evaluate --extractor`.
        metrics: names; null takes the usual ones that are possible.
        labels: which classes are sampled; see `sampling.labels.choose_labels`.
        guidance, scheduler, num_inference_steps, amm: how samples are made; see `sampling.settings.SamplingSetting`.
        batch_size: pictures computed at once on each process; null is 64, and 16 where an autoencoder decodes them.
        seed: of the samples.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    every: int = Field(default=0, ge=0)
    samples: int = Field(default=1000, ge=2)
    reference: str | None = None
    extractor: str = "inception"
    metrics: list[str] | None = None
    labels: str = "auto"
    guidance: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    scheduler: str | None = None
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    amm: str = "off"
    batch_size: int | None = Field(default=None, ge=1)
    seed: int = 0

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: list[str] | None) -> list[str] | None:
        return choose_metrics(",".join(names)) if names else None

    @field_validator("scheduler")
    @classmethod
    def _known_scheduler(cls, name: str | None) -> str | None:
        if name is not None:
            lookup(SCHEDULERS, name, "scheduler")
        return name

    @field_validator("labels")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        if name not in POLICIES:
            raise UserError(f"evaluation.labels={name!r}: expected {', '.join(POLICIES)}")
        return name

    @field_validator("amm", mode="before")
    @classmethod
    def _switches_are_words(cls, value: Any) -> Any:
        return {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value  # as YAML reads them

    @model_validator(mode="after")
    def _nothing_idle(self) -> "EvaluationConfig":
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if not self.every and value != field.default:  # a saved configuration names all
                raise UserError(
                    f"evaluation.{name}={value} does nothing without evaluations: say how often by evaluation.every, "
                    "or leave it out (evaluation={} leaves out all that a run's own configuration has)"
                )
        return self
