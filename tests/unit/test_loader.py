import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edt_diffusion.data.images import ImageDataset, open_images
from edt_diffusion.data.loader import Place, StepBatchSampler, TrainingImages, training_loader
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


def full_order(size: int, seed: int, epochs: int) -> list[tuple[int, int]]:
    """(index, epoch) of the endless stream, from numpy's Philox directly: purpose 6 is ORDER."""
    stream = []
    for epoch in range(epochs):
        generator = np.random.Generator(np.random.Philox(counter=[0, 0, epoch, 0], key=[seed, 6]))
        stream += [(int(index), epoch) for index in generator.permutation(size)]
    return stream


def steps(sampler: StepBatchSampler, count: int) -> list[list[Place]]:
    return list(itertools.islice(sampler, count))


def take(batches: Iterator, count: int) -> list:
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize(("size", "global_batch"), [(10, 4), (7, 6), (3, 8), (5, 5)])
def test_order_is_the_permutations_one_after_another(size: int, global_batch: int) -> None:
    batches = steps(StepBatchSampler(size, seed=SEED, global_batch=global_batch), 9)
    assert all(len(batch) == global_batch for batch in batches)
    places = [place for batch in batches for place in batch]
    expected = full_order(size, SEED, 9 * global_batch // size + 1)[: len(places)]
    assert [(place.index, place.epoch) for place in places] == expected
    assert [place.position for place in places] == list(range(global_batch)) * 9
    for epoch in range(len(places) // size):
        indices = [place.index for place in places if place.epoch == epoch]
        assert sorted(indices) == list(range(size))
    assert len({tuple(i for i, e in expected if e == epoch) for epoch in range(3)}) > 1  # reshuffled


def test_ranks_together_are_one_process() -> None:
    whole = steps(StepBatchSampler(10, seed=SEED, global_batch=12), 5)
    ranks = [steps(StepBatchSampler(10, seed=SEED, global_batch=12, rank=r, world_size=3), 5) for r in range(3)]
    for step in range(5):
        assert ranks[0][step] + ranks[1][step] + ranks[2][step] == whole[step]


def test_any_start_step_gives_the_tail() -> None:
    whole = steps(StepBatchSampler(7, seed=SEED, global_batch=6), 12)
    for start in range(12):
        sampler = StepBatchSampler(7, seed=SEED, global_batch=6, start_step=start)
        assert steps(sampler, 12 - start) == whole[start:]
        assert steps(sampler, 1) == whole[start : start + 1]  # each iteration begins anew


def test_micro_batches_split_a_share() -> None:
    whole = steps(StepBatchSampler(10, seed=SEED, global_batch=12, rank=1, world_size=2), 4)
    parts = steps(StepBatchSampler(10, seed=SEED, global_batch=12, rank=1, world_size=2, micro_batches=3), 12)
    assert {len(part) for part in parts} == {2}
    assert [parts[3 * s] + parts[3 * s + 1] + parts[3 * s + 2] for s in range(4)] == whole


def test_sampler_keeps_at_most_two_epochs() -> None:
    sampler = StepBatchSampler(3, seed=SEED, global_batch=8)
    steps(sampler, 20)
    assert len(sampler._permutations) == 2


def test_sampler_errors() -> None:
    def message(**changes: int) -> str:
        arguments = {"size": 10, "global_batch": 8, **changes}
        with pytest.raises(UserError) as caught:
            StepBatchSampler(arguments.pop("size"), seed=0, **arguments)
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
            StepBatchSampler(10, seed=0, global_batch=8, **wrong)


def test_batches_hold_the_right_pictures(pictures: ImageDataset) -> None:
    pixels = stored_pixels()
    order = full_order(COUNT, SEED, 3)
    for step, batch in enumerate(take(training_loader(pictures, seed=SEED, global_batch=4), 6)):
        indices = [index for index, _ in order[4 * step : 4 * step + 4]]
        assert batch["images"].dtype == torch.float32
        assert batch["images"].is_contiguous()
        expected = (pixels[indices].transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
        np.testing.assert_allclose(batch["images"].numpy(), expected, rtol=0, atol=1e-7)
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
            image = plain[epoch]["images"][slot]
            expected = image.flip(-1) if draw < 0.5 else image
            assert torch.equal(flipped[epoch]["images"][slot], expected)
            flips += draw < 0.5
    assert 70 < flips < 130  # 200 draws of 1/2: more than four standard deviations


def test_workers_change_nothing(pictures: ImageDataset) -> None:
    options = {"seed": SEED, "global_batch": 6, "micro_batches": 2, "start_step": 2, "flip": True}
    alone = take(training_loader(pictures, **options), 8)
    helped = take(training_loader(pictures, workers=2, **options), 8)
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a["images"], b["images"])
        assert torch.equal(a["class_labels"], b["class_labels"])
        assert a["positions"] == b["positions"]


def test_resumed_loader_continues(pictures: ImageDataset) -> None:
    whole = take(training_loader(pictures, seed=SEED, global_batch=6, flip=True), 7)
    tail = take(training_loader(pictures, seed=SEED, global_batch=6, flip=True, start_step=4), 3)
    for a, b in zip(whole[4:], tail, strict=True):
        assert torch.equal(a["images"], b["images"])


def test_global_random_state_is_untouched(pictures: ImageDataset) -> None:
    torch.manual_seed(0)
    before_torch, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(training_loader(pictures, seed=SEED, global_batch=6, flip=True), 3)
    assert torch.equal(torch.get_rng_state(), before_torch)
    np.testing.assert_array_equal(np.random.get_state()[1], before_numpy)


def test_unlabelled_pictures(root: Path) -> None:
    dataset = open_images(root / "b", size=(4, 6))
    batch = next(training_loader(dataset, seed=SEED, global_batch=2))
    assert batch["class_labels"] is None
    sample = TrainingImages(dataset, seed=SEED)[Place(1, 0, 5)]
    assert "label" not in sample
    assert sample["position"].item() == 5


def test_one_sample(pictures: ImageDataset) -> None:
    images = pickle.loads(pickle.dumps(TrainingImages(pictures, seed=SEED)))  # as spawned workers get it
    assert len(images) == COUNT
    sample = images[Place(9, 3, 7)]
    assert sample["image"].shape == (3, 4, 6)
    assert sample["image"][0, 0, 0].item() == pytest.approx(int(stored_pixels()[9, 0, 0, 0]) / 127.5 - 1, abs=1e-6)
    assert sample["label"].dtype == torch.int64
    assert sample["label"].item() == 1
    assert sample["position"].dtype == torch.int64


def test_loader_errors_come_at_once(pictures: ImageDataset) -> None:
    with pytest.raises(UserError, match="processes"):
        training_loader(pictures, seed=0, global_batch=5, world_size=2)
