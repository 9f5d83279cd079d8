"""Features of the pictures that a search makes, in blocks on the disk: what is made is never made again.

In `features/` lies a folder for each setting, and in it `search-00000.npz` and so on, one for each batch of pictures:
the pooled features, class scores where the extractor has them, seconds and network passes that the pictures took.
Pictures of the confirmation (`confirm-...`) have seeds of their own.
"""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...evaluation.extract import joined
from ...evaluation.extractors import Extractor
from ...evaluation.feature_set import FeatureSet
from ...evaluation.pixels import colour_tensor
from ...nn.modulation import AttentionModulation
from ...pipelines import ClassConditionalPipeline
from ...sampling.samples import Samples
from ...sampling.settings import SamplingSetting
from ...util.errors import UserError
from ...util.files import atomic_write_bytes, make_folder
from ...util.rng import Purpose, image_generators, image_seed, stream
from .candidates import words

Use = Literal["search", "confirm"]

# Number of the first picture of a confirmation: no search gets so far.
FRESH = 1 << 40


@dataclass
class Cost:
    """What pictures took.

    Attributes:
        pictures: how many.
        passes: of the network, one for each picture, step and half of guidance.
        seconds: of sampling.
    """

    pictures: int = 0
    passes: int = 0
    seconds: float = 0.0


def spread_labels(count: int, classes: int | None, seed: int, start: int = 0) -> np.ndarray | None:
    """Classes of pictures `start` to `start` + `count` - 1: each class once in every run of so many, in random orders.

    The first pictures of a longer list have the same classes, and 200 of 1,000 classes are 200 random ones.

    Returns:
        int64 (count,), or None for an unconditional model.
    """
    if classes is None:
        return None
    first, last = start // classes, (start + count - 1) // classes
    orders = [
        stream(seed, Purpose.LABEL, step=2, position=turn).permutation(classes) for turn in range(first, last + 1)
    ]
    return np.concatenate(orders)[start - first * classes :][:count].astype(np.int64)


class SampledFeatures:
    """Features of samples with any modulation, from the same seeds and classes.

    Args:
        folder: where they are kept; of one question and no other.
        pipeline: the model, its network in the precision wanted.
        setting: of the sampling; its `amm` is "saved".
        extractor: of the features.
        seed: of the pictures.
        batch: pictures made at once, and rows of a block.
        most: pictures of a candidate at most, in the search and in the confirmation.
        told: called with the pictures that there are after each block.
    """

    def __init__(
        self,
        folder: Path,
        pipeline: ClassConditionalPipeline,
        setting: SamplingSetting,
        extractor: Extractor,
        seed: int,
        batch: int,
        most: dict[Use, int],
        told: Callable[[int], None] | None = None,
    ) -> None:
        self.folder, self.pipeline, self.extractor, self.batch = folder / "features", pipeline, extractor, batch
        self.told = told
        self.classes = pipeline.transformer.config.num_classes
        self.costs: dict[Use, Cost] = {"search": Cost(), "confirm": Cost()}
        self._counted: set[Path] = set()
        self._samples: dict[Use, Samples] = {}
        self._seeds: dict[Use, list[int]] = {}
        starts: dict[Use, int] = {"search": 0, "confirm": FRESH}
        for use, start in starts.items():
            labels = spread_labels(most[use], self.classes, seed, start)
            seeds = self._seeds[use] = [image_seed(seed, start + number) for number in range(most[use])]
            self._samples[use] = Samples(pipeline, setting, labels, most[use], seed, batch, seeds=seeds)

    def facts(self) -> dict[str, Any]:
        """How the pictures are made, the modulation left out."""
        facts = self._samples["search"].facts()
        return {name: value for name, value in facts.items() if name != "attention_modulation"}

    def pictures(self) -> int:
        """How many were made, by this or an earlier process, and used so far."""
        return sum(cost.pictures for cost in self.costs.values())

    def __call__(self, modulation: AttentionModulation | None, count: int, use: Use = "search") -> FeatureSet:
        """Features of the first `count` pictures, a multiple of the batch."""
        assert count % self.batch == 0
        folder = self.folder / words(modulation).replace(" ", "_")
        parts = []
        for number in range(count // self.batch):
            path = folder / f"{use}-{number:05d}.npz"
            arrays = _read(path, self.batch)
            if arrays is None:
                make_folder(folder)
                arrays = self._make(modulation, number, use)
                _write(path, arrays)
            self._count(path, arrays, use)
            parts.append({name: arrays[name] for name in ("pooled", "logits") if name in arrays})
        labels = self._samples[use].labels
        found = joined(parts, None if labels is None else labels[:count])
        # With fewer pictures than classes it is chance which classes there are.
        stratified = self.classes is not None and count >= self.classes
        return FeatureSet(found.statistics, found.pooled, found.logits, None, found.labels, stratified)

    def noise(self, count: int) -> FeatureSet:
        """Features of what the samples of a confirmation begin from: their starting noise, taken for pictures."""
        parts = []
        for start in range(0, count, self.batch):
            generators = image_generators(self._seeds["confirm"][start : start + self.batch])
            draws = [torch.randn(self.pipeline.sample_shape, generator=generator) for generator in generators]
            with torch.no_grad():
                pictures = self.pipeline.decode(torch.stack(draws).to(self.pipeline.device), "uint8")
            parts.append({"pooled": self._features(pictures)["pooled"]})
        return joined(parts, None)

    def _make(self, modulation: AttentionModulation | None, number: int, use: Use) -> dict[str, np.ndarray]:
        network, passes = self.pipeline.transformer, [0]

        def count(_module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            passes[0] += len(given[0] if given else named["hidden_states"])

        handle = network.register_forward_pre_hook(count, with_kwargs=True)
        try:
            with network.use_attention_modulation(modulation):
                start = number * self.batch
                pictures, seconds = self._samples[use].make(start, start + self.batch)
        finally:
            handle.remove()
        taken = {"seconds": np.float64(seconds), "passes": np.int64(passes[0])}
        return {**self._features(pictures), **taken}

    def _features(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        found = self.extractor(colour_tensor(pictures))
        arrays = {"pooled": found.pooled.numpy()}
        if found.logits is not None:
            arrays["logits"] = found.logits.numpy()
        if not np.isfinite(arrays["pooled"]).all():
            raise UserError(
                f"extractor {self.extractor.name!r} gives NaN or infinite features for pictures of shape "
                f"{pictures.shape[1:]}: use another one"
            )
        return arrays

    def _count(self, path: Path, arrays: dict[str, np.ndarray], use: Use) -> None:
        if path in self._counted:
            return
        self._counted.add(path)
        cost = self.costs[use]
        cost.pictures += self.batch
        cost.passes += int(arrays["passes"])
        cost.seconds += float(arrays["seconds"])
        if self.told is not None:
            self.told(self.pictures())


def _read(path: Path, rows: int) -> dict[str, np.ndarray] | None:
    """A block, or None where there is none or a damaged one."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return found if len(found.get("pooled", ())) == rows and {"seconds", "passes"} <= set(found) else None


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    atomic_write_bytes(path, buffer.getvalue())
