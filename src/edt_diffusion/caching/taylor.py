"""TaylorSeer (arXiv 2503.06923) and FORA (arXiv 2407.01425): outputs of attention and MLPs, reused or extrapolated.

What is kept is the output of each `attn` and `ff` before its gate: norms, shifts, scales and gates are computed in
every step from the current timestep.
"""

from typing import Any

from torch import Tensor, nn

from .diffusers_hooks import BaseState, StateManager
from .extrapolation import Extrapolation
from .site import CacheHook, Clock, Schedule, Site


class _State(BaseState):
    def __init__(self, order: int) -> None:
        self.calls = 0
        self.features = Extrapolation(order)

    def reset(self) -> None:
        pass  # the manager drops the whole state


class TaylorHook(CacheHook):
    """Computes a module in the calls of a schedule, and in all steps from `last_from`; else extrapolates its output."""

    def __init__(self, order: int, schedule: Schedule, last_from: int, clock: Clock) -> None:
        super().__init__()
        self.states = StateManager(_State, init_args=(order,))  # pyright: ignore[reportArgumentType]
        self.schedule, self.last_from, self.clock = schedule, last_from, clock

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        state: Any = self.states.get_state()
        call, step = state.calls, self.clock.step
        state.calls += 1
        if self.schedule.computes(call) or step >= self.last_from:
            output = self.fn_ref.original_forward(*args, **kwargs)
            state.features.record(step, output)
            return output
        return state.features.at(step)


def install_taylor(site: Site) -> None:
    """Options interval, order (0 where the cache has none), warmup and last."""
    options: Any = site.options
    order = options.get("order", 0)
    schedule = Schedule(options["interval"], options.get("warmup", 1))
    for block in site.blocks():
        for name in ("attn", "ff"):
            if isinstance(module := getattr(block, name, None), nn.Module):
                site.add(module, TaylorHook(order, schedule, site.steps - options["last"], site.clock))
