"""Scheduler, steps and feature cache chosen together, from most faithful to fastest.

The choices were measured on a class-conditional model of CIFAR-10 (`benchmarks/acceleration.py`): Fréchet distance to
real pictures against time, 250 steps of ancestral sampling being the measure of both.
"""

from dataclasses import dataclass

from ..util.lookup import lookup


@dataclass(frozen=True)
class Acceleration:
    """How to sample.

    Attributes:
        scheduler: its name.
        steps: number of steps.
        cache: a feature cache as `caching.parse_cache` takes it.
    """

    scheduler: str
    steps: int
    cache: str = "none"


# For models that predict noise or v, and for flow models.
ACCELERATIONS: dict[str, dict[str, Acceleration]] = {
    "exact": {"stepped": Acceleration("ddpm", 250), "flow": Acceleration("heun", 50)},
    "balanced": {"stepped": Acceleration("dpm++sde", 25), "flow": Acceleration("dpm++", 25)},
    "fast": {"stepped": Acceleration("dpm++sde", 25, "confident"), "flow": Acceleration("dpm++", 20, "confident")},
}


def choose_acceleration(name: str, prediction_type: str) -> Acceleration:
    """The choice called `name` for a model that predicts `prediction_type`.

    Raises:
        UserError: an unknown name.
    """
    return lookup(ACCELERATIONS, name, "acceleration")["flow" if prediction_type == "flow" else "stepped"]
