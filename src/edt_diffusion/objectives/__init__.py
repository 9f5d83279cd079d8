"""Training objectives: losses, how timesteps are drawn, and EDT's masked training step around them.

A new objective is one file here plus one line in `OBJECTIVES`.
"""

from .learned_variance import LearnedVarianceObjective, LossTerms
from .masked import MaskedTraining, Objective, PassDraws, StepDraws, StepLoss
from .timesteps import LossSecondMomentTimesteps, TimestepSampler, UniformTimesteps

OBJECTIVES = {
    "learned_variance": LearnedVarianceObjective,
}

TIMESTEP_SAMPLERS = {
    "uniform": UniformTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}

__all__ = [
    "OBJECTIVES",
    "TIMESTEP_SAMPLERS",
    "LearnedVarianceObjective",
    "LossSecondMomentTimesteps",
    "LossTerms",
    "MaskedTraining",
    "Objective",
    "PassDraws",
    "StepDraws",
    "StepLoss",
    "TimestepSampler",
    "UniformTimesteps",
]
