"""PyramidAttentionBroadcast and FasterCache: diffusers' hooks of attention, with a state for each context."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .diffusers_hooks import (
    BaseState,
    FasterCacheBlockHook,
    FasterCacheBlockState,
    PyramidAttentionBroadcastHook,
    PyramidAttentionBroadcastState,
    StateManager,
)
from .site import CacheHook, Site

_JOINT = "cond_uncond"  # the context in which a batch has both halves of guidance


class _StatePerContext:
    """Replaces the one state of a diffusers hook by one for each context; set `states` and mix in first."""

    fn_ref: Any
    states: StateManager

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        return module

    @property
    def state(self) -> Any:
        return self.states.get_state()

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module


class PyramidHook(_StatePerContext, PyramidAttentionBroadcastHook):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Reuses the output of one attention module."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.states = StateManager(PyramidAttentionBroadcastState)  # pyright: ignore[reportArgumentType]


def _attentions(site: Site) -> list[nn.Module]:
    found = (getattr(block, "attn", None) for block in site.blocks())
    return [module for module in found if isinstance(module, nn.Module)]


def install_pyramid(site: Site) -> None:
    """Outputs of attention are kept for `interval` - 1 steps while from < timestep < to (arXiv 2408.12588)."""
    options: Any = site.options
    for module in _attentions(site):
        site.add(module, PyramidHook((options["from"], options["to"]), options["interval"], site.timestep))


class FasterAttentionHook(_StatePerContext, FasterCacheBlockHook):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Extrapolates the output of one attention module while the unconditional half is left out."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.states = StateManager(FasterCacheBlockState)  # pyright: ignore[reportArgumentType]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.states.context.name != _JOINT:
            return self.fn_ref.original_forward(*args, **kwargs)
        return super().new_forward(module, *args, **kwargs)


class HalvesState(BaseState):
    """Low and high frequencies of the last difference, unconditional minus conditional half, as weighted so far."""

    def __init__(self) -> None:
        self.calls = 0
        self.low: Any = None
        self.high: Any = None

    def reset(self) -> None:
        pass  # the manager drops the whole state


class FasterNetworkHook(CacheHook):
    """Leaves out the unconditional half and puts the conditional one plus the kept difference in its place.

    The frequencies are taken apart once, when the difference is computed, and only where their weights differ;
    diffusers' hook transforms every prediction there and back.
    """

    def __init__(self, interval: int, below: int, low: float, high: float, timestep: Callable[[], int]) -> None:
        super().__init__()
        self.states = StateManager(HalvesState)  # pyright: ignore[reportArgumentType]
        self.interval, self.below, self.low, self.high, self.timestep = interval, below, low, high, timestep

    def new_forward(self, module: nn.Module, **inputs: Any) -> Any:
        if self.states.context.name != _JOINT:
            return self.fn_ref.original_forward(**inputs)
        state: Any = self.states.get_state()
        batch = len(inputs["hidden_states"])
        skips = state.calls % self.interval != 0 and self.timestep() < self.below
        state.calls += 1
        if skips:
            inputs = {name: _second_half(value, batch) for name, value in inputs.items()}
        output = self.fn_ref.original_forward(**inputs)
        prediction = output[0]
        if skips:
            state.low, state.high = state.low * self.low, state.high * self.high
            joint = torch.cat([(prediction.float() + state.low + state.high).to(prediction.dtype), prediction])
            return (joint, *output[1:]) if isinstance(output, tuple) else type(output)(joint)
        without, with_class = prediction.float().chunk(2)
        state.low = low_frequencies(without - with_class) if self.low != self.high else without - with_class
        state.high = without - with_class - state.low
        return output


def _second_half(value: Any, batch: int) -> Any:
    whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
    return value[batch // 2 :] if whole else value


def low_frequencies(images: Tensor) -> Tensor:
    """What is left of (B, C, H, W) when frequencies beyond a fifth of the shorter side are set to zero."""
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=images.device)
    columns = torch.fft.fftfreq(width, 1 / width, device=images.device)
    kept = rows[:, None] ** 2 + columns**2 <= (min(height, width) // 5) ** 2
    return torch.fft.ifft2(torch.fft.fft2(images) * kept).real


def install_faster(site: Site) -> None:
    """FasterCache (arXiv 2410.19355): the unconditional half is left out of most steps below timestep `to`.

    It is computed in every `uncond`-th step; in between it is the conditional half plus the last difference of the two,
    whose low and high frequencies are weighted by `low` and `high` in each step. The attention of the conditional half
    is then extrapolated in `interval` - 1 of `interval` steps.
    """
    options: Any = site.options
    below = (-1, options["to"])
    network_hook = FasterNetworkHook(options["uncond"], options["to"], options["low"], options["high"], site.timestep)
    site.add(site.network, network_hook)
    for module in _attentions(site):
        hook = FasterAttentionHook(options["interval"], below, False, lambda _: options["weight"], site.timestep)
        site.add(module, hook)
