import hashlib
import itertools
import pickle
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edt_diffusion.data.order import BalancedShuffle, BucketedOrder, GlobalShuffle, Order, ShardShuffle
from edt_diffusion.util.errors import UserError

SEED = 11
LABELS = np.array([4, 0, 4, 4, 2, 0, 4, 4, 4, 2, 4])  # 2 rows of class 0, 2 of class 2, 7 of class 4; 1 and 3 empty


def bucketed(seed: int = SEED, global_batch: int = 4) -> BucketedOrder:
    """Three buckets of 10, 3 and 6 rows in a dataset of 19; the second has its rows scattered."""
    buckets = [GlobalShuffle(10, seed), ShardShuffle([2, 1], seed, 1, part=1), GlobalShuffle(6, seed, part=2)]
    return BucketedOrder(buckets, [0, np.array([18, 10, 14]), np.array([11, 12, 13, 15, 16, 17])], seed, global_batch)


ORDERS: dict[str, Callable[[int], Order]] = {
    "global": lambda seed: GlobalShuffle(13, seed),
    "shards": lambda seed: ShardShuffle([3, 0, 5, 1, 4], seed, 2),
    "balanced": lambda seed: BalancedShuffle(LABELS, seed),
    "bucketed": lambda seed: bucketed(seed),
}


def generator(seed: int, position: int, step: int, pass_index: int) -> np.random.Generator:
    """The keyed generator, from numpy's Philox directly: purpose 6 is ORDER."""
    return np.random.Generator(np.random.Philox(counter=[0, position, step, pass_index], key=[seed, 6]))


def pairs(order: Order, start: int, count: int) -> list[tuple[int, int]]:
    rows, epochs = order.places(start, count)
    assert rows.dtype == epochs.dtype == np.int64
    assert rows.shape == epochs.shape == (count,)
    return list(zip(rows.tolist(), epochs.tolist(), strict=True))


def test_global_shuffle_is_the_one_that_existing_runs_began_with() -> None:
    # Written by version 0.1.0; a run of that version must go on with the same pictures.
    assert GlobalShuffle(7, 11).places(0, 16)[0].tolist() == [5, 2, 1, 0, 3, 6, 4, 6, 5, 2, 1, 4, 3, 0, 5, 4]
    assert GlobalShuffle(10, -3).places(0, 16)[0].tolist() == [8, 0, 3, 2, 9, 1, 7, 4, 5, 6, 5, 7, 0, 4, 9, 1]
    order = GlobalShuffle(1_000_000, 0)
    rows = np.concatenate([order.places(step * 256, 256)[0] for step in (3000, 3907)]).astype("<i8")
    expected = "ba174fca91e68ea54d4a561b855a784758a060dd77f390274cb534831bba3fba"
    assert hashlib.sha256(rows.tobytes()).hexdigest() == expected


def test_global_shuffle_is_one_permutation_after_another() -> None:
    expected = [(int(row), epoch) for epoch in range(4) for row in generator(SEED, 0, epoch, 0).permutation(13)]
    assert pairs(GlobalShuffle(13, SEED), 0, 52) == expected


def test_shard_shuffle_written_out() -> None:
    sizes, group = [3, 0, 5, 1, 4], 2
    shards = [np.arange(0, 3), np.arange(3, 8), np.arange(8, 9), np.arange(9, 13)]  # the empty one does not count
    expected = []
    for epoch in range(4):
        order = generator(SEED, 0, epoch, 2).permutation(4)
        for number, members in enumerate((order[:2], order[2:])):
            rows = np.concatenate([shards[member] for member in members])
            expected += [(int(row), epoch) for row in generator(SEED, number, epoch, 3).permutation(rows)]
    assert pairs(ShardShuffle(sizes, SEED, group), 0, 52) == expected


def test_balanced_shuffle_written_out() -> None:
    members = [[1, 5], [4, 9], [0, 2, 3, 6, 7, 8, 10]]
    blocks = 4096 // 3  # drawn together
    classes = generator(SEED, 0, 0, 4).permuted(np.tile([0, 1, 2], (blocks, 1)), axis=1)
    expected = []
    for block in range(40):
        for label in classes[block].tolist():
            cycle, turn = divmod(block, len(members[label]))
            rows = generator(SEED, label, cycle, 5).permutation(members[label])
            expected.append((int(rows[turn]), cycle))
    assert pairs(BalancedShuffle(LABELS, SEED), 0, 120) == expected
    later, _ = BalancedShuffle(LABELS, SEED).places(3 * blocks - 30, 60)  # across two draws
    drawn = generator(SEED, 0, 1, 4).permuted(np.tile([0, 1, 2], (blocks, 1)), axis=1)
    np.testing.assert_array_equal(LABELS[later[30:]], np.array([0, 2, 4])[drawn.ravel()[:30]])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8).filter(any),
    group=st.integers(1, 9),
    seed=st.integers(-5, 2**64),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_every_epoch_shows_every_row_once(sizes: list[int], group: int, seed: int, cuts: list[int]) -> None:
    total = sum(sizes)
    for order in (GlobalShuffle(total, seed), ShardShuffle(sizes, seed, group)):
        for epoch in range(3):
            rows, epochs = order.places(epoch * total, total)
            assert sorted(rows) == list(range(total))
            assert set(epochs) == {epoch}
        # Any cut of the stream, read in any direction, is the stream.
        whole = pairs(order, 0, 41)
        ends = [0, *sorted(cuts), 41]
        parts = [pairs(order, a, b - a) for a, b in list(itertools.pairwise(ends))[::-1]]
        assert [pair for part in parts[::-1] for pair in part] == whole


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(-1, 6), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    start=st.integers(0, 300),
    count=st.integers(1, 60),
)
def test_balanced_classes_come_equally_often(labels: list[int], seed: int, start: int, count: int) -> None:
    numbers = np.array(labels)
    present = sorted(set(labels))
    order = BalancedShuffle(numbers, seed)
    whole = pairs(order, 0, 24 * len(present))
    for block in range(24):
        shown = whole[block * len(present) : (block + 1) * len(present)]
        assert sorted(numbers[row] for row, _ in shown) == present
    for label in present:
        members = np.flatnonzero(numbers == label).tolist()
        rows = [(row, epoch) for row, epoch in whole if numbers[row] == label]
        assert len(rows) == 24
        for cycle in range(24 // len(members)):
            part = rows[cycle * len(members) : (cycle + 1) * len(members)]
            assert sorted(part) == [(member, cycle) for member in members]
    assert pairs(order, start, count) == pairs(BalancedShuffle(numbers, seed), 0, start + count)[start:]


def test_balanced_counts_of_a_long_tail() -> None:
    labels = np.repeat(np.arange(50), 2 ** (np.arange(50) % 10))  # 1 to 512 rows
    rows, _ = BalancedShuffle(labels, SEED).places(0, 50 * 512)
    assert np.bincount(labels[rows]).tolist() == [512] * 50
    assert np.bincount(rows).tolist() == (512 // np.bincount(labels))[labels].tolist()


@pytest.mark.parametrize("name", ORDERS)
def test_no_row_repeats_within_its_epoch(name: str) -> None:
    shown = pairs(ORDERS[name](SEED), 0, 2000)
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize("name", ORDERS)
def test_any_place_at_once(name: str) -> None:
    order = ORDERS[name](SEED)
    whole = pairs(order, 0, 200)
    for start in (0, 1, 37, 100, 199):
        assert pairs(ORDERS[name](SEED), start, 200 - start) == whole[start:]
    assert pairs(order, 50, 0) == []
    far = pairs(order, 10**15, 8)
    assert far == pairs(order, 10**15 - 3, 11)[3:]
    assert min(epoch for _, epoch in far) > 10**12


@pytest.mark.parametrize("name", ORDERS)
def test_pickling_keeps_the_order_and_drops_the_permutations(name: str) -> None:
    order = ORDERS[name](SEED)
    whole = pairs(order, 0, 100)
    copy = pickle.loads(pickle.dumps(order))
    assert copy.size == order.size
    assert pairs(copy, 40, 60) == whole[40:]
    assert pairs(order, 40, 60) == whole[40:]


def test_what_is_held() -> None:
    order = GlobalShuffle(100_000, SEED)
    for epoch in range(5):
        order.places(epoch * 100_000, 10)
    assert [array.nbytes for array in order._permutation._kept.values()] == [400_000] * 2
    assert len(pickle.dumps(order)) < 1000
    shards = ShardShuffle([1000] * 100, SEED, 4)
    for place in range(0, 100_000, 500):
        shards.places(place, 1000)
    assert [array.nbytes for array in shards._rows._kept.values()] == [16_000] * 2


@pytest.mark.parametrize("name", ORDERS)
def test_seed_changes_everything(name: str) -> None:
    first, second = ORDERS[name](1).places(0, 3000)[0], ORDERS[name](2).places(0, 3000)[0]
    # By chance two independent orders agree in one place of 2 (rows of a small class) to 19.
    assert (first == second).mean() < 0.3
    assert (first[:60] != second[:60]).sum() > 30


def test_parts_differ_from_each_other() -> None:
    for make in (
        lambda part: GlobalShuffle(400, SEED, part=part),
        lambda part: ShardShuffle([100] * 4, SEED, 4, part=part),
        lambda part: BalancedShuffle(np.arange(400) % 2, SEED, part=part),
    ):
        assert (make(0).places(0, 400)[0] == make(1).places(0, 400)[0]).mean() < 0.05


def test_global_random_state_is_untouched() -> None:
    before = np.random.get_state()[1].copy()
    for make in ORDERS.values():
        make(SEED).places(0, 100)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    group=st.integers(1, 5),
    start=st.integers(0, 150),
    count=st.integers(1, 25),
)
def test_shards_at_names_what_is_read(sizes: list[int], group: int, start: int, count: int) -> None:
    order = ShardShuffle(sizes, SEED, group)
    filled = [shard for shard, size in enumerate(sizes) if size]
    groups, end = [], 0  # (shards, end) of the groups of the stream, written out
    for epoch in range(180):
        drawn = generator(SEED, 0, epoch, 2).permutation(len(filled))
        for first in range(0, len(filled), group):
            shards = [filled[shard] for shard in drawn[first : first + group]]
            end += sum(sizes[shard] for shard in shards)
            groups.append((shards, end))
    at = [next(number for number, (_, end) in enumerate(groups) if place < end) for place in range(176)]
    touched = range(at[start], at[start + count - 1] + 1)
    named = order.shards_at(start, count)
    assert named == list(dict.fromkeys(shard for number in touched for shard in groups[number][0]))
    assert order.upcoming(start, count) == groups[touched[-1] + 1][0]
    assert set(np.repeat(np.arange(len(sizes)), sizes)[order.places(start, count)[0]]) <= set(named)


def test_few_shards_at_a_time() -> None:
    order = ShardShuffle([100] * 12, SEED, 3)
    for start in range(0, 3600, 60):
        shards = {int(row) // 100 for row in order.places(start, 60)[0]}
        crosses = start // 300 != (start + 59) // 300
        assert len(shards) <= (6 if crosses else 3)
        assert set(order.shards_at(start, 60)) == shards or len(shards) < 3
    assert sum(len(order.shards_at(start, 300)) for start in range(0, 1200, 300)) == 12
    assert order.shards_at(0, 0) == []


def test_shard_shuffle_shuffles() -> None:
    order = ShardShuffle([64] * 16, SEED, 4)
    neighbours, places, firsts = 0, 0, Counter()
    for epoch in range(400):
        shards = order.places(epoch * 1024, 256)[0] // 64
        firsts[int(shards[0])] += 1
        neighbours += int((shards[1:] == shards[:-1]).sum())
        places += 255
    # Two neighbours are of one shard with probability 63/255.
    assert neighbours / places == pytest.approx(63 / 255, abs=0.01)
    # The first shard is uniform: chi-squared of 15 degrees of freedom, 37.7 at 0.1 %.
    assert sum((firsts[shard] - 25) ** 2 / 25 for shard in range(16)) < 37.7


def test_balanced_blocks_are_shuffled_evenly() -> None:
    rows, _ = BalancedShuffle(np.array([0, 1, 2]), SEED).places(0, 3 * 3000)
    counts = Counter(map(tuple, rows.reshape(-1, 3).tolist()))
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5  # 5 degrees of freedom, 0.1 %


def test_buckets_are_never_mixed() -> None:
    order = bucketed()
    owner = np.repeat([0, 1, 2], [10, 3, 6])
    owner[[18, 10, 14]], owner[[11, 12, 13, 15, 16, 17]] = 1, 2
    # 10, 3 and 6 rows in batches of 4: 2.5 -> 3, 0.75 -> 1, 1.5 -> 2 steps a round.
    rounds, kinds_of_rounds = 30, set()
    for turn in range(rounds):
        kinds = []
        for step in range(6 * turn, 6 * turn + 6):
            rows, _ = order.step_places(step)
            assert len(rows) == 4
            assert len(set(owner[rows])) == 1
            kinds.append(int(owner[rows[0]]))
        assert sorted(kinds) == [0, 0, 0, 1, 2, 2]
        kinds_of_rounds.add(tuple(kinds))
    assert len(kinds_of_rounds) > 15  # of 60 possible orders


def test_each_bucket_follows_its_own_order() -> None:
    order = bucketed()
    rows, epochs = order.places(0, 6 * 4 * 10)
    for bucket, members, size in (
        (GlobalShuffle(10, SEED), np.arange(10), 10),
        (ShardShuffle([2, 1], SEED, 1, part=1), np.array([18, 10, 14]), 3),
        (GlobalShuffle(6, SEED, part=2), np.array([11, 12, 13, 15, 16, 17]), 6),
    ):
        own = np.isin(rows, members)
        expected, own_epochs = bucket.places(0, int(own.sum()))
        np.testing.assert_array_equal(rows[own], members[expected])
        np.testing.assert_array_equal(epochs[own], own_epochs)
        for epoch in range(int(own.sum()) // size):
            assert sorted(rows[own][epochs[own] == epoch]) == sorted(members)


def test_shares_of_a_bucketed_step() -> None:
    order = bucketed()
    for step in range(20):
        whole = list(zip(*order.step_places(step), strict=True))
        halves = [list(zip(*order.step_places(step, first, 2), strict=True)) for first in (0, 2)]
        assert halves[0] + halves[1] == whole
        assert pairs(order, 4 * step + 1, 3) == whole[1:]


def test_bucketed_proportions_of_large_buckets() -> None:
    order = BucketedOrder([GlobalShuffle(1000, 0), GlobalShuffle(250, 0, part=1)], [0, 1000], 0, 10)
    rows, _ = order.places(0, 2 * 1250)
    assert np.bincount(rows, minlength=1250).tolist() == [2] * 1250


def test_empty_buckets_are_left_out() -> None:
    order = BucketedOrder([GlobalShuffle(0, 0), GlobalShuffle(5, 0)], [0, 0], 0, 5)
    assert order.size == 5
    assert sorted(order.places(0, 5)[0]) == [0, 1, 2, 3, 4]
    assert BucketedOrder([], [], 0, 5).size == 0


def test_errors_and_empty_datasets() -> None:
    assert GlobalShuffle(0, 0).size == ShardShuffle([], 0, 1).size == BalancedShuffle(np.array([], int), 0).size == 0
    with pytest.raises(UserError, match="shuffle group is 0"):
        ShardShuffle([1], 0, 0)
    with pytest.raises(UserError, match="global batch is 0"):
        BucketedOrder([GlobalShuffle(5, 0)], [0], 0, 0)
