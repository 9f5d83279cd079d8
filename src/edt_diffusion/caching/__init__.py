"""Feature caches: what the network computed in one step of a sampling, reused in later ones.

`feature_cache` puts one of `CACHES` around one sampling. All keep three promises: the same input twice gives the same
output as full computation; a setting that never skips changes no bit; nothing is left when the sampling ends.
"""

from .choices import CACHES, CacheChoice, parse_cache
from .enable import feature_cache, reset
from .magnitudes import Magnitudes, calibrate_magnitudes
from .settings import CacheSetting, Option

__all__ = [
    "CACHES",
    "CacheChoice",
    "CacheSetting",
    "Magnitudes",
    "Option",
    "calibrate_magnitudes",
    "feature_cache",
    "parse_cache",
    "reset",
]
