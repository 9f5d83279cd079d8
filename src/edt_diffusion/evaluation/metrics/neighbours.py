"""Nearest neighbours and balls of feature vectors, block by block.

Features are moved to have mean 0 and multiplied in float64, where |x - y|² = |x|² + |y|² - 2 x.y keeps 13 digits or
so. A block takes about 0.2 GiB at 2,048 features, whatever the number of pictures.
"""

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ...util.errors import UserError
from ..feature_set import FeatureSet
from .resampling import Float64

_ROWS, _COLUMNS = 1024, 4096

# Distances that are equal but for rounding count as equal; relative to the squared lengths.
_TIE = 1e-12

_known: WeakKeyDictionary[FeatureSet, Float64] = WeakKeyDictionary()


def squared_radii(features: FeatureSet, k: int, at_least: int = 0) -> Float64:
    """Squared distance of each picture to its k-th nearest other one: (N,).

    Args:
        features: with `pooled`. Distances are kept for as long as it lives.
        k: which neighbour, from 1.
        at_least: keep so many neighbours for later calls.

    Raises:
        UserError: there are fewer than k + 1 pictures.
    """
    assert features.pooled is not None
    if len(features.pooled) < k + 1:
        raise UserError(
            f"{len(features.pooled)} pictures have no {k} neighbours each: expected at least {k + 1}, or a smaller k"
        )
    found = _known.get(features)
    if found is None or found.shape[1] < k:
        most = min(max(k, at_least), len(features.pooled) - 1)
        found = _known[features] = nearest_squared(features.pooled, most)
    return found[:, k - 1]


def nearest_squared(pooled: np.ndarray, k: int) -> Float64:
    """Squared distances of each row to its k nearest other rows, ascending: (N, k)."""
    centre = _mean(pooled)
    kept = []
    for first, rows in _blocks(pooled, centre, _ROWS):
        best = torch.full((len(rows), k), torch.inf, dtype=torch.float64)
        for start, columns in _blocks(pooled, centre, _COLUMNS):
            squared = _squared(rows, columns)
            own = torch.arange(len(rows)) + first - start  # a picture is not its own neighbour; an equal one is
            inside = (own >= 0) & (own < len(columns))
            squared[torch.nonzero(inside)[:, 0], own[inside]] = torch.inf
            best = torch.cat((best, squared), dim=1).topk(k, dim=1, largest=False).values
        kept.append(best.clamp_min(0.0))
    return torch.cat(kept).numpy()


def count_in_balls(points: np.ndarray, centres: np.ndarray, squared: Float64) -> tuple[np.ndarray, np.ndarray]:
    """Which points lie in which balls, borders included.

    Args:
        points: (P, D).
        centres: (C, D), of the balls.
        squared: (C,), their squared radii.

    Returns:
        For each point the number of balls around it, int64 (P,); for each ball that of points in it, int64 (C,).
    """
    middle = _mean(centres)
    around, within = np.zeros(len(points), np.int64), np.zeros(len(centres), np.int64)
    radii = torch.from_numpy(np.ascontiguousarray(squared))
    for first, rows in _blocks(points, middle, _ROWS):
        for start, columns in _blocks(centres, middle, _COLUMNS):
            slack = _TIE * ((rows * rows).sum(1)[:, None] + (columns * columns).sum(1)[None, :])
            inside = _squared(rows, columns) <= radii[start : start + len(columns)] + slack
            around[first : first + len(rows)] += inside.sum(dim=1).numpy()
            within[start : start + len(columns)] += inside.sum(dim=0).numpy()
    return around, within


def _squared(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (R, C) of float64 rows."""
    return torch.addmm((rows * rows).sum(1)[:, None] + (columns * columns).sum(1), rows, columns.T, alpha=-2.0)


def _mean(pooled: np.ndarray) -> Float64:
    total = np.zeros(pooled.shape[1])
    for start in range(0, len(pooled), _COLUMNS):
        total += pooled[start : start + _COLUMNS].sum(axis=0, dtype=np.float64)
    return total / len(pooled)


def _blocks(pooled: np.ndarray, centre: Float64, size: int) -> Iterator[tuple[int, Tensor]]:
    """Number of the first row, and rows less `centre` in float64, of each block."""
    for start in range(0, len(pooled), size):
        yield start, torch.from_numpy(pooled[start : start + size].astype(np.float64) - centre)
