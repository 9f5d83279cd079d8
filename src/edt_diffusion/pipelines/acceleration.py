"""Scheduler, steps and feature cache chosen together, from most faithful to fastest.

Those for models that predict noise or v were measured on a class-conditional model of CIFAR-10
(`benchmarks/acceleration.py`): Fréchet distance to real pictures against time, 250 steps of ancestral sampling being
the measure of both. No cache was as good as leaving out steps there. Those for flow models are usual numbers, not
measured.
"""

from dataclasses import dataclass

from ..caching import CACHES, parse_cache
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

    def cache_for(self, doubled: bool) -> str:
        """The cache; none where it needs both halves of guidance in one batch (`doubled`) and they are not."""
        setting = parse_cache(self.cache)
        return "none" if setting and CACHES[setting.name].joint_guidance_only and not doubled else self.cache


# For models that predict noise or v, and for flow models.
ACCELERATIONS: dict[str, dict[str, Acceleration]] = {
    "exact": {"stepped": Acceleration("ddpm", 250), "flow": Acceleration("heun", 50)},
    "balanced": {"stepped": Acceleration("ddpm", 25), "flow": Acceleration("heun", 25)},
    "fast": {"stepped": Acceleration("ddim", 18), "flow": Acceleration("dpm++", 20)},
}


def choose_acceleration(name: str, prediction_type: str) -> Acceleration:
    """The choice called `name` for a model that predicts `prediction_type`.

    Raises:
        UserError: an unknown name.
    """
    return lookup(ACCELERATIONS, name, "acceleration")["flow" if prediction_type == "flow" else "stepped"]
