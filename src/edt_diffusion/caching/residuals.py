"""FirstBlockCache and MagCache, as diffusers has them: the residual of almost all blocks is added to a new input.

FirstBlockCache reuses what the blocks after the first added, as long as the first block adds nearly the same as it did.
MagCache (arXiv 2506.09045) reuses what all blocks added, as long as its length, known beforehand, changed little.
"""

from types import SimpleNamespace
from typing import Any

from .diffusers_hooks import (
    FBCBlockHook,
    FBCHeadBlockHook,
    FBCSharedBlockState,
    MagCacheBlockHook,
    MagCacheHeadHook,
    MagCacheState,
    StateManager,
)
from .magnitudes import magnitude_at
from .site import Clock, Site


def install_first_block(site: Site) -> None:
    """Option threshold: relative change of the first block's residual, in the mean, up to which the rest is reused."""
    options: Any = site.options
    head, *rest = site.blocks(2)
    states = StateManager(FBCSharedBlockState)  # pyright: ignore[reportArgumentType]
    site.add(head, FBCHeadBlockHook(states, options["threshold"]))
    for block in rest:
        site.add(block, FBCBlockHook(states, is_tail=block is rest[-1]))


class _Ratios:
    """Length of the residual over its length one step before, by step; worked out when asked for, from timesteps.

    The first step asked for has none before it, and a ratio of 1.
    """

    def __init__(self, site: Site, curve: tuple[float, ...]) -> None:
        self.site, self.curve = site, curve
        self._step = -1
        self._now: float | None = None
        self._ratio = 1.0

    def __len__(self) -> int:
        return self.site.steps

    def __getitem__(self, step: int) -> float:
        if self.site.clock.step != self._step:
            self._step = self.site.clock.step
            before, self._now = self._now, magnitude_at(self.curve, self.site.timestep())
            self._ratio = 1.0 if before is None else self._now / before
        return self._ratio


class _MagState(MagCacheState):
    """diffusers' state, which counts its own calls, begun in the middle of a sampling where features were forgotten."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.step_index = clock.step


def install_mag(site: Site) -> None:
    """Options threshold, max_skip, retain (share of first steps always computed) and magnitudes."""
    options: Any = site.options
    config: Any = SimpleNamespace(
        threshold=options["threshold"],
        max_skip_steps=options["max_skip"],
        retention_ratio=options["retain"],
        num_inference_steps=site.steps,
        mag_ratios=_Ratios(site, options["magnitudes"]),
        calibrate=False,
    )
    head, *rest = site.blocks(2)
    states = StateManager(_MagState, init_args=(site.clock,))  # pyright: ignore[reportArgumentType]
    site.add(head, MagCacheHeadHook(states, config))
    for block in rest:
        site.add(block, MagCacheBlockHook(states, is_tail=block is rest[-1], config=config))
