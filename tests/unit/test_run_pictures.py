"""The pictures behind a run and behind a path are known by one key, and no two sets by the same."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stores import make_pictures
from test_trainer import settings

from edt_diffusion.assemble.run_pictures import RunPictures
from edt_diffusion.evaluation.inputs import Input, dataset_input, open_input
from edt_diffusion.evaluation.reference import content_of


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))


def behind(share: float = 0.0, **data) -> Input:
    run = RunPictures.behind(settings(data=data, validation={"share": share}))
    assert run is not None
    return dataset_input(run.training, run.path, run.preparation, run.key)


@pytest.fixture
def two_splits(tmp_path) -> Path:
    """Two splits of as many pictures of equal size without labels, in one folder."""
    import datasets

    draws = np.random.default_rng(0)

    def split() -> datasets.Dataset:
        images = [Image.fromarray(draws.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(20)]
        return datasets.Dataset.from_dict(
            {"image": images}, features=datasets.Features({"image": datasets.Image()})
        )  # fmt: skip

    datasets.DatasetDict(train=split(), test=split()).save_to_disk(tmp_path / "sets")
    return tmp_path / "sets"


def test_splits_of_equal_length_are_told_apart(two_splits):
    sides = [behind(path=str(two_splits), split=split, label_column=None) for split in ("train", "test")]
    sides += [open_input(two_splits, size=(8, 8), channels=1, split=split, label_column=None)
              for split in ("train", "test")]  # fmt: skip
    found = [content_of(side) for side in sides]
    assert found[0] != found[1]
    assert found[:2] == found[2:]
    assert sides[0].key == sides[2].key
    assert sides[0].key != sides[1].key


def test_the_key_tells_parts_and_preparations_apart(tmp_path):
    folder = str(make_pictures(tmp_path / "pictures", {"ant": 12, "bee": 8}, [(8, 8)]))
    keys = [
        behind(path=folder).key, behind(0.25, path=folder).key, behind(path=folder, limit=10).key,
        behind(path=folder, size=4).key, behind(path=folder, channels=3).key, behind(path=folder, crop="resize").key,
        open_input(folder, channels=1).key,
    ]  # fmt: skip
    assert len({str(key) for key in keys}) == len(keys)
    for index, options in ((0, {}), (2, {"limit": 10}), (5, {"crop": "resize"})):
        assert keys[index] == open_input(folder, size=(8, 8), channels=1, **options).key
