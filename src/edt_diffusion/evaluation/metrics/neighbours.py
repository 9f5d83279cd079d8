"""Nearest neighbours and balls of feature vectors, block by block.

Features are moved to have mean 0 and multiplied in float64, where |x - y|² = |x|² + |y|² - 2 x.y keeps 13 digits or
so. A block takes about 0.2 GiB at 2,048 features, whatever the number of pictures.
"""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..feature_set import FeatureSet
from .resampling import Float64

_ROWS, _COLUMNS = 1024, 4096

# Pairs that are held against several radii at a time.
_PAIRS = 1 << 17

# Distances that are equal but for rounding count as equal; relative to the squared lengths.
_TIE = 1e-12

_known: WeakKeyDictionary[FeatureSet, Float64] = WeakKeyDictionary()


def squared_radii(features: FeatureSet, k: int, at_least: int = 0) -> Float64:
    """Squared distance of each picture to its k-th nearest other one: (N,).

    Args:
        features: with `pooled`. Distances are kept for as long as it lives.
        k: which neighbour, from 1.
        at_least: keep so many neighbours for later calls.
    """
    assert features.pooled is not None
    assert len(features.pooled) > k
    found = _known.get(features)
    if found is None or found.shape[1] < k:
        most = min(max(k, at_least), len(features.pooled) - 1)
        found = _known[features] = nearest(features.pooled, most)[0]
    return found[:, k - 1]


def nearest(pooled: np.ndarray, k: int) -> tuple[Float64, NDArray[np.int64]]:
    """Squared distances of each row to its k nearest other rows, ascending, and which rows these are: (N, k) each."""
    centre = _mean(pooled)
    distances, indices = [], []
    for first, rows in _blocks(pooled, centre, _ROWS):
        best = torch.full((len(rows), k), torch.inf, dtype=torch.float64)
        of_best = torch.full((len(rows), k), -1)
        for start, columns in _blocks(pooled, centre, _COLUMNS):
            squared = _squared(rows, columns)
            own = torch.arange(len(rows)) + first - start  # a picture is not its own neighbour; an equal one is
            inside = (own >= 0) & (own < len(columns))
            squared[torch.nonzero(inside)[:, 0], own[inside]] = torch.inf
            best, place = torch.cat((best, squared), dim=1).topk(k, dim=1, largest=False)
            kept = of_best.gather(1, place.clamp_max(k - 1))
            of_best = torch.where(place < k, kept, place - k + start)
        distances.append(best.clamp_min(0.0))
        indices.append(of_best)
    return torch.cat(distances).numpy(), torch.cat(indices).numpy()


def radii_without(pooled: np.ndarray, k: int, left_out: NDArray[np.bool_]) -> Float64:
    """Squared distance of each row to its k-th nearest other row, with several choices of rows left out.

    Spare neighbours of each row stand in for those that are left out. Where they do not suffice, which a fifth of the
    rows drawn at random makes as good as impossible, the farthest of them counts.

    Args:
        pooled: (N, D).
        k: which neighbour, from 1; more than k rows are always left.
        left_out: (R, N), which rows are left out.

    Returns:
        (N, R + 1): with choice r left out in column r, where its rows have -inf; with all rows in the last.
    """
    rows, number = len(pooled), len(left_out)
    squared, index = nearest(pooled, min(k + k // 2 + 14, rows - 1))
    out = np.empty((rows, number + 1))
    out[:, number] = squared[:, k - 1]
    for column, away in enumerate(left_out):
        enough = np.cumsum(~away[index], axis=1) >= k
        place = np.where(enough.any(axis=1), enough.argmax(axis=1), squared.shape[1] - 1)
        out[:, column] = np.where(away, -np.inf, squared[np.arange(rows), place])
    return out


def count_in_balls(
    points: np.ndarray, centres: np.ndarray, squared: Float64, choices: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which points lie in which balls, borders included.

    Args:
        points: (P, D).
        centres: (C, D), of the balls.
        squared: (C,), their squared radii.
        choices: (R, P), points that are counted apart; None takes all, as one choice.

    Returns:
        For each point the number of balls around it, int64 (P,); for each ball that of each choice's points in it,
        int64 (C, R).
    """
    middle = _mean(centres)
    member = torch.ones(1, len(points)) if choices is None else torch.from_numpy(choices).float()
    around, within = np.zeros(len(points), np.int64), np.zeros((len(centres), len(member)), np.int64)
    radii = torch.from_numpy(np.ascontiguousarray(squared))
    for first, rows in _blocks(points, middle, _ROWS):
        for start, columns in _blocks(centres, middle, _COLUMNS):
            inside = _less_slack(rows, columns) <= radii[start : start + len(columns)]
            around[first : first + len(rows)] += inside.sum(dim=1).numpy()
            counts = member[:, first : first + len(rows)] @ inside.float()  # at most 1,024: exact
            within[start : start + len(columns)] += counts.T.numpy().astype(np.int64)
    return around, within


def in_any_ball(points: np.ndarray, centres: np.ndarray, squared: Float64) -> NDArray[np.bool_]:
    """Which points lie in at least one ball, borders included, for several choices of radii at once.

    Args:
        points: (P, D).
        centres: (C, D), of the balls.
        squared: (C, G), their squared radii; of a ball that is not there, -inf.

    Returns:
        (P, G).
    """
    middle = _mean(centres)
    radii = torch.from_numpy(squared)
    largest = radii.max(dim=1).values
    found = torch.zeros(len(points), squared.shape[1])
    for first, rows in _blocks(points, middle, _ROWS):
        hits = found[first : first + len(rows)]
        for start, columns in _blocks(centres, middle, _COLUMNS):
            distances = _less_slack(rows, columns)
            # Few distances are below any radius; of a point that is in a ball for each choice none is looked at.
            near = (distances <= largest[start : start + len(columns)]) & (hits == 0).any(dim=1)[:, None]
            for row, column in zip(*(part.split(_PAIRS) for part in near.nonzero(as_tuple=True)), strict=True):
                inside = distances[row, column][:, None] <= radii[start + column]
                hits.index_add_(0, row, inside.float())
    return (found > 0).numpy()


def _squared(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (R, C) of float64 rows."""
    return torch.addmm((rows * rows).sum(1)[:, None] + (columns * columns).sum(1), rows, columns.T, alpha=-2.0)


def _less_slack(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (R, C), less by what counts as equal."""
    return _squared(rows, columns) - _TIE * ((rows * rows).sum(1)[:, None] + (columns * columns).sum(1)[None, :])


def _mean(pooled: np.ndarray) -> Float64:
    total = np.zeros(pooled.shape[1])
    for start in range(0, len(pooled), _COLUMNS):
        total += pooled[start : start + _COLUMNS].sum(axis=0, dtype=np.float64)
    return total / len(pooled)


def _blocks(pooled: np.ndarray, centre: Float64, size: int) -> Iterator[tuple[int, Tensor]]:
    """Number of the first row, and rows less `centre` in float64, of each block."""
    for start in range(0, len(pooled), size):
        yield start, torch.from_numpy(pooled[start : start + size].astype(np.float64) - centre)
