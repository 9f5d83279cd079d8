import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edt_diffusion.data.images import ImageDataset, open_images
from edt_diffusion.data.loader import Batch, Place, Places, StepBatchSampler, TrainingSamples, training_loader
from edt_diffusion.data.order import BalancedShuffle, BucketedOrder, GlobalShuffle, Order, ShardShuffle
from edt_diffusion.models.masking import MaskPlan
from edt_diffusion.objectives import LearnedVarianceObjective, MaskedTraining, UniformTimesteps
from edt_diffusion.util.errors import UserError

SEED = 11
COUNT = 10


def stored_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 4, 6, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for index, values in enumerate(stored_pixels()):
        folder = root / ("a" if index < 4 else "b")
        folder.mkdir(exist_ok=True)
        Image.fromarray(values).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module", params=["memory", "none"])
def pictures(request: pytest.FixtureRequest, root: Path) -> ImageDataset:
    return open_images(root, size=(4, 6), cache=request.param)


class Latents:
    """Rows whose values tell which row, epoch, seed and flip they were asked for, and in which process."""

    def __init__(self, count: int, *, labels: np.ndarray | None = None, bad_row: int = -1) -> None:
        self.count = count
        self.labels = labels
        self.bad_row = bad_row

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int, flip: bool) -> torch.Tensor:
        assert indices.dtype == epochs.dtype == np.int64
        if self.bad_row in indices:
            raise UserError(f"row {self.bad_row} is damaged: encode it again")
        numbers = np.stack([indices, epochs, np.full_like(indices, seed), np.full_like(indices, flip)])
        pid = np.full_like(indices, os.getpid())
        return torch.from_numpy(np.stack([*numbers, pid], axis=1).astype(np.float32))[:, :, None, None]


LABELS = np.array([0, 1, 1, 1, 2, 2, 0, 1, 1, 1, 1, 1, 2, 1, 1, 2, 2, 2, 1])


def bucketed(global_batch: int) -> BucketedOrder:
    return BucketedOrder([GlobalShuffle(13, SEED), GlobalShuffle(6, SEED, part=1)], [0, 13], SEED, global_batch)


ORDERS: dict[str, Callable[[], Order]] = {
    "global": lambda: GlobalShuffle(19, SEED),
    "shards": lambda: ShardShuffle([4, 7, 2, 6], SEED, 2),
    "balanced": lambda: BalancedShuffle(LABELS, SEED),
    "bucketed": lambda: bucketed(12),
}


def full_order(size: int, seed: int, epochs: int) -> list[tuple[int, int]]:
    """(index, epoch) of the endless stream, from numpy's Philox directly: purpose 6 is ORDER."""
    stream = []
    for epoch in range(epochs):
        generator = np.random.Generator(np.random.Philox(counter=[0, 0, epoch, 0], key=[seed, 6]))
        stream += [(int(index), epoch) for index in generator.permutation(size)]
    return stream


def sampler_of(size: int, **options: int) -> StepBatchSampler:
    return StepBatchSampler(GlobalShuffle(size, SEED), **options)


def steps(sampler: StepBatchSampler, count: int) -> list[list[Place]]:
    return [list(places) for places in itertools.islice(sampler, count)]


def take(batches: Iterator, count: int) -> list:
    return list(itertools.islice(batches, count))


def content(batch: Batch) -> tuple[list, list | None, list[int]]:
    """Everything of a batch of `Latents` but the process it came from."""
    labels = batch["class_labels"]
    return batch["inputs"][:, :4, 0, 0].tolist(), None if labels is None else labels.tolist(), batch["positions"]


@pytest.mark.parametrize(("size", "global_batch"), [(10, 4), (7, 6), (3, 8), (5, 5)])
def test_order_is_the_permutations_one_after_another(size: int, global_batch: int) -> None:
    batches = steps(sampler_of(size, global_batch=global_batch), 9)
    assert all(len(batch) == global_batch for batch in batches)
    places = [place for batch in batches for place in batch]
    expected = full_order(size, SEED, 9 * global_batch // size + 1)[: len(places)]
    assert [(place.index, place.epoch) for place in places] == expected
    assert [place.position for place in places] == list(range(global_batch)) * 9


@pytest.mark.parametrize("name", ORDERS)
def test_ranks_together_are_one_process(name: str) -> None:
    whole = steps(StepBatchSampler(ORDERS[name](), global_batch=12), 12)
    ranks = [steps(StepBatchSampler(ORDERS[name](), global_batch=12, rank=r, world_size=3), 12) for r in range(3)]
    for step in range(12):
        assert ranks[0][step] + ranks[1][step] + ranks[2][step] == whole[step]
        assert [place.position for place in whole[step]] == list(range(12))


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(["global", "shards", "balanced"]),
    world_size=st.integers(1, 4),
    micro_batches=st.integers(1, 3),
    micro_size=st.integers(1, 5),
)
def test_nothing_is_lost_or_shown_twice(name: str, world_size: int, micro_batches: int, micro_size: int) -> None:
    order = ORDERS[name]()
    global_batch = world_size * micro_batches * micro_size
    ranks = [
        StepBatchSampler(
            ORDERS[name](), global_batch=global_batch, rank=rank, world_size=world_size, micro_batches=micro_batches
        )
        for rank in range(world_size)
    ]
    shares = [steps(rank, 5 * micro_batches) for rank in ranks]
    shown = []
    for step in range(5):
        for share in shares:
            micro = share[step * micro_batches : (step + 1) * micro_batches]
            assert {len(part) for part in micro} == {micro_size}
            shown += [place for part in micro for place in part]
    assert [place.position for place in shown] == list(range(global_batch)) * 5
    rows, epochs = order.places(0, 5 * global_batch)
    assert [(place.index, place.epoch) for place in shown] == list(zip(rows.tolist(), epochs.tolist(), strict=True))


@pytest.mark.parametrize("name", ORDERS)
def test_any_start_step_gives_the_tail(name: str) -> None:
    whole = steps(StepBatchSampler(ORDERS[name](), global_batch=12), 12)
    for start in range(12):
        sampler = StepBatchSampler(ORDERS[name](), global_batch=12, start_step=start)
        assert steps(sampler, 12 - start) == whole[start:]
        assert steps(sampler, 1) == whole[start : start + 1]  # each iteration begins anew


def test_micro_batches_split_a_share() -> None:
    whole = steps(sampler_of(10, global_batch=12, rank=1, world_size=2), 4)
    parts = steps(sampler_of(10, global_batch=12, rank=1, world_size=2, micro_batches=3), 12)
    assert {len(part) for part in parts} == {2}
    assert [parts[3 * s] + parts[3 * s + 1] + parts[3 * s + 2] for s in range(4)] == whole


def test_places() -> None:
    places = sampler_of(10, global_batch=8, start_step=1).places(1)
    single = list(places)
    assert all(type(number) is int for place in single for number in place)
    assert list(places[2:5]) == single[2:5]
    assert places[-1] == single[-1]
    np.testing.assert_array_equal(Places.of(single).epochs, [0, 0, 1, 1, 1, 1, 1, 1])
    assert Places.of(places) is places
    assert len(Places.of([])) == 0
    assert (places.step, places[2:5].step, Places.of(single).step) == (1, 1, None)


def test_sampler_errors() -> None:
    def message(**changes: int) -> str:
        arguments = {"size": 10, "global_batch": 8, **changes}
        with pytest.raises(UserError) as caught:
            sampler_of(arguments.pop("size"), **arguments)
        return str(caught.value)

    assert "global batch 8 cannot be split evenly over 3 processes" in message(world_size=3)
    assert "such as 9" in message(world_size=3)
    assert "8 is 4 per process, which cannot be split into 3" in message(world_size=2, micro_batches=3)
    assert "such as 12" in message(world_size=2, micro_batches=3)
    assert "empty" in message(size=0)
    assert "at least 1" in message(global_batch=0)
    assert "at least 1" in message(micro_batches=0)
    for wrong in ({"rank": 1}, {"rank": -1}, {"start_step": -1}):
        with pytest.raises(ValueError, match="out of range"):
            sampler_of(10, global_batch=8, **wrong)
    with pytest.raises(ValueError, match="global batch is 12, the sampler's 6"):
        StepBatchSampler(bucketed(12), global_batch=6)


def test_batches_hold_the_right_pictures(pictures: ImageDataset) -> None:
    pixels = stored_pixels()
    order = full_order(COUNT, SEED, 3)
    for step, batch in enumerate(take(training_loader(pictures, seed=SEED, global_batch=4), 6)):
        indices = [index for index, _ in order[4 * step : 4 * step + 4]]
        assert batch["inputs"].dtype == torch.float32
        assert batch["inputs"].is_contiguous()
        expected = (pixels[indices].transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
        np.testing.assert_allclose(batch["inputs"].numpy(), expected, rtol=0, atol=1e-7)
        assert batch["class_labels"] is not None
        assert batch["class_labels"].dtype == torch.int64
        assert batch["class_labels"].tolist() == [0 if index < 4 else 1 for index in indices]
        assert batch["positions"] == [0, 1, 2, 3]


def test_flips_are_keyed_by_seed_epoch_and_index(pictures: ImageDataset) -> None:
    plain = take(training_loader(pictures, seed=SEED, global_batch=COUNT), 20)
    flipped = take(training_loader(pictures, seed=SEED, global_batch=COUNT, flip=True), 20)
    order = full_order(COUNT, SEED, 20)
    flips = 0
    for epoch in range(20):
        for slot, (index, _) in enumerate(order[epoch * COUNT : (epoch + 1) * COUNT]):
            # Purpose 7 is FLIP.
            draw = np.random.Generator(np.random.Philox(counter=[0, index, epoch, 0], key=[SEED, 7])).random()
            image = plain[epoch]["inputs"][slot]
            expected = image.flip(-1) if draw < 0.5 else image
            assert torch.equal(flipped[epoch]["inputs"][slot], expected)
            flips += draw < 0.5
    assert 70 < flips < 130  # 200 draws of 1/2: more than four standard deviations


def test_workers_change_nothing(pictures: ImageDataset) -> None:
    options = {"seed": SEED, "global_batch": 6, "micro_batches": 2, "start_step": 2, "flip": True}
    alone = take(training_loader(pictures, **options), 8)
    helped = take(training_loader(pictures, workers=2, **options), 8)
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a["inputs"], b["inputs"])
        assert torch.equal(a["class_labels"], b["class_labels"])
        assert a["positions"] == b["positions"]


@pytest.mark.parametrize("name", ORDERS)
def test_workers_and_resuming_change_nothing_in_any_order(name: str) -> None:
    data = Latents(19, labels=LABELS)
    rows, epochs = ORDERS[name]().places(0, 10 * 12)
    expected = []
    for start in range(0, 120, 4):
        own = [[float(r), float(e), SEED, 1] for r, e in zip(rows[start:][:4], epochs[start:][:4], strict=True)]
        positions = list(range(start % 12, start % 12 + 4))
        expected.append((own, LABELS[rows[start : start + 4]].tolist(), positions))
    for workers, start_step in ((0, 0), (0, 7), (2, 4)):
        loader = training_loader(
            data, seed=SEED, global_batch=12, order=ORDERS[name](), start_step=start_step, micro_batches=3, flip=True,
            workers=workers,
        )  # fmt: skip
        batches = take(loader, 30 - 3 * start_step)
        assert [content(batch) for batch in batches] == expected[3 * start_step :]
        pids = {int(pid) for batch in batches for pid in batch["inputs"][:, 4, 0, 0].tolist()}
        assert len(pids) == max(1, workers)
        assert (os.getpid() in pids) == (workers == 0)


def told(step: int, positions: list[int]) -> dict[str, object]:
    return {"step": step, "positions": positions, "pid": os.getpid(), "noise": torch.full((2,), float(step))}


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_are_made_where_the_batch_is_made(workers: int) -> None:
    loader = training_loader(
        Latents(19), seed=SEED, global_batch=8, rank=1, world_size=2, micro_batches=2, start_step=5, workers=workers,
        draw=told,
    )  # fmt: skip
    for number, batch in enumerate(take(loader, 8)):
        draws = batch["draws"]
        assert draws["step"] == 5 + number // 2
        assert draws["positions"] == batch["positions"] == [[4, 5], [6, 7]][number % 2]
        assert draws["pid"] == int(batch["inputs"][0, 4, 0, 0])
        assert (draws["pid"] == os.getpid()) == (workers == 0)
        assert draws["noise"].tolist() == [5.0 + number // 2] * 2
    assert "draws" not in next(training_loader(Latents(19), seed=SEED, global_batch=8))


def test_the_draws_of_a_training_step_come_with_the_batch() -> None:
    """In spawned workers too, which get all they need pickled."""
    drawer = MaskedTraining(LearnedVarianceObjective(), UniformTimesteps(1000), MaskPlan()).drawer(
        3, (4, 8, 8), ((4, 4), (2, 2)), conditional=True
    )
    batches = take(training_loader(Latents(19), seed=3, global_batch=4, start_step=2, workers=1, draw=drawer), 2)
    for step, batch in enumerate(batches, start=2):
        expected = drawer(step, [0, 1, 2, 3])
        assert torch.equal(batch["draws"].u, expected.u)
        for got, own in zip(batch["draws"].passes, expected.passes, strict=True):
            assert torch.equal(got.noise, own.noise)
            assert torch.equal(got.dropped, own.dropped)
        assert torch.equal(batch["draws"].passes[1].masks.down[0], expected.passes[1].masks.down[0])
    samples = pickle.loads(pickle.dumps(TrainingSamples(Latents(19), seed=3, draw=drawer)))
    sampler = sampler_of(19, global_batch=4, start_step=2)
    assert torch.equal(samples.__getitems__(sampler.places(2))["draws"].u, drawer(2, [0, 1, 2, 3]).u)


def test_ranks_of_a_loader() -> None:
    data = Latents(19)
    whole = take(training_loader(data, seed=SEED, global_batch=8), 6)
    halves = [take(training_loader(data, seed=SEED, global_batch=8, rank=r, world_size=2), 6) for r in range(2)]
    for step in range(6):
        assert torch.equal(torch.cat([halves[0][step]["inputs"], halves[1][step]["inputs"]]), whole[step]["inputs"])
        assert whole[step]["class_labels"] is None


def test_check_is_called_before_each_batch() -> None:
    calls = []

    def check() -> None:
        calls.append(os.getpid())
        if len(calls) == 3:
            raise UserError("shard 7 is damaged: restore it")

    batches = training_loader(Latents(9), seed=SEED, global_batch=4, workers=1, check=check)
    assert calls == []
    take(batches, 2)
    assert calls == [os.getpid()] * 2
    with pytest.raises(UserError, match=r"^shard 7 is damaged: restore it$"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_rows_are_told_in_one_line_when_their_turn_comes(workers: int) -> None:
    order = full_order(20, SEED, 1)
    data = Latents(20, bad_row=order[9][0])
    batches = training_loader(data, seed=SEED, global_batch=4, workers=workers)
    take(batches, 2)
    with pytest.raises(UserError) as caught:
        next(batches)
    assert str(caught.value) == f"row {data.bad_row} is damaged: encode it again"


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_the_data_keep_their_type(workers: int) -> None:
    class Broken(Latents):
        def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int, flip: bool) -> torch.Tensor:
            raise EOFError("the end")

    with pytest.raises(EOFError, match="the end"):
        next(training_loader(Broken(9), seed=SEED, global_batch=4, workers=workers))


def worker_ids(batches: Iterator[Batch], count: int) -> list[int]:
    return [int(batch["inputs"][0, 4, 0, 0]) for batch in take(batches, count)]


def test_workers_outlive_stop_signals() -> None:
    batches = training_loader(Latents(9), seed=SEED, global_batch=4, workers=2)
    pids = worker_ids(batches, 2)
    assert len(set(pids)) == 2
    for _ in range(3):
        for pid in pids:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(pid, number)
        time.sleep(0.1)
        assert set(worker_ids(batches, 10)) == set(pids)
    batches.close()
    wait_for_end(pids)


@pytest.mark.parametrize("ending", ["", "raise SystemExit('stopped')"])
def test_no_worker_holds_up_the_exit(ending: str, tmp_path: Path) -> None:
    """The iterator and a traceback that refers to it are alive when the interpreter ends."""
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np, torch\n"
        "from edt_diffusion.data.loader import training_loader\n"
        "class Data:\n"
        "    labels = None\n"
        "    def __len__(self): return 9\n"
        "    def batch(self, indices, epochs, seed, flip): return torch.zeros(len(indices), 1, 1, 1)\n"
        "batches = training_loader(Data(), seed=0, global_batch=4, workers=2)\n"
        "print(next(batches)['positions'], flush=True)\n"
        f"{ending}\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("[0, 1, 2, 3]")
    assert done.stderr in ("", "stopped\n")
    assert time.monotonic() - begin < 30


# torch raises the news wherever the interpreter happens to be, in a `__del__` too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_told() -> None:
    batches = training_loader(Latents(9), seed=SEED, global_batch=4, workers=1)
    pids = worker_ids(batches, 1)
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # noqa: PT012 - the news may come at once
        os.kill(pids[0], signal.SIGKILL)
        take(batches, 50)


def wait_for_end(pids: list[int]) -> None:
    for _ in range(100):
        if not any(process.pid in pids for process in multiprocessing.active_children()):
            return
        time.sleep(0.05)
    raise AssertionError(f"workers {pids} are still running")


def test_global_random_state_is_untouched(pictures: ImageDataset) -> None:
    torch.manual_seed(0)
    before_torch, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(training_loader(pictures, seed=SEED, global_batch=6, flip=True), 3)
    take(training_loader(pictures, seed=SEED, global_batch=6, order=BalancedShuffle(LABELS[:10], SEED), workers=1), 3)
    assert torch.equal(torch.get_rng_state(), before_torch)
    np.testing.assert_array_equal(np.random.get_state()[1], before_numpy)


def test_unlabelled_pictures(root: Path) -> None:
    dataset = open_images(root / "b", size=(4, 6))
    batch = next(training_loader(dataset, seed=SEED, global_batch=2))
    assert batch["class_labels"] is None
    sample = TrainingSamples(dataset, seed=SEED)[Place(1, 0, 5)]
    assert "label" not in sample
    assert sample["position"].item() == 5


def test_one_sample(pictures: ImageDataset) -> None:
    images = pickle.loads(pickle.dumps(TrainingSamples(pictures, seed=SEED)))  # as spawned workers get it
    assert len(images) == COUNT
    sample = images[Place(9, 3, 7)]
    assert sample["input"].shape == (3, 4, 6)
    assert sample["input"][0, 0, 0].item() == pytest.approx(int(stored_pixels()[9, 0, 0, 0]) / 127.5 - 1, abs=1e-6)
    assert sample["label"].dtype == torch.int64
    assert sample["label"].item() == 1
    assert sample["position"].dtype == torch.int64


def test_loader_errors_come_at_once(pictures: ImageDataset) -> None:
    with pytest.raises(UserError, match="processes"):
        training_loader(pictures, seed=0, global_batch=5, world_size=2)
    with pytest.raises(ValueError, match="order is one of 19 rows"):
        training_loader(pictures, seed=0, global_batch=4, order=GlobalShuffle(19, 0))
