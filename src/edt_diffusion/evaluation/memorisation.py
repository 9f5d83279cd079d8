"""Whether generated pictures are copies of the training pictures.

Every generated picture is compared with its nearest training picture. Distances are Euclidean, either between pixels
(values in [0, 1], pictures above 32 pixels reduced to 32 by averaging areas) or between an extractor's features.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..util import rng
from ..util.errors import UserError
from .extractors.base import Extractor
from .neighbours import nearest_in_parts, nearest_neighbours
from .pixels import PictureSource, Progress, area_reduced, as_source, colour_tensor

__all__ = ["CopySearch", "Memorisation", "Pair", "memorisation", "nearest_neighbours"]

SIDE = 32
NEAR_COPY = 2 / 255
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_BLOCK = 128
_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Pair:
    """A generated picture and the training picture nearest to it.

    Attributes:
        generated: index of the generated picture.
        training: index of the training picture.
        mirrored: whether it is the mirrored training picture that is nearest.
        distance: between them, in the report's space.
        rms: root of the mean squared difference of their pixels at full size, values in [0, 1].
    """

    generated: int
    training: int
    mirrored: bool
    distance: float
    rms: float


@dataclass(frozen=True)
class Memorisation:
    """How near generated pictures are to the training pictures.

    Attributes:
        space: what distances are measured in, in one line.
        mirrored: whether mirrored training pictures count as training pictures.
        generated: how many generated pictures.
        training: how many training pictures.
        baseline: "held-out" (other real pictures to the training ones) or "leave-one-out" (training pictures to the
            others, which says how dense the training set is, and less how new a picture can be).
        baseline_count: of how many pictures it is.
        ratio: median distance of generated pictures to the nearest training picture, over the baseline's. Near 1: as
            new as unseen real pictures; near 0: copies. None if the baseline's median is 0: half of it are duplicates.
        copied: share of generated pictures that are no farther from their training neighbour than it is from any other
            training picture; AuthPct of Alaa et al. (arXiv 2102.08921) is 1 minus it. Real unseen pictures are not at
            0 either.
        baseline_copied: the same share of the held-out pictures; None without them.
        exact_copies: generated pictures whose pixels are all equal to those of their neighbour.
        near_copies: those whose pixels differ from their neighbour's by an RMS below 2/255, exact ones included.
        quantiles: of the distances, by probability.
        baseline_quantiles: of the baseline's distances.
        pairs: the closest, by distance.
    """

    space: str
    mirrored: bool
    generated: int
    training: int
    baseline: str
    baseline_count: int
    ratio: float | None
    copied: float
    baseline_copied: float | None
    exact_copies: int
    near_copies: int
    quantiles: dict[str, float]
    baseline_quantiles: dict[str, float]
    pairs: list[Pair]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return dataclasses.asdict(self)


def memorisation(
    generated: np.ndarray | PictureSource,
    training: np.ndarray | PictureSource,
    held_out: np.ndarray | PictureSource | None = None,
    extractor: Extractor | None = None,
    mirrored: bool = True,
    closest: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Memorisation:
    """Compare one set of generated pictures with the training pictures; see `CopySearch` and its `compare`."""
    return CopySearch(training, held_out, extractor, mirrored).compare(generated, closest, seed, progress)


class CopySearch:
    """The training pictures, in which copies are looked for; what distances need of them is computed once.

    Args:
        training: uint8 (N, H, W, C), or a source such as `ImageDataset` that is read block by block.
        held_out: real pictures that were not trained on, of the same size. Without them the baseline is drawn from the
            training pictures themselves, as many as there are generated ones, each compared with all others.
        extractor: measure distances between its pooled features; None measures them between pixels.
        mirrored: training pictures were shown mirrored too: also compare with those.

    Raises:
        UserError: an empty set, a single training picture, or pictures of different sizes.
    """

    def __init__(
        self,
        training: np.ndarray | PictureSource,
        held_out: np.ndarray | PictureSource | None = None,
        extractor: Extractor | None = None,
        mirrored: bool = True,
    ) -> None:
        self.training = as_source(training)
        self.held_out = None if held_out is None else as_source(held_out)
        self.mirrored = mirrored
        _check_count("training", self.training, 2)
        self._shape = self.training.images([0]).shape[1:]
        if self.held_out is not None:
            self._check("held-out", self.held_out)
        self._space = _Space(extractor, self._shape)
        self._references: list[np.ndarray] = []
        self._usual: tuple[_Found, float] | None = None

    @property
    def space(self) -> str:
        """What distances are measured in, in one line."""
        return self._space.description

    @property
    def baseline(self) -> str:
        """As in the report."""
        return "leave-one-out" if self.held_out is None else "held-out"

    def compare(
        self,
        generated: np.ndarray | PictureSource,
        closest: int = 10,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Memorisation:
        """Compare generated pictures with the training pictures.

        Args:
            generated: as the training pictures, of the same size.
            closest: how many of the closest pairs to keep.
            seed: of the draw of the baseline.
            progress: told (pictures done, in all) of one set after the other.

        Raises:
            UserError: an empty set, or pictures of another size.
        """
        made, space = as_source(generated), self._space
        self._check("generated", made)
        if not self._references:
            flips = (False, True) if self.mirrored else (False,)
            self._references = [space.vectors(self.training, flip, progress) for flip in flips]
        found = _neighbours(space.vectors(made, False, progress), self._references, space, None)
        copied = _copied(found, self._references, space)
        baseline, baseline_copied = self._baseline(len(made), seed, progress)
        rms = _pixel_rms(made, self.training, found)
        order = np.argsort(found.distances, kind="stable")[:closest].tolist()
        usual = float(np.median(baseline.distances))
        return Memorisation(
            space=space.description,
            mirrored=self.mirrored,
            generated=len(made),
            training=len(self.training),
            baseline=self.baseline,
            baseline_count=len(baseline.distances),
            ratio=float(np.median(found.distances)) / usual if usual > 0 else None,
            copied=copied,
            baseline_copied=baseline_copied,
            exact_copies=int((rms == 0).sum()),
            near_copies=int((rms < NEAR_COPY).sum()),
            quantiles=_quantiles(found.distances),
            baseline_quantiles=_quantiles(baseline.distances),
            pairs=[
                Pair(i, int(found.rows[i]), bool(found.mirrored[i]), float(found.distances[i]), float(rms[i]))
                for i in order
            ],
        )

    def _baseline(self, generated: int, seed: int, progress: Progress | None) -> "tuple[_Found, float | None]":
        references, space = self._references, self._space
        if self.held_out is None:
            count = min(generated, len(self.training))
            rows = np.sort(rng.stream(seed, rng.Purpose.SUBSET).permutation(len(self.training))[:count])
            return _neighbours(references[0][rows], references, space, rows), None
        if self._usual is None:
            found = _neighbours(space.vectors(self.held_out, False, progress), references, space, None)
            self._usual = found, _copied(found, references, space)
        return self._usual

    def _check(self, name: str, source: PictureSource) -> None:
        _check_count(name, source, 1)
        shape = source.images([0]).shape[1:]
        if shape != self._shape:
            raise UserError(
                f"{name} pictures are of shape {shape}, training pictures of {self._shape} (height, width, channels): "
                "open them at the same size"
            )


def _check_count(name: str, source: PictureSource, needed: int) -> None:
    if len(source) < needed:
        raise UserError(f"{len(source)} {name} pictures: expected at least {needed}")


@dataclass(frozen=True)
class _Found:
    """The nearest training picture of each query: distance, row of the training set, and whether it is mirrored."""

    distances: np.ndarray
    rows: np.ndarray
    mirrored: np.ndarray


class _Space:
    """What distances are measured in: stored vectors, and how they become float64."""

    def __init__(self, extractor: Extractor | None, shape: tuple[int, ...]) -> None:
        self._extractor = extractor
        self._encode: Callable[[np.ndarray], np.ndarray] = self._pixels if extractor is None else self._features
        self.scale = 1 / 255 if extractor is None else 1.0
        if extractor is not None:
            self.description = f"features of {extractor.name} (sha256 {extractor.sha256[:12]})"
        elif max(shape[:2]) > SIDE:
            self.description = f"pixels in [0, 1], reduced to {SIDE} by averaging areas"
        else:
            self.description = "pixels in [0, 1]"

    def vectors(self, pictures: PictureSource, mirrored: bool, progress: Progress | None) -> np.ndarray:
        """(N, D) of all pictures: uint8 pixels or float32 features; in a nameless file if they are very many."""
        out = np.empty((0, 0))
        for start in range(0, len(pictures), _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, len(pictures)))
            images = pictures.images(rows)
            block = self._encode(images[:, :, ::-1] if mirrored else images)
            if start == 0:
                out = _room((len(pictures), block.shape[1]), block.dtype)
            out[rows] = block
            if progress is not None:
                progress(int(rows[-1]) + 1, len(pictures))
        return out

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        return area_reduced(images, SIDE).reshape(len(images), -1)

    def _features(self, images: np.ndarray) -> np.ndarray:
        assert self._extractor is not None
        return self._extractor(colour_tensor(images)).pooled.numpy()


def _room(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    if shape[0] * shape[1] * dtype.itemsize <= _MEMORY_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:  # the map keeps it alive
        return np.memmap(file, dtype, "w+", shape=shape)


def _neighbours(queries: np.ndarray, references: list[np.ndarray], space: _Space, own: np.ndarray | None) -> _Found:
    """The nearest of the references, plain or mirrored; `own` rows, likewise, are left out."""
    count = len(references[0])
    distances, found = nearest_in_parts(queries, references, 1, space.scale, own)
    return _Found(distances[:, 0], found[:, 0] % count, found[:, 0] >= count)


def _copied(found: _Found, references: list[np.ndarray], space: _Space) -> float:
    """Share of queries no farther from their neighbour than it is from the nearest other training picture."""
    places = found.rows + found.mirrored * len(references[0])
    needed, back = np.unique(places, return_inverse=True)
    rows, flags = needed % len(references[0]), needed // len(references[0])
    neighbours = np.stack([references[flag][row] for row, flag in zip(rows, flags, strict=True)])
    others = _neighbours(neighbours, references, space, rows)
    return float((found.distances <= others.distances[back]).mean())


def _pixel_rms(made: PictureSource, trained: PictureSource, found: _Found) -> np.ndarray:
    """float64 (N,): RMS difference of the pixels of each pair at full size, values in [0, 1]."""
    rms = np.empty(len(made))
    for start in range(0, len(made), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(made)))
        neighbours, flags = trained.images(found.rows[rows]), found.mirrored[rows]
        neighbours[flags] = neighbours[flags, :, ::-1]
        difference = (made.images(rows).astype(np.float64) - neighbours) / 255
        rms[rows] = np.sqrt(np.square(difference).mean(axis=(1, 2, 3)))
    return rms


def _quantiles(distances: np.ndarray) -> dict[str, float]:
    return {f"{p:g}": float(q) for p, q in zip(QUANTILES, np.quantile(distances, QUANTILES), strict=True)}
