"""How long the residual of all blocks is at each timestep: what MagCache must know of a model beforehand."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..util.errors import UserError
from .settings import CacheSetting

POINTS = 11


def timesteps_of_points() -> list[float]:
    """Timesteps at which a curve has its numbers: 999 (i / 10)^2, dense where little noise is left."""
    return [999 * (i / (POINTS - 1)) ** 2 for i in range(POINTS)]


def magnitude_at(curve: tuple[float, ...], timestep: float) -> float:
    """The curve at a timestep, straight between its numbers on the scale of sqrt(timestep)."""
    place = min(math.sqrt(max(timestep, 0) / 999), 1.0) * (POINTS - 1)
    first = min(int(place), POINTS - 2)
    share = place - first
    return curve[first] * (1 - share) + curve[first + 1] * share


class Magnitudes:
    """Lengths seen by `calibrate_magnitudes`."""

    def __init__(self) -> None:
        self.seen: dict[float, list[float]] = {}

    def curve(self) -> tuple[float, ...]:
        """The numbers at `timesteps_of_points`, between the timesteps seen by straight lines, in four digits.

        Raises:
            UserError: fewer than two timesteps were seen.
        """
        if len(self.seen) < 2:
            raise UserError(
                f"{len(self.seen)} timesteps were seen: sample at least 2 steps within calibrate_magnitudes"
            )
        known = sorted((timestep, sum(values) / len(values)) for timestep, values in self.seen.items())
        out = []
        for wanted in timesteps_of_points():
            below = [pair for pair in known if pair[0] <= wanted] or known[:1]
            above = [pair for pair in known if pair[0] > wanted] or known[-1:]
            (t0, v0), (t1, v1) = below[-1], above[0]
            share = 0.0 if t0 == t1 else min(max((wanted - t0) / (t1 - t0), 0.0), 1.0)
            out.append(float(f"{v0 + share * (v1 - v0):.4g}"))
        return tuple(out)

    def setting(self, **options: Any) -> CacheSetting:
        """The cache "mag" with this curve and other options."""
        return CacheSetting("mag", {**options, "magnitudes": self.curve()})


@contextmanager
def calibrate_magnitudes(network: Any, timestep: Callable[[], int] | None = None) -> Iterator[Magnitudes]:
    """Measure the lengths that MagCache needs, over the samplings in the body, which must use no cache.

        with calibrate_magnitudes(pipe.transformer) as magnitudes:
            pipe(class_labels=[0, 1, 2, 3], num_inference_steps=50)
        setting = magnitudes.setting()

    Args:
        network: the denoiser.
        timestep: returns the current one; None takes the keyword argument `timestep` of the network's calls.
    """
    found = Magnitudes()
    now: list[float] = [0.0]
    entered: list[Any] = [None]

    def enter_network(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = timestep() if timestep is not None else kwargs["timestep"]
        now[0] = float(given.flatten()[0]) if isinstance(given, Tensor) else float(given)

    def enter(module: Any, args: tuple[Any, ...]) -> None:
        entered[0] = args[0]

    def leave(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        length = (output.float() - entered[0].float()).norm(dim=-1).mean()
        found.seen.setdefault(now[0], []).append(float(length))

    handles = [
        network.register_forward_pre_hook(enter_network, with_kwargs=True),
        network.blocks[0].register_forward_pre_hook(enter),
        network.blocks[-1].register_forward_hook(leave),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
