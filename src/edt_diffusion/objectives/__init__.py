"""Training objectives: losses, how timesteps are drawn, and EDT's masked training step around them.

A new objective is one file here plus one line in `OBJECTIVES`; a new way to draw timesteps, or a new weighting of the
loss, one line in `TIMESTEP_SAMPLERS` or `LOSS_WEIGHTINGS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .continuous import DensityTimesteps, LogitNormal, Shifted, logit_normal_timesteps, shifted_timesteps
from .draws import HostDrawer, HostDraws, HostPass, PassDraws, StepDraws
from .flow import FlowMatchingObjective
from .learned_variance import LearnedVarianceObjective
from .loss_weights import LOSS_WEIGHTINGS, LossWeighting
from .masked import MaskedTraining
from .second_moment import LossSecondMomentTimesteps
from .terms import LossTerms, Objective, StepLoss
from .timesteps import TimestepSampler, UniformTimesteps


@dataclass(frozen=True)
class ObjectiveChoice:
    """An objective by name.

    Attributes:
        make: the factory; all take `loss_weighting`, `min_snr_gamma`, `p2_k`, `p2_gamma` and `learn_sigma`, those of
            discrete processes also `vb_weight`.
        prediction_type: what samplers must be told, "epsilon", "v_prediction" or "flow" (`pipelines.make_scheduler`).
        continuous: whether time is continuous.
        loss_weighting: the usual weighting.
        timesteps: the usual timestep sampler.
    """

    make: Callable[..., Any]
    prediction_type: str
    continuous: bool
    loss_weighting: str
    timesteps: str


OBJECTIVES: dict[str, ObjectiveChoice] = {
    "learned_variance": ObjectiveChoice(
        LearnedVarianceObjective, "epsilon", False, loss_weighting="min_snr", timesteps="loss_second_moment"
    ),
    "v_prediction": ObjectiveChoice(
        partial(LearnedVarianceObjective, prediction_type="v_prediction"),
        "v_prediction",
        False,
        loss_weighting="min_snr",
        timesteps="loss_second_moment",
    ),
    "flow": ObjectiveChoice(FlowMatchingObjective, "flow", True, loss_weighting="none", timesteps="logit_normal"),
}

# Factories that take the number of timesteps. The first two also take `continuous`, the others are for continuous time.
TIMESTEP_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    "uniform": UniformTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
    "logit_normal": logit_normal_timesteps,
    "shifted": shifted_timesteps,
}

__all__ = [
    "LOSS_WEIGHTINGS",
    "OBJECTIVES",
    "TIMESTEP_SAMPLERS",
    "DensityTimesteps",
    "FlowMatchingObjective",
    "HostDrawer",
    "HostDraws",
    "HostPass",
    "LearnedVarianceObjective",
    "LogitNormal",
    "LossSecondMomentTimesteps",
    "LossTerms",
    "LossWeighting",
    "MaskedTraining",
    "Objective",
    "ObjectiveChoice",
    "PassDraws",
    "Shifted",
    "StepDraws",
    "StepLoss",
    "TimestepSampler",
    "UniformTimesteps",
]
