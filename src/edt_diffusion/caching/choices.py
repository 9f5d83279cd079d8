"""The table of feature caches: names, options, defaults."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..util.errors import UserError
from ..util.lookup import lookup
from .settings import CacheSetting, Option, Value


def _installer(place: str) -> Callable[[Any], None]:
    """The function "module.name" of this package, imported when it is called: see `diffusers_hooks`."""
    module, name = place.split(".")
    return lambda site: getattr(import_module(f".{module}", __package__), name)(site)


@dataclass(frozen=True)
class CacheChoice:
    """A cache by name.

    Attributes:
        install: puts its hooks into a `site.Site`.
        options: what can be set.
        text: one line for a user.
        batch_decides: what is skipped depends on the values of the whole batch, so a picture depends on the others
            made with it; caches without it skip by step and timestep alone.
        joint_guidance_only: needs both halves of guidance in one batch.
    """

    install: Callable[[Any], None]
    options: dict[str, Option]
    text: str
    batch_decides: bool = False
    joint_guidance_only: bool = False

    def with_defaults(self, setting: CacheSetting) -> dict[str, Value]:
        """Every option's value."""
        return {name: option.default for name, option in self.options.items()} | dict(setting.options)


_INTERVAL = "full computation in every n-th step"
_LAST = "final steps computed in full"

# Lengths of the residual of all blocks at `magnitudes.timesteps_of_points`, measured on one model: EDT in pixel space,
# 7.7 million parameters, trained on CIFAR-10. Other models have others.
_MAGNITUDES = (17.4, 15.3, 19.9, 28.1, 36.3, 42.8, 47.6, 50.5, 51.8, 52.4, 52.5)
_WHOSE_MAGNITUDES = (
    "lengths of the residual, from calibrate_magnitudes; the default is of one small CIFAR-10 model (EDT, 32 px), so "
    "measure those of yours"
)

CACHES: dict[str, CacheChoice] = {
    "first-block": CacheChoice(
        _installer("residuals.install_first_block"),
        {"threshold": Option(0.1, "relative change of the first block's residual up to which the rest is reused")},
        "reuses what the blocks after the first added while the first adds nearly the same",
        batch_decides=True,
    ),
    "mag": CacheChoice(
        _installer("residuals.install_mag"),
        {
            "threshold": Option(0.1, "accumulated change of the residual's length up to which it is reused"),
            "max_skip": Option(1, "steps skipped in a row"),
            "retain": Option(0.3, "share of first steps computed in full", high=1.0),
            "magnitudes": Option(_MAGNITUDES, _WHOSE_MAGNITUDES, low=1e-6),
        },
        "reuses what all blocks added while its length, measured beforehand, changes little (MagCache)",
    ),
    "taylor": CacheChoice(
        _installer("taylor.install_taylor"),
        {
            "interval": Option(2, _INTERVAL, low=1),
            "order": Option(1, "degree of the extrapolation", high=8),
            "warmup": Option(3, "first steps computed in full", low=1),
            "last": Option(0, _LAST),
        },
        "extrapolates the outputs of attention and MLPs (TaylorSeer)",
    ),
    "fora": CacheChoice(
        _installer("taylor.install_taylor"),
        {"interval": Option(2, _INTERVAL, low=1), "last": Option(0, _LAST)},
        "reuses the outputs of attention and MLPs (FORA)",
    ),
    "pab": CacheChoice(
        _installer("attention.install_pyramid"),
        {
            "interval": Option(2, _INTERVAL, low=1),
            "from": Option(100, "attention is reused above this timestep", low=-1),
            "to": Option(800, "and below this one"),
        },
        "reuses the outputs of attention alone (PyramidAttentionBroadcast)",
    ),
    "faster": CacheChoice(
        _installer("attention.install_faster"),
        {
            "uncond": Option(3, "the unconditional half is computed in every n-th step", low=1),
            "interval": Option(1, "and attention in every n-th of the others", low=1),
            "to": Option(700, "below this timestep"),
            "low": Option(1.0, "weight of low frequencies of the difference of the halves, anew in each step"),
            "high": Option(1.0, "weight of high frequencies"),
            "weight": Option(0.5, "weight of the extrapolation of attention"),
        },
        "leaves out the unconditional half of guidance in most steps (FasterCache)",
        joint_guidance_only=True,
    ),
    "delta": CacheChoice(
        _installer("delta.install_delta"),
        {
            "interval": Option(2, _INTERVAL, low=1),
            "order": Option(1, "degree of the extrapolation; 0 reuses, as in the paper", high=8),
            "warmup": Option(3, "first steps computed in full", low=1),
            "range": Option("u", "u: the middle; stages: the last stage, later the first", words=("u", "stages")),
            "edge": Option(0, "blocks outside the range at either end, with range=u"),
            "outline": Option(0.5, "share of the steps that skip the last stage, with range=stages", high=1.0),
            "last": Option(0, _LAST),
        },
        "reuses what a range of blocks added (Delta-DiT)",
    ),
    "confident": CacheChoice(
        _installer("confident.install_confident"),
        {
            "threshold": Option(0.05, "relative error of the first block's prediction below which the rest is skipped"),
            "order": Option(1, "degree of the extrapolation", high=8),
            "max_skip": Option(3, "steps skipped in a row"),
        },
        "extrapolates the last block's output where the first block's was predicted well (confidence-gated Taylor)",
        batch_decides=True,
    ),
    "cache-dit": CacheChoice(
        _installer("cache_dit.install_cache_dit"),
        {
            "threshold": Option(0.1, "relative change of the first block's residual up to which the rest is reused"),
            "order": Option(1, "degree of the Taylor series; 0 reuses", high=4),
            "warmup": Option(2, "first steps computed in full"),
            "max_skip": Option(3, "steps skipped in a row"),
        },
        "DBCache with TaylorSeer of the package cache-dit",
        batch_decides=True,
    ),
}  # fmt: skip


def parse_cache(text: str | CacheSetting | None) -> CacheSetting | None:
    """A cache from its word, "name" or "name:option=value,option=value"; None and "none" are no cache.

    Raises:
        UserError: an unknown name or option, with the nearest one, or a value of the wrong kind or out of range.
    """
    if text is None or text == "none":
        return None
    if isinstance(text, CacheSetting):
        name, given = text.name, dict(text.options)
    else:
        name, _, rest = text.strip().partition(":")
        given = {}
        for pair in filter(None, (part.strip() for part in rest.split(","))):
            key, equals, value = (part.strip() for part in pair.partition("="))
            if not equals or key in given:
                problem = "given twice" if equals else "expected option=value"
                raise UserError(f"cache {text!r}: {pair!r}: {problem}, as in 'taylor:interval=4,order=1'")
            given[key] = value
    options = lookup(CACHES, name, "cache").options
    return CacheSetting(
        name,
        {
            key: lookup(options, key, f"option of cache {name!r}").check(f"cache {name!r}, option {key!r}", value)
            for key, value in given.items()
        },
    )
