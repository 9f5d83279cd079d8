"""Settings of the training objective (`objective:` in a configuration), and how they become one."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..models import BACKBONES
from ..models.masking import MaskPlan
from ..util.errors import UserError
from ..util.lookup import lookup
from . import LOSS_WEIGHTINGS, OBJECTIVES, TIMESTEP_SAMPLERS
from .masked import MaskedTraining

Share = tuple[float, float]


class MaskConfig(BaseModel):
    """Shares of hidden tokens as (low, high), by default the authors' for S and B. XL adds stage0 (0.15, 0.25).

    `input` is the share left out at the input, as MDTv2 is trained (0.3, 0.5); for EDT it needs
    `model.side_interpolater: true`. Where it is given alone, `down` is empty.
    """

    model_config = ConfigDict(extra="forbid")

    down: tuple[Share, ...] = ((0.4, 0.5), (0.1, 0.2))
    stage0: Share | None = None
    input: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, value: Any) -> Any:
        """Who names a share of the input alone means no other mask."""
        if isinstance(value, dict) and value.get("input") is not None and "down" not in value:
            return {**value, "down": ()}
        return value

    @model_validator(mode="after")
    def _in_range(self) -> "MaskConfig":
        self.plan()
        return self

    def plan(self) -> MaskPlan:
        """The same as a `MaskPlan`."""
        return MaskPlan(self.down, self.stage0, self.input)


# What each timestep sampler that has settings is told: its argument, and the value if none is given.
_SAMPLER_SETTINGS: dict[str, dict[str, tuple[str, float]]] = {
    "logit_normal": {"logit_mean": ("mean", 0.0), "logit_std": ("std", 1.0)},
    "shifted": {"shift": ("shift", 3.0)},
}
_WEIGHT_SETTINGS: dict[str, dict[str, float]] = {"p2": {"p2_k": 1.0, "p2_gamma": 1.0}}


class ObjectiveConfig(BaseModel):
    """The loss, how timesteps are drawn, and which passes make a step.

    `name` is "learned_variance" (the network predicts the noise), "v_prediction" or "flow" (a velocity, at continuous
    time; needs `model.learn_sigma: false`). A null means what is usual for the objective: `loss_weighting` "min_snr"
    for the first two and "none" for flow, `timesteps` "loss_second_moment" for the first two and "logit_normal" for
    flow. `logit_mean`, `logit_std` belong to timesteps "logit_normal", `shift` to "shifted" (both for flow only),
    `p2_k`, `p2_gamma` to loss_weighting "p2". `masks: null` means those published for the model. `passes` is
    "full+masked" (EDT, MDTv2), "full" (DiT; EDT*, without masked training) or "masked"; null is what is usual for the
    model.

    DiT's plain loss, the error of the noise plus the variational bound at uniform timesteps, is
    `{loss_weighting: none, timesteps: uniform, passes: full}`.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = "learned_variance"
    loss_weighting: str | None = None
    min_snr_gamma: float = Field(default=5.0, gt=0)
    p2_k: float | None = Field(default=None, gt=0)
    p2_gamma: float | None = Field(default=None, ge=0)
    vb_weight: float = Field(default=1.0, ge=0)
    timesteps: str | None = None
    logit_mean: float | None = Field(default=None, allow_inf_nan=False)
    logit_std: float | None = Field(default=None, gt=0)
    shift: float | None = Field(default=None, gt=0)
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    passes: Literal["full+masked", "full", "masked"] | None = None
    masks: MaskConfig | None = None
    train_with_amm: bool = False

    @model_validator(mode="after")
    def _known(self) -> "ObjectiveConfig":
        choice = lookup(OBJECTIVES, self.name, "objective")
        weighting, timesteps = _usual(self)
        lookup(LOSS_WEIGHTINGS, weighting, "loss weighting")
        lookup(TIMESTEP_SAMPLERS, timesteps, "timestep sampler")
        if timesteps in _SAMPLER_SETTINGS and not choice.continuous:
            fitting = [name for name in TIMESTEP_SAMPLERS if name not in _SAMPLER_SETTINGS]
            raise UserError(
                f"objective.timesteps={timesteps} is for continuous time (objective.name=flow), and {self.name} has "
                f"discrete steps: choose {' or '.join(fitting)}"
            )
        self._refuse_idle("timesteps", timesteps, _SAMPLER_SETTINGS)
        self._refuse_idle("loss_weighting", weighting, _WEIGHT_SETTINGS)
        if self.min_snr_gamma != 5.0 and weighting != "min_snr":
            raise UserError(
                f"objective.min_snr_gamma={self.min_snr_gamma:g} has no effect with loss_weighting={weighting}: leave "
                "it out, or choose loss_weighting=min_snr"
            )
        if self.vb_weight != 1.0 and choice.continuous:
            raise UserError(
                f"objective.vb_weight={self.vb_weight:g} has no effect on {self.name}, which learns no variance: leave "
                "it out"
            )
        return self

    def _refuse_idle(self, field: str, chosen: str, table: Mapping[str, Mapping[str, Any]]) -> None:
        for owner, settings in table.items():
            for setting in settings:
                if owner != chosen and getattr(self, setting) is not None:
                    raise UserError(
                        f"objective.{setting}={getattr(self, setting):g} has no effect with {field}={chosen}: leave it "
                        f"out, or choose {field}={owner}"
                    )


def _usual(config: ObjectiveConfig) -> tuple[str, str]:
    """The loss weighting and the timestep sampler in use."""
    choice = OBJECTIVES[config.name]
    return config.loss_weighting or choice.loss_weighting, config.timesteps or choice.timesteps


def resolved(config: ObjectiveConfig, begun: ObjectiveConfig | None = None) -> ObjectiveConfig:
    """Put values for every null but `masks` and `passes`, so that a saved run does not change with what is usual.

    Args:
        config: the settings asked for.
        begun: settings of the run that is continued, if there is one; where they are of the same objective, a null
            means what they say.

    Returns:
        Settings in which only `masks`, `passes` and settings without effect may be null.
    """
    update: dict[str, Any] = {}
    if begun is not None and begun.name == config.name:
        update = {
            name: getattr(begun, name) for name in ("loss_weighting", "timesteps") if getattr(config, name) is None
        }
    known = config.model_copy(update=update)
    weighting, timesteps = _usual(known)
    usual: dict[str, Any] = dict(_WEIGHT_SETTINGS.get(weighting, {}))
    usual |= {name: value for name, (_, value) in _SAMPLER_SETTINGS.get(timesteps, {}).items()}
    for name, value in usual.items():
        if getattr(config, name) is None:
            before = None if begun is None else getattr(begun, name)
            update[name] = value if before is None else before
    return config.model_copy(update={**update, "loss_weighting": weighting, "timesteps": timesteps})


def default_masks(model: Mapping[str, Any]) -> MaskConfig:
    """The masks published for what `model:` of a configuration names (EDT-S's for other layouts of EDT)."""
    plan = lookup(BACKBONES, str(model.get("name") or "EDT"), "model").published_masks(model)
    return MaskConfig(down=plan.down, stage0=plan.stage0, input=plan.input)


def usual_passes(model: Mapping[str, Any]) -> Literal["full+masked", "full", "masked"]:
    """The passes of a training step that are usual for what `model:` of a configuration names."""
    return lookup(BACKBONES, str(model.get("name") or "EDT"), "model").usual_passes


def build_objective(config: ObjectiveConfig, learn_sigma: bool, joint: bool = False) -> MaskedTraining:
    """The callable that turns a batch into the loss of a training step.

    Args:
        config: the settings; nulls mean what is usual.
        learn_sigma: whether the model predicts the variance.
        joint: run both passes as one batch, see `MaskedTraining`.

    Raises:
        UserError: the objective needs a model without learned variance, and this one has it.
    """
    config = resolved(config)
    assert config.loss_weighting is not None
    assert config.timesteps is not None
    passes = config.passes or "full+masked"
    choice = OBJECTIVES[config.name]
    weights = {name: getattr(config, name) for name in _WEIGHT_SETTINGS.get(config.loss_weighting, {})}
    own = {} if choice.continuous else {"vb_weight": config.vb_weight}
    objective = choice.make(
        loss_weighting=config.loss_weighting,
        min_snr_gamma=config.min_snr_gamma,
        learn_sigma=learn_sigma,
        **weights,
        **own,
    )
    if config.timesteps in _SAMPLER_SETTINGS:
        settings = _SAMPLER_SETTINGS[config.timesteps]
        sampling = {argument: getattr(config, name) for name, (argument, _) in settings.items()}
    else:
        sampling = {"continuous": choice.continuous}
    return MaskedTraining(
        objective,
        TIMESTEP_SAMPLERS[config.timesteps](objective.num_train_timesteps, **sampling),
        (config.masks or MaskConfig()).plan() if passes != "full" else None,
        label_dropout=config.label_dropout,
        passes=passes,
        train_with_amm=config.train_with_amm,
        joint=joint,
    )
