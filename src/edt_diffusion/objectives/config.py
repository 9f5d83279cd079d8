"""Settings of the training objective (`objective:` in a configuration), and how they become one."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..models.edt import SIZE_MASKS, SIZES
from ..models.masking import MaskPlan
from ..util.lookup import lookup
from . import OBJECTIVES, TIMESTEP_SAMPLERS
from .masked import MaskedTraining

Share = tuple[float, float]


class MaskConfig(BaseModel):
    """Shares of hidden tokens as (low, high), by default the authors' for S and B. XL adds stage0 (0.15, 0.25)."""

    model_config = ConfigDict(extra="forbid")

    down: tuple[Share, ...] = ((0.4, 0.5), (0.1, 0.2))
    stage0: Share | None = None

    @model_validator(mode="after")
    def _in_range(self) -> "MaskConfig":
        MaskPlan(self.down, self.stage0)
        return self


class ObjectiveConfig(BaseModel):
    """The loss, how timesteps are drawn, and which passes make a step.

    `masks: null` means those published for the model's size. `passes` is "full+masked" (EDT), "full" (EDT*, without
    masked training) or "masked".
    """

    model_config = ConfigDict(extra="forbid")

    name: str = "learned_variance"
    loss_weighting: Literal["min_snr", "none"] = "min_snr"
    min_snr_gamma: float = Field(default=5.0, gt=0)
    vb_weight: float = Field(default=1.0, ge=0)
    timesteps: str = "loss_second_moment"
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    passes: Literal["full+masked", "full", "masked"] = "full+masked"
    masks: MaskConfig | None = None
    train_with_amm: bool = False

    @model_validator(mode="after")
    def _known(self) -> "ObjectiveConfig":
        lookup(OBJECTIVES, self.name, "objective")
        lookup(TIMESTEP_SAMPLERS, self.timesteps, "timestep sampler")
        return self


def default_masks(model: Mapping[str, Any]) -> MaskConfig:
    """The masks published for the size that `model:` of a configuration names (S's for other layouts).

    Down-sampling modules beyond the second get the second one's range.
    """
    name = str(model.get("size") or "S").upper().removeprefix("EDT-").removesuffix("/2")
    published = SIZE_MASKS.get(name, SIZE_MASKS["S"])
    depths = model.get("depths") or SIZES.get(name, SIZES["S"])["depths"]
    down = [*published["down"], *[published["down"][-1]] * len(depths)][: len(depths) // 2]
    return MaskConfig(down=tuple(down), stage0=published["stage0"])


def build_objective(config: ObjectiveConfig, learn_sigma: bool) -> MaskedTraining:
    """The callable that turns a batch into the loss of a training step."""
    masks = config.masks or MaskConfig()
    objective = OBJECTIVES[config.name](
        loss_weighting=config.loss_weighting,
        min_snr_gamma=config.min_snr_gamma,
        learn_sigma=learn_sigma,
        vb_weight=config.vb_weight,
    )
    return MaskedTraining(
        objective,
        TIMESTEP_SAMPLERS[config.timesteps](objective.num_train_timesteps),
        MaskPlan(masks.down, masks.stage0) if config.passes != "full" else None,
        label_dropout=config.label_dropout,
        passes=config.passes,
        train_with_amm=config.train_with_amm,
    )
