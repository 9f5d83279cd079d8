"""Training batches whose content depends on the seed and the step only.

The order of the data is a pure function of (seed, place), see `data.order`: step s takes the places
s * global_batch onwards of an endless stream, process r its contiguous share of them. So a run resumes from one
integer, and a change of process count, of micro-batches or of loader workers leaves every global batch as it was.
Flips and latent draws are keyed by (seed, epoch, row) (`util/rng.py`); nothing is drawn from a worker's or from torch's
global generator.

Batches may straddle epochs: each epoch still shows every row exactly once.
"""

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict, overload

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..util.errors import UserError
from .order import BucketedOrder, GlobalShuffle, Order


class WorkerLost(RuntimeError):
    """A loader process has ended without having been told to."""


class TrainingData(Protocol):
    """What can be trained on: rows that give tensors, and their labels. Must pickle if loader workers are spawned.

    Attributes:
        labels: integers of shape (N,), or None for unlabelled data.
    """

    @property
    def labels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int, flip: bool) -> torch.Tensor:
        """Return what the model sees of some rows: float32 (B, C, H, W).

        Args:
            indices: int64 (B,), rows, which may repeat.
            epochs: int64 (B,), the epoch of each; with seed and row the key of its draws.
            seed: the run's seed.
            flip: flip each row left to right with probability 1/2.
        """
        ...


class Place(NamedTuple):
    """One sample of the stream: which row, in which epoch, and where in its step's global batch."""

    index: int
    epoch: int
    position: int


class Places(Sequence[Place]):
    """Several places of one step, as three int64 arrays of shape (B,): `indices`, `epochs`, `positions`.

    `step` is None where single places were joined.
    """

    def __init__(self, indices: np.ndarray, epochs: np.ndarray, positions: np.ndarray, step: int | None = None) -> None:
        self.indices = indices
        self.epochs = epochs
        self.positions = positions
        self.step = step

    @classmethod
    def of(cls, places: Sequence[Place]) -> "Places":
        """Return single places joined."""
        if isinstance(places, cls):
            return places
        indices, epochs, positions = np.array(places, dtype=np.int64).reshape(-1, 3).T
        return cls(indices, epochs, positions)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, key: int) -> Place: ...
    @overload
    def __getitem__(self, key: slice) -> "Places": ...
    def __getitem__(self, key: int | slice) -> "Place | Places":
        found = self.indices[key], self.epochs[key], self.positions[key]
        return Places(*found, self.step) if isinstance(key, slice) else Place(*map(int, found))


class Sample(TypedDict, total=False):
    """One training sample. `label` is absent when the dataset has no labels."""

    input: torch.Tensor  # float32 (C, H, W)
    label: torch.Tensor  # int64, no dimensions
    position: torch.Tensor  # int64, no dimensions: place in the global batch


class Batch(TypedDict):
    """One micro-batch of one process."""

    inputs: torch.Tensor  # float32 (B, C, H, W): pixels in [-1, 1] or scaled latents
    class_labels: torch.Tensor | None  # int64 (B,)
    positions: list[int]  # places in the global batch, the key of every other draw for these samples
    draws: NotRequired[Any]  # what `training_loader(draw=...)` gave for the step and the positions


class StepBatchSampler(Sampler[Places]):
    """Endless batches of places, from any step on.

    Iterating yields, for each step from `start_step` on, `micro_batches` batches that together are this process's
    contiguous share `[rank * local, (rank + 1) * local)` of the global batch, `local = global_batch / world_size`.
    Every iteration starts at `start_step` again.

    Args:
        order: the stream of rows.
        global_batch: samples per step over all processes; may exceed the number of rows.
        rank: this process, `0 .. world_size - 1`.
        world_size: number of processes.
        start_step: first step to yield.
        micro_batches: equal parts to split a process's share into (gradient accumulation).

    Raises:
        UserError: the dataset is empty, the numbers are not positive, or `global_batch` cannot be split evenly over
            processes and micro-batches.
        ValueError: `rank` or `start_step` is out of range, or `order` is made for another global batch.
    """

    def __init__(
        self,
        order: Order,
        *,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        micro_batches: int = 1,
    ) -> None:
        if order.size < 1:
            raise UserError("the dataset is empty: expected at least one picture to train on")
        if global_batch < 1 or micro_batches < 1:
            raise UserError(
                f"global batch is {global_batch} in {micro_batches} micro-batches: expected at least 1 of each"
            )
        if not 0 <= rank < world_size or start_step < 0:
            raise ValueError(f"rank {rank} of {world_size} from step {start_step} is out of range")
        if global_batch % world_size:
            raise UserError(
                f"global batch {global_batch} cannot be split evenly over {world_size} processes: expected a multiple "
                f"of {world_size}, such as {_round_up(global_batch, world_size)}"
            )
        if (global_batch // world_size) % micro_batches:
            multiple = world_size * micro_batches
            raise UserError(
                f"global batch {global_batch} is {global_batch // world_size} per process, which cannot be split into "
                f"{micro_batches} equal micro-batches: expected a multiple of {multiple}, such as "
                f"{_round_up(global_batch, multiple)}"
            )
        if isinstance(order, BucketedOrder) and order.global_batch != global_batch:
            raise ValueError(f"the order's global batch is {order.global_batch}, the sampler's {global_batch}")
        self._order = order
        self._global_batch = global_batch
        self._local_batch = global_batch // world_size
        self._rank = rank
        self._start_step = start_step
        self._micro_batches = micro_batches

    def __iter__(self) -> Iterator[Places]:
        step = self._start_step
        micro_size = self._local_batch // self._micro_batches
        while True:
            share = self.places(step)
            for start in range(0, self._local_batch, micro_size):
                yield share[start : start + micro_size]
            step += 1

    def places(self, step: int) -> Places:
        """Return this process's share of the global batch of `step`."""
        first = self._rank * self._local_batch
        indices, epochs = self._order.places(step * self._global_batch + first, self._local_batch)
        return Places(indices, epochs, np.arange(first, first + self._local_batch), step)


class TrainingSamples(Dataset[Sample]):
    """The rows of a dataset by `Place`.

    Args:
        dataset: the data.
        seed: the run's seed.
        flip: flip left to right at random.
        draw: see `training_loader`; called for whole `Places` of a step only.
    """

    def __init__(
        self,
        dataset: TrainingData,
        *,
        seed: int,
        flip: bool = False,
        draw: Callable[[int, list[int]], Any] | None = None,
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._flip = flip
        self._draw = draw

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: Place) -> Sample:
        """Return one sample: input float32 (C, H, W), label int64 (absent if unlabelled), position."""
        batch = self.__getitems__([place])
        sample = Sample(input=batch["inputs"][0], position=torch.tensor(batch["positions"][0]))
        if batch["class_labels"] is not None:
            sample["label"] = batch["class_labels"][0]
        return sample

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """Return the samples of several places as one batch; `DataLoader` calls this instead of `__getitem__`."""
        chosen = Places.of(places)
        labels = self._dataset.labels
        batch = Batch(
            inputs=self._dataset.batch(chosen.indices, chosen.epochs, self._seed, self._flip),
            class_labels=None if labels is None else torch.from_numpy(labels[chosen.indices].astype(np.int64)),
            positions=chosen.positions.tolist(),
        )
        if self._draw is not None and chosen.step is not None:
            batch["draws"] = self._draw(chosen.step, batch["positions"])
        return batch


def training_loader(
    dataset: TrainingData,
    *,
    seed: int,
    global_batch: int,
    order: Order | None = None,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    micro_batches: int = 1,
    flip: bool = False,
    workers: int = 0,
    check: Callable[[], None] | None = None,
    draw: Callable[[int, list[int]], Any] | None = None,
) -> Iterator[Batch]:
    """Return the endless iterator of this process's micro-batches from `start_step` on.

    `micro_batches` of them make one step. Their content does not depend on `workers`, and resuming at a step gives
    what the uninterrupted run would have had. Do not pass it through `accelerate.prepare`: it shards by itself.

    Nothing is read and no worker is started before the first batch is asked for. Workers take no notice of Ctrl-C, of a
    closed terminal or of a scheduler's SIGTERM and SIGUSR1, so that this process can finish its step and save; they end
    with the iterator (`close`, or its last reference) or with this process.

    Args:
        dataset: the data.
        seed: the run's seed.
        global_batch: samples per step over all processes.
        order: in which order the rows are shown; by default every epoch shuffles all of them.
        rank: this process, `0 .. world_size - 1`.
        world_size: number of processes.
        start_step: first step, 0 for a new run.
        micro_batches: parts of a process's share (gradient accumulation).
        flip: flip left to right at random.
        workers: loader processes; 0 loads in this process, which is the faster choice for pictures held in memory.
        check: called in this process before each batch is returned; what it raises comes out of the iterator.
        draw: called with the step and the positions of each batch where the batch is made: in a worker if there are
            any, hence off the critical path. Must depend on nothing else, and pickle where workers are spawned. Where
            batches are pinned, the method `pin_memory` of what it gives is called.

    Returns:
        Dictionaries with `inputs` float32 (B, C, H, W), `class_labels` int64 (B,) or None, `positions`, a list of B
        places in the global batch, and, if `draw` is given, `draws`. Asking for the next one raises the `UserError` of
        `dataset.batch`, as it is also where a worker met it, and `WorkerLost` if a worker was killed.

    Raises:
        UserError, ValueError: as `StepBatchSampler`, before the first batch is asked for.
    """
    order = GlobalShuffle(len(dataset), seed) if order is None else order
    if order.size != len(dataset):
        raise ValueError(f"the order is one of {order.size} rows, the dataset has {len(dataset)}")
    sampler = StepBatchSampler(
        order,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        micro_batches=micro_batches,
    )
    ending = multiprocessing.RawValue("b", 0)
    # Workers start by the platform's default method. Where that is fork, they share the pictures and label tables that
    # this process holds; elsewhere each gets a copy.
    loader = DataLoader(
        _Caught(TrainingSamples(dataset, seed=seed, flip=flip, draw=draw)),
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=functools.partial(_begin_worker, ending),
        # DataLoader draws its workers' base seed from the global generator unless it has one of its own; a draw there
        # would make a resumed run differ from an uninterrupted one.
        generator=torch.Generator(),
    )
    return _handed_out(loader, ending, check)


def _handed_out(loader: DataLoader[Any], ending: Any, check: Callable[[], None] | None) -> Iterator[Batch]:
    def end() -> None:
        ending.value = 1

    # At exit before `multiprocessing` ends its processes, as it registered first.
    atexit.register(end)
    try:
        for batch in _begun(loader):
            if check is not None:
                check()
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (EOFError, ConnectionError) as error:
        # A worker was killed before its batch was fetched from it. What `dataset.batch` raised there says "Caught ...".
        if loader.num_workers == 0 or str(error).startswith("Caught "):
            raise
        raise WorkerLost("a DataLoader worker was killed, perhaps for want of memory: try fewer workers") from error
    except RuntimeError as error:
        if loader.num_workers == 0 or not str(error).startswith("DataLoader worker"):
            raise
        raise WorkerLost("a DataLoader worker was killed, perhaps for want of memory: try fewer workers") from error
    finally:
        end()
        atexit.unregister(end)


def _begun(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator, its processes started.

    torch has the death of one of them raised by a signal handler, wherever the training is just then, even half-way
    through an update. Without that handler it is noticed where the next batch is asked for, within five seconds.
    """
    if loader.num_workers == 0 or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    number = getattr(signal, "SIGCHLD", None)
    before = None if number is None else signal.getsignal(number)
    iterator = iter(loader)
    if number is not None:
        signal.signal(number, signal.SIG_DFL if before is None else before)
    return iterator


class _Caught(Dataset[Any]):
    """Gives a `UserError` instead of raising it: `DataLoader` would put a worker's traceback into the message."""

    def __init__(self, samples: TrainingSamples) -> None:
        self._samples = samples

    def __getitems__(self, places: Sequence[Place]) -> Batch | UserError:
        try:
            return self._samples.__getitems__(places)
        except UserError as error:
            return error


def _begin_worker(ending: Any, _worker: int) -> None:
    _outlive_stop_signals(ending)
    _return_large_blocks()


def _return_large_blocks() -> None:
    """Have glibc give batches back to the system when they are freed.

    By default it learns to keep blocks of their size on the heap, where what outlives them leaves holes: the heap of a
    worker grew to half a gigabyte for batches of 4 MB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 20)


_M_MMAP_THRESHOLD = -3  # malloc.h


def _outlive_stop_signals(ending: Any) -> None:
    """Make a loader worker ignore SIGINT, SIGHUP and SIGUSR1, and SIGTERM until its iterator is `ending`.

    They commonly go to a whole process group (a terminal, `timeout`, torchrun, a scheduler). The training process
    answers by finishing its step, for which it needs the workers; a dead worker would break off the step. The clean-up
    of `multiprocessing`, which waits for a worker after sending it SIGTERM, comes when `ending` is set.
    """

    def terminated(_number: int, _frame: Any) -> None:
        if ending.value:
            os._exit(0)

    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if (number := getattr(signal, name, None)) is not None:  # Windows has no SIGHUP and SIGUSR1
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminated)


def _as_is(batch: Any) -> Any:
    """`__getitems__` returns whole batches; a module-level function, because loader workers may have to pickle it."""
    return batch


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
