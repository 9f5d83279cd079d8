"""Generation: the diffusers pipeline, guidance, and samplers by name."""

from .class_conditional import ClassConditionalOutput, ClassConditionalPipeline
from .schedulers import SCHEDULERS, RespacedDDIMScheduler, default_scheduler, fitting_schedulers, make_scheduler

__all__ = [
    "SCHEDULERS",
    "ClassConditionalOutput",
    "ClassConditionalPipeline",
    "RespacedDDIMScheduler",
    "default_scheduler",
    "fitting_schedulers",
    "make_scheduler",
]
