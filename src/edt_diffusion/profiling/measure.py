"""One forward pass by part: time, multiply-adds, speed."""

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..util.rng import image_generators
from .clock import Clock, Stopwatch
from .counting import counting
from .parts import COMPILED, OTHER, Part, parts_of, watched

_WARM_UP = 2  # passes before any is timed: they pick kernels, keep position biases, compile


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement, in seconds.

    Attributes:
        seconds: mean over the passes of the middle half, ordered by their whole time; those of the parts add up.
        low, high: quartiles of all repeats.
    """

    seconds: float
    low: float
    high: float


def middle_half(wholes: Sequence[float]) -> list[int]:
    """Numbers of the passes left when the fastest and the slowest quarter are taken away."""
    order = sorted(range(len(wholes)), key=lambda index: wholes[index])
    cut = len(order) // 4
    return order[cut : len(order) - cut]


def spread(values: Sequence[float], counted: Sequence[int]) -> Spread:
    """Summarise repeats, of which those with the numbers `counted` make the mean."""
    low, high = (values[0],) * 2 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")[::2]
    return Spread(statistics.fmean(values[index] for index in counted), low, high)


@dataclass(frozen=True)
class ForwardProfile:
    """What one forward pass of a batch takes.

    Attributes:
        batch: images of the batch.
        repeats: timed passes.
        whole: time of a pass.
        parts: time of each part by itself, in the order of execution; `OTHER` is the time between them.
        work: multiply-adds of each part, of one image.
    """

    batch: int
    repeats: int
    whole: Spread
    parts: dict[Part, Spread]
    work: dict[Part, int]

    @property
    def multiply_adds(self) -> int:
        """Of one image."""
        return sum(self.work.values())


def example_inputs(network: Any, batch: int) -> dict[str, Any]:
    """Arguments of one forward pass: noise, the middle of the process, the classes in turn."""
    config = network.config
    sides = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    noise = [torch.randn(config.in_channels, *sides, generator=each) for each in image_generators(list(range(batch)))]
    inputs: dict[str, Any] = {
        "hidden_states": torch.stack(noise).to(network.device, network.dtype),
        "timestep": torch.full((batch,), 500, device=network.device),
        "return_dict": False,
    }
    if config.num_classes is not None:
        inputs["class_labels"] = torch.arange(batch, device=network.device) % config.num_classes
    return inputs


@torch.no_grad()
def count_work(network: Any, batch: int) -> dict[Part, int]:
    """Multiply-adds of one image by part, from a forward pass; of a network that is not compiled."""
    parts = parts_of(network)
    with counting(network) as counter:
        network(**example_inputs(network, batch))
    work: dict[Part, int] = defaultdict(int)
    for name, done in counter.work.items():
        work[parts[name] if name else OTHER] += done // batch
    return dict(work)


@torch.no_grad()
def profile_forward(network: Any, batch: int, repeats: int, work: dict[Part, int], clock: Clock) -> ForwardProfile:
    """Time forward passes part by part.

    Args:
        network: a backbone in eval mode, compiled or not.
        batch: images of the batch.
        repeats: timed passes, after two untimed ones.
        work: from `count_work`.
        clock: for its device.
    """
    inputs = example_inputs(network, batch)
    for _ in range(_WARM_UP):
        network(**inputs)
    parts, stopwatch = parts_of(network), Stopwatch(clock)
    timed: list[dict[Part, float]] = []
    with contextlib.ExitStack() as stack:
        modules = {"": OTHER, **parts}
        for name, part in modules.items():
            stack.enter_context(
                watched(network.get_submodule(name), lambda part=part: stopwatch.enter(part), stopwatch.leave)
            )
        for _ in range(repeats):
            network(**inputs)
            timed.append(stopwatch.seconds())
    wholes = [sum(each.values()) for each in timed]
    counted = middle_half(wholes)
    shown = {part: spread([each.get(part, 0.0) for each in timed], counted) for part in (*parts.values(), OTHER)}
    return ForwardProfile(batch, repeats, spread(wholes, counted), shown, _in_shown_parts(work, shown))


def _in_shown_parts(work: dict[Part, int], shown: dict[Part, Spread]) -> dict[Part, int]:
    """The work of compiled blocks' insides, which were counted before, is that of the compiled blocks."""
    out: dict[Part, int] = defaultdict(int)
    for part, done in work.items():
        compiled = Part(part.stage, COMPILED)
        out[part if part in shown else compiled if compiled in shown else OTHER] += done
    return dict(out)
