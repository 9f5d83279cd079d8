"""Nearest neighbours, exactly, in bounded memory."""

from collections.abc import Sequence

import numpy as np

QUERY_BLOCK, REFERENCE_BLOCK = 512, 2048
_PAIRS_AT_ONCE = 1 << 22  # numbers, when distances are computed pair by pair


def nearest_neighbours(
    queries: np.ndarray, references: np.ndarray, count: int = 1, block: int = REFERENCE_BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest references of each query.

    Args:
        queries: (N, D), any real type.
        references: (M, D), any real type; may be memory-mapped.
        count: how many neighbours, at most M.
        block: references compared at a time.

    Returns:
        Euclidean distances, float64 (N, count), from near to far, and the references' indices, int64 (N, count). Of
        equally near ones the lowest index comes first.
    """
    return nearest_in_parts(queries, [references], count, block=block)


def nearest_in_parts(
    queries: np.ndarray,
    parts: Sequence[np.ndarray],
    count: int = 1,
    scale: float = 1.0,
    own: np.ndarray | None = None,
    block: int = REFERENCE_BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest references of each query, the references being in several arrays.

    For a block of references, the squared distances of all pairs come from one matrix product, whose rounding error is
    bounded; the pairs which that bound allows to be among the nearest are computed again from their difference. So the
    outcome is that of computing all pairs directly in float64, and equal vectors are at distance 0.

    Args:
        queries: (N, D), any real type.
        parts: arrays of shape (M, D), all of one length; reference r of part p has the index p * M + r.
        count: how many neighbours.
        scale: what all values are multiplied by first.
        own: int (N,), for each query a reference r that is left out in all parts; None leaves out none.
        block: references compared at a time.

    Returns:
        As `nearest_neighbours`.
    """
    rows = len(parts[0])
    available = len(parts) * (rows - (own is not None))
    assert 1 <= count <= available, f"{count} neighbours of {available} references"
    distances = np.empty((len(queries), count))
    indices = np.empty((len(queries), count), dtype=np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        chosen = slice(start, min(start + QUERY_BLOCK, len(queries)))
        best = _Best(queries[chosen].astype(np.float64) * scale, count)
        for number, part in enumerate(parts):
            for first in range(0, rows, block):
                vectors = part[first : first + block].astype(np.float64) * scale
                left_out = None if own is None else own[chosen] - first
                best.compare(vectors, number * rows + first, left_out)
        distances[chosen], indices[chosen] = np.sqrt(best.squares), best.indices
    return distances, indices


class _Best:
    """The nearest references so far of some queries.

    Attributes:
        squares: squared distances, float64 (N, count), ascending; infinite where fewer were seen.
        indices: int64 (N, count).
    """

    def __init__(self, queries: np.ndarray, count: int) -> None:
        self._queries = queries
        self._norms = np.square(queries).sum(axis=1)
        self._count = count
        self.squares = np.full((len(queries), count), np.inf)
        self.indices = np.zeros((len(queries), count), dtype=np.int64)

    def compare(self, vectors: np.ndarray, first: int, left_out: np.ndarray | None) -> None:
        """Take references into account, whose indices begin at `first`; `left_out` has a row of them per query."""
        norms = np.square(vectors).sum(axis=1)
        rough = self._norms[:, None] + norms - 2 * (self._queries @ vectors.T)
        if left_out is not None:
            there = np.flatnonzero((left_out >= 0) & (left_out < len(vectors)))
            rough[there, left_out[there]] = np.inf
        # A sum of D products has a relative error of at most D units of rounding (Higham 2002, section 3.1), of the
        # sum of the absolute products, which is at most (|a|^2 + |b|^2) / 2 here.
        unit = np.finfo(np.float64).eps
        slack = 4 * (vectors.shape[1] + 4) * unit * (self._norms + norms.max())
        limit = self.squares[:, -1]
        if len(vectors) >= self._count:
            limit = np.minimum(limit, np.partition(rough, self._count - 1, axis=1)[:, self._count - 1] + slack)
        rows, columns = np.nonzero((rough <= (limit + slack)[:, None]) & (rough < np.inf))
        if not len(rows):
            return
        squares = np.empty(len(rows))
        step = max(1, _PAIRS_AT_ONCE // vectors.shape[1])
        for start in range(0, len(rows), step):
            pairs = slice(start, start + step)
            squares[pairs] = np.square(self._queries[rows[pairs]] - vectors[columns[pairs]]).sum(axis=1)
        self._merge(rows, squares, columns + first)

    def _merge(self, rows: np.ndarray, squares: np.ndarray, indices: np.ndarray) -> None:
        touched = np.unique(rows)
        known = np.repeat(touched, self._count)
        rows = np.concatenate([known, rows])
        squares = np.concatenate([self.squares[touched].ravel(), squares])
        indices = np.concatenate([self.indices[touched].ravel(), indices])
        order = np.lexsort((squares, rows))  # stable: of equal ones the lowest index stays first
        starts = np.searchsorted(rows[order], touched)
        kept = order[starts[:, None] + np.arange(self._count)]
        self.squares[touched], self.indices[touched] = squares[kept], indices[kept]
