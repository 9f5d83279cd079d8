"""In which order the rows of a dataset are shown: endless streams that are pure functions of (seed, place).

- `GlobalShuffle`    every epoch is one permutation of all rows
- `ShardShuffle`     a few shards at a time, for stores larger than the disk or the memory
- `BalancedShuffle`  every class equally often
- `BucketedOrder`    several orders, one for each shape; no global batch mixes them

An order stores nothing but its arguments and a few recent permutations, which it can draw again. So a run resumes from
its step alone, and processes that ask for different places of one stream neither overlap nor leave anything out.

The draws are keyed by `util.rng` with the purpose ORDER; `pass_index` keeps the kinds of draw apart (1 is taken by
`images.stratified_split`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..util import rng
from ..util.errors import UserError

_SHARDS, _ROWS_OF_GROUP, _CLASSES, _ROWS_OF_CLASS, _BUCKETS = 2, 3, 4, 5, 6  # pass_index; 0 is the global order

_PLACES_PER_DRAW = 4096  # blocks of few classes are drawn together, about this many places at once


class Order(Protocol):
    """An endless stream of the rows of a dataset.

    Attributes:
        size: number of rows of the dataset.
    """

    size: int

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what stands at the places `start .. start + count - 1` of the stream.

        Two int64 arrays of shape (count,): the rows, `0 .. size - 1`, and their epochs. No row occurs twice with the
        same epoch, so draws keyed by (seed, epoch, row) never repeat. `size` must be at least 1.
        """
        ...


class GlobalShuffle:
    """Epochs of all rows, each in an order of its own: place p is `permutation(seed, p // size)[p % size]`.

    Holds 4 bytes per row for each of at most two epochs.

    Args:
        size: number of rows.
        seed: the run's seed.
        part: number of this order among several of one run (buckets), which makes it differ from the others.
    """

    def __init__(self, size: int, seed: int, *, part: int = 0) -> None:
        self.size = size
        self._seed = seed
        self._part = part
        self._permutation = _Recent(self._draw)

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and epochs of places of the stream; see `Order.places`."""
        return _gather(start, count, self._run)

    def _run(self, place: int) -> tuple[np.ndarray, int]:
        epoch, offset = divmod(place, self.size)
        return self._permutation(epoch)[offset:], epoch

    def _draw(self, epoch: int) -> np.ndarray:
        return _permutation(rng.stream(self._seed, rng.Purpose.ORDER, epoch, self._part), self.size)


class ShardShuffle:
    """Epochs of all rows that read a few shards at a time.

    In each epoch the shards are put into a new order and taken `group` at a time; the rows of a group are shuffled
    together. So a range of places reads at most `group` shards, and those of the next group where it crosses into it.
    Every epoch shows every row exactly once. All processes read the same shards at the same time, so each of them needs
    access to all. The larger the group, the closer to a global shuffle: where shards hold one class each, `group`
    classes meet in a batch.

    Holds 4 bytes per row of at most two groups, and the order of the shards.

    Args:
        shard_sizes: rows of each shard; shard i holds the rows from `sum(shard_sizes[:i])` onwards. May hold zeros.
        seed: the run's seed.
        group: shards to shuffle together, at least 1.
        part: as in `GlobalShuffle`.

    Raises:
        UserError: `group` is below 1.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, group: int, *, part: int = 0) -> None:
        if group < 1:
            raise UserError(f"shuffle group is {group}: expected at least 1 shard at a time")
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        assert sizes.ndim == 1
        assert (sizes >= 0).all()
        self._shards = np.flatnonzero(sizes)
        self._sizes = sizes[self._shards]
        self._first_rows = (np.cumsum(sizes) - sizes)[self._shards]
        self.size = int(sizes.sum())
        self._seed = seed
        self._group = group
        self._part = part
        self._plan = _Recent(self._draw_plan)
        self._rows = _Recent(self._draw_rows)

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and epochs of places of the stream; see `Order.places`."""
        return _gather(start, count, self._run)

    def shards_at(self, start: int, count: int) -> list[int]:
        """Return the shards that the places `start .. start + count - 1` may read, in the order they are first needed.

        These are whole groups: a range of few places need not read all of them.
        """
        needed: dict[int, None] = {}
        place = start
        while count > 0 and place < start + count:
            epoch, group, offset = self._locate(place)
            needed |= dict.fromkeys(self._shards[self._members(epoch, group)].tolist())
            place += self._group_size(epoch, group) - offset
        return list(needed)

    def upcoming(self, start: int, count: int) -> list[int]:
        """Return the shards of the group that follows the places `start .. start + count - 1`, to fetch in advance."""
        epoch, group, offset = self._locate(start + max(count, 1) - 1)
        next_place = start + max(count, 1) - 1 + self._group_size(epoch, group) - offset
        return self.shards_at(next_place, 1)

    def _run(self, place: int) -> tuple[np.ndarray, int]:
        epoch, group, offset = self._locate(place)
        return self._rows(epoch, group)[offset:], epoch

    def _locate(self, place: int) -> tuple[int, int, int]:
        """Return epoch, group of the epoch, and offset in the group."""
        epoch, offset = divmod(place, self.size)
        _, ends = self._plan(epoch)
        group = int(np.searchsorted(ends, offset, side="right"))
        return epoch, group, offset - (int(ends[group - 1]) if group else 0)

    def _members(self, epoch: int, group: int) -> np.ndarray:
        return self._plan(epoch)[0][group * self._group : (group + 1) * self._group]

    def _group_size(self, epoch: int, group: int) -> int:
        return int(self._sizes[self._members(epoch, group)].sum())

    def _draw_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the shards in an epoch, and the place in the epoch at which each group ends."""
        shards = rng.stream(self._seed, rng.Purpose.ORDER, epoch, self._part, _SHARDS).permutation(len(self._shards))
        ends = np.cumsum(self._sizes[shards])
        return shards, np.append(ends[self._group - 1 : -1 : self._group], ends[-1])

    def _draw_rows(self, epoch: int, group: int) -> np.ndarray:
        members = self._members(epoch, group)
        first_rows, sizes = self._first_rows[members], self._sizes[members]
        rows = np.concatenate([np.arange(a, a + n) for a, n in zip(first_rows, sizes, strict=True)])
        generator = rng.stream(self._seed, rng.Purpose.ORDER, epoch, _joined(self._part, group), _ROWS_OF_GROUP)
        return rows.astype(_row_type(self.size))[generator.permutation(len(rows))]


class BalancedShuffle:
    """Every class that has rows equally often, whatever its size.

    The stream is cut into blocks of K places, K the number of classes with rows: each class appears once in each block,
    in an order drawn anew. The rows of a class appear in cycles, each of which shows every row of the class exactly
    once, in a new order. The epoch of a place is the cycle of its class; so a class of few rows is many epochs ahead of
    a large one.

    Holds 8 bytes per row. It reads from everywhere: it cannot be combined with `ShardShuffle`.

    Args:
        labels: integers of shape (N,), the class of each row.
        seed: the run's seed.
        part: as in `GlobalShuffle`.
    """

    def __init__(self, labels: np.ndarray, seed: int, *, part: int = 0) -> None:
        _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self.size = len(labels)
        self._members = np.argsort(classes, kind="stable").astype(_row_type(self.size))  # rows, class after class
        self._counts = counts
        self._firsts = np.cumsum(counts) - counts
        self._seed = seed
        self._part = part
        self._blocks_per_draw = max(1, _PLACES_PER_DRAW // max(1, len(counts)))
        self._classes = _Recent(self._draw_classes)
        self._forget()

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and epochs of places of the stream; see `Order.places`."""
        classes, _ = _gather(start, count, self._run)
        blocks = np.arange(start, start + count) // len(self._counts)
        cycles, turns = np.divmod(blocks, self._counts[classes])
        slots = self._firsts[classes] + turns
        rows = self._order[slots].astype(np.int64)
        stale = np.flatnonzero(self._cycles[classes] != cycles)
        if len(stale):
            # Class by class and cycle by cycle: only the latest cycle of a class is kept.
            stale = stale[np.lexsort((cycles[stale], classes[stale]))]
            starts = np.diff(classes[stale], prepend=-1) | np.diff(cycles[stale], prepend=-1)
            for chosen in np.split(stale, np.flatnonzero(starts)[1:]):
                self._turn_to(int(classes[chosen[0]]), int(cycles[chosen[0]]))
                rows[chosen] = self._order[slots[chosen]]
        return rows, cycles

    def _run(self, place: int) -> tuple[np.ndarray, int]:
        draw, offset = divmod(place, self._blocks_per_draw * len(self._counts))
        return self._classes(draw)[offset:], draw

    def _draw_classes(self, draw: int) -> np.ndarray:
        blocks = np.tile(np.arange(len(self._counts)), (self._blocks_per_draw, 1))
        generator = rng.stream(self._seed, rng.Purpose.ORDER, draw, self._part, _CLASSES)
        return generator.permuted(blocks, axis=1).ravel()

    def _turn_to(self, label: int, cycle: int) -> None:
        first, count = self._firsts[label], self._counts[label]
        position = _joined(self._part, label)
        generator = rng.stream(self._seed, rng.Purpose.ORDER, cycle, position, _ROWS_OF_CLASS)
        self._order[first : first + count] = self._members[first : first + count][generator.permutation(count)]
        self._cycles[label] = cycle

    def _forget(self) -> None:
        self._order = np.zeros_like(self._members)  # the members of each class in the order of its cycle
        self._cycles = np.full(len(self._counts), -1)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_order", "_cycles")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class BucketedOrder:
    """Several orders, one for each shape of picture; every global batch comes from one of them.

    Steps come in rounds. Bucket b, of n_b rows, has `max(1, round(n_b / global_batch))` steps in each round (halves are
    rounded up), and the order of a round's steps is drawn anew. Its steps take the places of its own order one after
    another. So in a round a bucket of at least one global batch shows each row 2/3 to 4/3 times, a large one once; a
    smaller bucket shows its rows more often, `global_batch / n_b` times.

    Args:
        buckets: the order of each bucket; empty ones are left out. Give them different `part` numbers.
        rows: for each bucket the dataset's row of each of its rows, or, where they are consecutive, the first one.
        seed: the run's seed.
        global_batch: samples per step over all processes; `StepBatchSampler` must be given the same.

    Raises:
        UserError: `global_batch` is below 1.
    """

    def __init__(
        self, buckets: Sequence[Order], rows: Sequence[np.ndarray | int], seed: int, global_batch: int
    ) -> None:
        if global_batch < 1:
            raise UserError(f"global batch is {global_batch}: expected at least 1")
        for bucket, own in zip(buckets, rows, strict=True):
            assert isinstance(own, int | np.integer) or len(own) == bucket.size
        filled = [(bucket, own) for bucket, own in zip(buckets, rows, strict=True) if bucket.size]
        self.size = sum(bucket.size for bucket, _ in filled)
        self.global_batch = global_batch
        self._buckets = filled
        self._seed = seed
        self._steps = [max(1, (2 * bucket.size + global_batch) // (2 * global_batch)) for bucket, _ in filled]
        self._round = _Recent(self._draw_round)

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and epochs of places of the stream, step after step; see `Order.places`."""
        rows, epochs = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            step, first = divmod(start + done, self.global_batch)
            part = slice(done, done + min(self.global_batch - first, count - done))
            rows[part], epochs[part] = self.step_places(step, first, part.stop - part.start)
            done = part.stop
        return rows, epochs

    def step_places(self, step: int, first: int = 0, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and epochs of `count` samples of the global batch of `step`, from sample `first` on.

        Without `count`, of all from there on.
        """
        count = self.global_batch - first if count is None else count
        assert 0 <= first <= first + count <= self.global_batch
        turn, number = divmod(step, sum(self._steps))
        kinds, before = self._round(turn)
        bucket, rows = self._buckets[kinds[number]]
        own_step = turn * self._steps[kinds[number]] + int(before[number])
        own, epochs = bucket.places(own_step * self.global_batch + first, count)
        return (rows[own].astype(np.int64) if isinstance(rows, np.ndarray) else rows + own), epochs

    def _draw_round(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bucket of each step of a round, and how many steps of this bucket come before it in the round."""
        kinds = np.repeat(np.arange(len(self._steps)), self._steps)
        kinds = rng.stream(self._seed, rng.Purpose.ORDER, turn, pass_index=_BUCKETS).permutation(kinds)
        before = np.empty_like(kinds)
        for bucket, steps in enumerate(self._steps):
            before[kinds == bucket] = np.arange(steps)
        return kinds, before


class _Recent:
    """The two latest results of a function of integers; forgotten when pickled."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kept: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def __call__(self, *key: int) -> Any:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if len(self._kept) == 2:
            self._kept.popitem(last=False)  # before the new one is made: there are never three
        self._kept[key] = value = self._make(*key)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make, "_kept": OrderedDict()}


def _gather(start: int, count: int, run: Callable[[int], tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Join runs of the stream; `run(place)` is the rest of the run in which a place lies, and the epoch of the run."""
    rows, epochs = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        rest, epoch = run(start + done)
        part = slice(done, min(done + len(rest), count))
        rows[part], epochs[part] = rest[: part.stop - part.start], epoch
        done = part.stop
    return rows, epochs


def _permutation(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.permutation(size).astype(_row_type(size))


def _row_type(size: int) -> type[np.unsignedinteger]:
    return np.uint32 if size <= 1 << 32 else np.uint64


def _joined(part: int, number: int) -> int:
    """One position for the two numbers, part 0 having the plain numbers."""
    return (part << 32) | number
