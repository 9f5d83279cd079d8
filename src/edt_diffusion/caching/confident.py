"""Confidence-gated Taylor: all blocks are skipped where the first one does what was predicted.

The outputs of the first and of the last block are extrapolated from the steps computed in full. Each step runs the
first block; if the relative error of its prediction is below a threshold, the prediction of the last block is trusted
and the rest of the network is not run. Two histories for the whole network, where TaylorSeer has two per block.
The gate is a mean over the batch: pictures depend on those made with them.
"""

from typing import Any

from torch import Tensor, nn

from .diffusers_hooks import BaseState, StateManager
from .extrapolation import Extrapolation
from .site import CacheHook, Clock, Site
from .spans import taken_skips


class GateState(BaseState):
    """Histories of one context."""

    def __init__(self, order: int) -> None:
        self.first, self.last = Extrapolation(order), Extrapolation(order)
        self.skipping = False
        self.skipped = 0  # in a row

    def reset(self) -> None:
        pass  # the manager drops the whole state


class ConfidentHook(CacheHook):
    """One block of the network, at position "first", "inner" or "last"."""

    def __init__(self, states: StateManager, place: str, options: Any, taken: int, clock: Clock) -> None:
        super().__init__()
        self.states, self.place, self.taken, self.clock = states, place, taken, clock
        self.threshold, self.max_skip = options["threshold"], options["max_skip"]

    def new_forward(self, module: nn.Module, hidden_states: Tensor, temb: Tensor, skips: Any) -> Tensor:
        state: Any = self.states.get_state()
        step = self.clock.step
        if self.place == "first":
            output = self.fn_ref.original_forward(hidden_states, temb, skips)
            self._decide(state, step, output.float())
            return output
        if state.skipping:
            if self.place == "inner":
                return hidden_states
            for _ in range(self.taken):
                skips.pop()
            return state.last.at(step).to(hidden_states.dtype)
        output = self.fn_ref.original_forward(hidden_states, temb, skips)
        if self.place == "last":
            state.last.record(step, output.float())
        return output

    def _decide(self, state: GateState, step: int, output: Tensor) -> None:
        state.skipping = False
        if state.first.complete and state.skipped < self.max_skip:
            error = (state.first.at(step) - output).abs().mean() / output.abs().mean().clamp_min(1e-12)
            state.skipping = float(error) < self.threshold
        state.skipped = state.skipped + 1 if state.skipping else 0
        if not state.skipping:
            state.first.record(step, output)


def install_confident(site: Site) -> None:
    """Options threshold, order and max_skip (steps skipped in a row)."""
    options: Any = site.options
    blocks = site.blocks(2)
    taken = taken_skips(blocks[1:])
    states = StateManager(GateState, init_args=(options["order"],))  # pyright: ignore[reportArgumentType]
    for index, block in enumerate(blocks):
        place = "first" if index == 0 else "last" if index == len(blocks) - 1 else "inner"
        site.add(block, ConfidentHook(states, place, options, taken, site.clock))
