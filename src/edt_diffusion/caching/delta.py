"""Delta-DiT (arXiv 2406.01125): what a range of blocks adds to its input is kept, and added to a new input.

Unlike a kept output, a kept difference lets the current tokens through. EDT changes grid and width between stages, so
a range must begin and end alike. Two forms:

* "stages", the paper's: while the outline of a picture is made, the last stage is skipped, later the first one;
* "u": one range from block i to the block as far from the end, with all down- and up-samplings in between. Most of the
  network is inside.

With an order above 0 the kept differences are extrapolated over the steps instead of reused.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..util.errors import UserError
from .diffusers_hooks import BaseState, StateManager
from .extrapolation import Extrapolation
from .site import CacheHook, Clock, Schedule, Site
from .spans import closed, stages_of, taken_skips


class RangeState(BaseState):
    """What is kept of a range in one context."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.reset()

    def reset(self) -> None:
        self.added = Extrapolation(self.order)  # output minus input of the range
        self.entered: Tensor | None = None
        self.calls = 0
        self.skipping = False


class RangeHook(CacheHook):
    """One block of a range; the first decides, the last takes the difference.

    Args:
        states: shared by the blocks of the range.
        first, last: whether the block begins or ends it.
        schedule: which calls compute the range.
        taken: long skips that the range takes from outside.
        active: whether the range is the one to skip now.
        clock: of the sampling.
    """

    def __init__(
        self,
        states: StateManager,
        first: bool,
        last: bool,
        schedule: Schedule,
        taken: int,
        active: Callable[[], bool],
        clock: Clock,
    ) -> None:
        super().__init__()
        self.states, self.first, self.last = states, first, last
        self.schedule, self.taken, self.active, self.clock = schedule, taken, active, clock

    def new_forward(self, module: nn.Module, hidden_states: Tensor, temb: Tensor, skips: Any) -> Tensor:
        state: Any = self.states.get_state()
        if self.first and self._decide(state, hidden_states):
            for _ in range(self.taken):
                skips.pop()
            return hidden_states + state.added.at(self.clock.step)
        if state.skipping:
            return hidden_states
        output = self.fn_ref.original_forward(hidden_states, temb, skips)
        if self.last and state.entered is not None:
            state.added.record(self.clock.step, output - state.entered)
            state.entered = None
        return output

    def _decide(self, state: RangeState, hidden_states: Tensor) -> bool:
        if not self.active():
            state.reset()
            return False
        state.skipping = not self.schedule.computes(state.calls)
        state.calls += 1
        state.entered = None if state.skipping else hidden_states
        return state.skipping


def _add_range(site: Site, first: int, last: int, active: Callable[[], bool]) -> None:
    options: Any = site.options
    blocks = list(site.network.blocks)[first : last + 1]
    states = StateManager(RangeState, init_args=(options["order"],))  # pyright: ignore[reportArgumentType]
    schedule, taken = Schedule(options["interval"], options["warmup"]), taken_skips(blocks)
    for index, block in enumerate(blocks):
        begins, ends = index == 0, index == len(blocks) - 1
        site.add(block, RangeHook(states, begins, ends, schedule, taken, active, site.clock))


def install_delta(site: Site) -> None:
    """Options range, interval, order, warmup, edge (blocks outside at either end), outline (share of the steps), last.

    Raises:
        UserError: the blocks left by `edge` do not begin and end alike; those that do are named. Or with
            range=stages, all blocks of a stage leave long skips, as MDTv2's do.
    """
    options: Any = site.options
    network, clock = site.network, site.clock
    count, stages = len(network.blocks), stages_of(network)
    end = site.steps - options["last"]
    if options["range"] == "u":
        edge = options["edge"]
        if not closed(network, edge, count - 1 - edge):
            fitting = [str(i) for i in range((count + 1) // 2) if closed(network, i, count - 1 - i)]
            raise UserError(
                f"cache {str(site.setting)!r}: {edge} blocks at either end leave a range that begins and ends on "
                f"different grids or widths; this network allows edge={', '.join(fitting)}"
            )
        _add_range(site, edge, count - 1 - edge, lambda: clock.step < end)
        return
    site.blocks(2)
    outline = round(options["outline"] * site.steps)
    front = [i for i in range(count) if stages[i] == 0]
    rear = [i for i in range(count) if stages[i] == stages[-1]]
    # The samplings between stages change the grid: they stay outside.
    while front and not closed(network, front[0], front[-1]):
        front.pop()
    while rear and not closed(network, rear[0], rear[-1]):
        rear.pop(0)
    if not front or not rear:
        raise UserError(
            f"cache {str(site.setting)!r}: every block of the {'last' if front else 'first'} stage leaves a long skip, "
            "so none can be skipped: use range=u"
        )
    if front[0] == rear[0]:  # one stage: halves of it
        front, rear = front[: (count + 1) // 2], rear[(count + 1) // 2 :]
    _add_range(site, rear[0], rear[-1], lambda: clock.step < min(outline, end))
    _add_range(site, front[0], front[-1], lambda: outline <= clock.step < end)
