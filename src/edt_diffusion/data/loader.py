"""Training batches whose content depends on the seed and the step only.

The order of the data is a pure function: place p of the endless stream of samples belongs to epoch p // n and is
`permutation(seed, epoch)[p % n]`; step s takes the places s * global_batch onwards, process r its contiguous share of
them. So a run resumes from one integer, and a change of process count, of micro-batches or of loader workers leaves
every global batch as it was. Flips are keyed by (seed, epoch, index) (`util/rng.py`); nothing is drawn from a
worker's or from torch's global generator.

Batches may straddle epochs: each epoch still shows every picture exactly once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..util import rng
from ..util.errors import UserError
from .codec import from_uint8
from .images import ImageDataset


class Place(NamedTuple):
    """One sample of the stream: which picture, in which epoch, and where in its step's global batch."""

    index: int
    epoch: int
    position: int


class Sample(TypedDict, total=False):
    """One training sample. `label` is absent when the dataset has no labels."""

    image: torch.Tensor  # float32 (C, H, W) in [-1, 1]
    label: torch.Tensor  # int64, no dimensions
    position: torch.Tensor  # int64, no dimensions: place in the global batch


class Batch(TypedDict):
    """One micro-batch of one process."""

    images: torch.Tensor  # float32 (B, C, H, W) in [-1, 1]
    class_labels: torch.Tensor | None  # int64 (B,)
    positions: list[int]  # places in the global batch, the key of every other draw for these samples


class StepBatchSampler(Sampler[list[Place]]):
    """Endless batches of places, from any step on.

    Iterating yields, for each step from `start_step` on, `micro_batches` lists that together are this process's
    contiguous share `[rank * local, (rank + 1) * local)` of the global batch, `local = global_batch / world_size`.
    Every iteration starts at `start_step` again.

    Args:
        size: number of samples in the dataset.
        seed: the run's seed.
        global_batch: samples per step over all processes; may exceed `size`.
        rank: this process, `0 .. world_size - 1`.
        world_size: number of processes.
        start_step: first step to yield.
        micro_batches: equal parts to split a process's share into (gradient accumulation).

    Raises:
        UserError: the dataset is empty, the numbers are not positive, or `global_batch` cannot be split evenly over
            processes and micro-batches.
        ValueError: `rank` or `start_step` is out of range.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        micro_batches: int = 1,
    ) -> None:
        if size < 1:
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
        self._size = size
        self._seed = seed
        self._global_batch = global_batch
        self._local_batch = global_batch // world_size
        self._rank = rank
        self._start_step = start_step
        self._micro_batches = micro_batches
        # A batch reads one or two neighbouring epochs in turn; more would hold a copy of the order for nothing.
        self._permutations: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[list[Place]]:
        step = self._start_step
        micro_size = self._local_batch // self._micro_batches
        while True:
            share = self.places(step)
            for start in range(0, self._local_batch, micro_size):
                yield share[start : start + micro_size]
            step += 1

    def places(self, step: int) -> list[Place]:
        """Return this process's share of the global batch of `step`."""
        first = self._rank * self._local_batch
        places = []
        for position in range(first, first + self._local_batch):
            epoch, rank_in_epoch = divmod(step * self._global_batch + position, self._size)
            places.append(Place(int(self._permutation(epoch)[rank_in_epoch]), epoch, position))
        return places

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            if len(self._permutations) == 2:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = rng.stream(self._seed, rng.Purpose.ORDER, step=epoch).permutation(self._size)
        return self._permutations[epoch]


class TrainingImages(Dataset[Sample]):
    """Pictures by `Place`, as tensors, flipped left to right at random if asked.

    Args:
        dataset: the pictures.
        seed: the run's seed.
        flip: flip each picture with probability 1/2, drawn for (seed, epoch, index).
    """

    def __init__(self, dataset: ImageDataset, *, seed: int, flip: bool = False) -> None:
        self._dataset = dataset
        self._seed = seed
        self._flip = flip

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: Place) -> Sample:
        """Return one sample: image float32 (C, H, W) in [-1, 1], label int64 (absent if unlabelled), position."""
        batch = self.__getitems__([place])
        sample = Sample(image=batch["images"][0], position=torch.tensor(batch["positions"][0]))
        if batch["class_labels"] is not None:
            sample["label"] = batch["class_labels"][0]
        return sample

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """Return the samples of several places as one batch; `DataLoader` calls this instead of `__getitem__`."""
        indices = np.array([index for index, _, _ in places], dtype=np.int64)
        pictures = self._dataset.images(indices)  # (B, H, W, C)
        if self._flip:
            flipped = np.array([self._is_flipped(index, epoch) for index, epoch, _ in places])
            pictures[flipped] = pictures[flipped, :, ::-1]
        labels = self._dataset.labels
        return Batch(
            images=from_uint8(pictures),
            class_labels=None if labels is None else torch.from_numpy(labels[indices]),
            positions=[position for _, _, position in places],
        )

    def _is_flipped(self, index: int, epoch: int) -> bool:
        return rng.stream(self._seed, rng.Purpose.FLIP, step=epoch, position=index).random() < 0.5


def training_loader(
    dataset: ImageDataset,
    *,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    micro_batches: int = 1,
    flip: bool = False,
    workers: int = 0,
) -> Iterator[Batch]:
    """Return the endless iterator of this process's micro-batches from `start_step` on.

    `micro_batches` of them make one step. Their content does not depend on `workers`, and resuming at a step gives
    what the uninterrupted run would have had. Do not pass it through `accelerate.prepare`: it shards by itself.

    Args:
        dataset: the pictures.
        seed: the run's seed.
        global_batch: pictures per step over all processes.
        rank: this process, `0 .. world_size - 1`.
        world_size: number of processes.
        start_step: first step, 0 for a new run.
        micro_batches: parts of a process's share (gradient accumulation).
        flip: flip pictures left to right at random.
        workers: loader processes; 0 loads in this process, which is the faster choice for pictures held in memory.

    Returns:
        Dictionaries with `images` float32 (B, C, H, W) in [-1, 1], `class_labels` int64 (B,) or None, and `positions`,
        a list of B places in the global batch.

    Raises:
        UserError, ValueError: as `StepBatchSampler`, before the first batch is asked for.
    """
    sampler = StepBatchSampler(
        len(dataset),
        seed=seed,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        micro_batches=micro_batches,
    )
    loader = DataLoader(
        TrainingImages(dataset, seed=seed, flip=flip),
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # DataLoader draws its workers' base seed from the global generator unless it has one of its own; a draw there
        # would make a resumed run differ from an uninterrupted one.
        generator=torch.Generator(),
    )
    return iter(loader)


def _as_is(batch: Any) -> Any:
    """`__getitems__` returns whole batches; a module-level function, because loader workers may have to pickle it."""
    return batch


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
