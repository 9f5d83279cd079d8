"""One whole sampling: where its time goes, and what a feature cache leaves out."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..pipelines import ClassConditionalPipeline
from ..util.rng import image_seed
from .clock import Clock, Stopwatch
from .counting import WorkCounter, counting
from .parts import watched

NETWORK, SCHEDULER, DECODING, REST = PIECES = ("network", "scheduler", "decoding", "other")
WARMUP_STEPS = 2


@dataclass(frozen=True)
class SamplingProfile:
    """What a batch of pictures takes.

    Attributes:
        pictures: that were made, at once.
        scheduler: class of the scheduler.
        steps: asked for.
        seconds: of all, by piece: "network", "scheduler", "decoding" (the autoencoder) and "other".
        calls: of the network.
        passes: of the network for each picture; a guided step has two, in one call or in two.
        blocks_skipped: share of the blocks' calls in which less than half of a block was computed.
        work_skipped: share of the multiply-adds that were not computed, thanks to a cache. Both are None for compiled
            networks, into which nothing looks.
    """

    pictures: int
    scheduler: str
    steps: int
    seconds: dict[str, float]
    calls: int
    passes: float
    blocks_skipped: float | None
    work_skipped: float | None

    @property
    def seconds_per_picture(self) -> float:
        """Time of the batch over its pictures."""
        return sum(self.seconds.values()) / self.pictures


def profile_sampling(
    pipeline: ClassConditionalPipeline,
    batch: int,
    clock: Clock,
    block_work: dict[int, int] | None,
    scheduler: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    cache: str = "none",
) -> SamplingProfile:
    """Make one batch of pictures of the classes in turn, after a short one that is not measured.

    The short one has the same settings and two steps, the fewest that every sampler takes: what only a first call does
    (compiling, choosing kernels, allocating) is in no figure.

    Args:
        pipeline: its network may be in any precision, compiled or not.
        batch: pictures.
        clock: for its device.
        block_work: multiply-adds of each block by number, of one image, and under -1 of all else; None does not count.
        scheduler, steps, guidance, cache: as for the pipeline's call.

    Raises:
        UserError: the settings do not fit the model.
    """
    network: Any = pipeline.transformer
    sampler, count = pipeline.sampler(scheduler, steps)
    classes = network.config.num_classes
    labels = None if classes is None else [number % classes for number in range(batch)]
    stopwatch = Stopwatch(clock)
    pictures = pipeline.vae is not None or network.config.in_channels in (1, 3)
    settings: dict[str, Any] = {
        "guidance_scale": guidance if classes is not None else 1.0,
        "seeds": [image_seed(0, number) for number in range(batch)],
        "scheduler": scheduler,
        "cache": cache,
        "output_type": "uint8" if pictures else "latent",
    }
    pipeline(labels, num_inference_steps=min(count, WARMUP_STEPS), **settings)
    with contextlib.ExitStack() as stack:
        counter = stack.enter_context(counting(network, inside=block_work is not None))
        stack.enter_context(watched(network, lambda: stopwatch.enter(NETWORK), stopwatch.leave))
        if (decoder := getattr(pipeline.vae, "decoder", None)) is not None:
            stack.enter_context(watched(decoder, lambda: stopwatch.enter(DECODING), stopwatch.leave))
        stack.enter_context(_timed_steps(type(sampler), stopwatch))
        stopwatch.enter(REST)
        pipeline(labels, num_inference_steps=count, **settings)
        stopwatch.leave()
    spent = stopwatch.seconds()
    seconds = {piece: spent.get(piece, 0.0) for piece in PIECES}
    blocks, work = (None, None) if block_work is None else _skipped(counter, block_work, batch)
    return SamplingProfile(
        batch, type(sampler).__name__, count, seconds, counter.calls, counter.rows / batch, blocks, work
    )


def _skipped(counter: WorkCounter, block_work: dict[int, int], batch: int) -> tuple[float, float]:
    rows = counter.rows / counter.calls
    computed = sum(
        done[block] >= work * rows / 2
        for done in counter.by_block
        for block, work in block_work.items()
        if block >= 0
    )  # fmt: skip
    blocks = sum(block >= 0 for block in block_work)
    full = sum(block_work.values()) * counter.rows
    return 1 - computed / (blocks * counter.calls), 1 - counter.total / full


@contextlib.contextmanager
def _timed_steps(kind: Any, stopwatch: Stopwatch) -> Iterator[None]:
    """Time `step` of a class of schedulers; of the class, because pipelines make and copy schedulers as they like."""
    original = kind.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        stopwatch.enter(SCHEDULER)
        try:
            return original(*args, **kwargs)
        finally:
            stopwatch.leave()

    own = "step" in vars(kind)
    kind.step = step
    try:
        yield
    finally:
        if own:
            kind.step = original
        else:
            del kind.step
