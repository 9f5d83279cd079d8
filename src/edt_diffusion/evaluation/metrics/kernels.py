"""Maximum mean discrepancy from sums of a kernel over blocks of pictures (Gretton et al. 2012, JMLR 13)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...util.rng import Purpose, stream
from ..feature_set import FeatureSet
from .base import Measurement, MetricSettings
from .resampling import Float64, block_count, jackknife_replicates, random_order

Kernel = Callable[[Tensor, Tensor], Tensor]

_COLUMNS = 4096


def unbiased_mmd(
    generated: FeatureSet, reference: FeatureSet, kernel: Kernel, settings: MetricSettings, scale: float = 1.0
) -> Measurement:
    """Unbiased estimate of the squared discrepancy, which may be negative, with a jackknife over generated blocks.

    Each side is cut to `kernel_samples` pictures at random where it has more. Blocks are random, so that sets in the
    order of their classes need no care, and hold classes of fixed shares in proportion. One block at a time is held
    against the other side, so that the memory taken is that of the two cut sides in float64.

    Unbiased are independent draws. Classes of fixed shares are less left to chance than the estimate corrects for: of
    samples with the reference's shares it is too low by 1 / N times the mean kernel within classes less that of all.

    Args:
        generated, reference: with `pooled`.
        kernel: of float64 (A, D) and (B, D): values (A, B).
        settings: seed, number of samples and of blocks.
        scale: factor of the outcome.
    """
    assert generated.pooled is not None
    assert reference.pooled is not None
    strata = generated.strata
    order = _chosen(len(generated.pooled), settings, strata)
    x = _rows(generated.pooled, order)
    y = _rows(reference.pooled, _chosen(len(reference.pooled), settings))
    number = block_count(settings.kernel_blocks, None if strata is None else strata[order])
    blocks = torch.tensor_split(x, min(number, len(x) // 2))
    within, own = _within(blocks, kernel)
    across = np.array([_sum(kernel, block, y) for block in blocks])
    parts = torch.tensor_split(y, -(-len(y) // _COLUMNS))
    reference_within, reference_own = _within(parts, kernel)
    sums = BlockSums(
        sizes=np.array([len(block) for block in blocks]),
        within=within - np.diag(own),
        across=across,
        reference_mean=(reference_within.sum() - reference_own.sum()) / (len(y) * (len(y) - 1)),
        reference_size=len(y),
    )
    notes = [
        f"over {settings.kernel_samples} of {total} {what} pictures, drawn at random"
        for what, total in (("generated", len(generated.pooled)), ("reference", len(reference.pooled)))
        if total > settings.kernel_samples
    ]
    every = np.ones(len(blocks), bool)
    left_out = np.array([sums.value(every & (np.arange(len(blocks)) != block)) for block in range(len(blocks))])
    return Measurement(scale * sums.value(every), len(x), jackknife_replicates(scale * left_out), tuple(notes))


@dataclass(frozen=True)
class BlockSums:
    """Sums of a kernel, from which the estimate of any choice of blocks follows.

    Attributes:
        sizes: pictures in each generated block, (B,).
        within: sums over pairs of different generated pictures, (B, B).
        across: sums over pairs of a generated and a real picture, (B,).
        reference_mean: mean over pairs of different real pictures.
        reference_size: number of real pictures.
    """

    sizes: np.ndarray
    within: Float64
    across: Float64
    reference_mean: float
    reference_size: int

    def value(self, chosen: np.ndarray) -> float:
        """The estimate with the blocks of a bool (B,)."""
        count = int(self.sizes[chosen].sum())
        within = self.within[np.ix_(chosen, chosen)].sum() / (count * (count - 1))
        across = self.across[chosen].sum() / (count * self.reference_size)
        return float(within + self.reference_mean - 2 * across)


def _chosen(rows: int, settings: MetricSettings, strata: np.ndarray | None = None) -> np.ndarray:
    """At most `kernel_samples` of `rows` in random order; alike for sets of one size and of the same `strata`."""
    return random_order(stream(settings.seed, Purpose.SUBSET, step=1), rows, strata)[: settings.kernel_samples]


def _rows(pooled: np.ndarray, order: np.ndarray) -> Tensor:
    return torch.from_numpy(pooled[order].astype(np.float64))


def _within(blocks: tuple[Tensor, ...], kernel: Kernel) -> tuple[Float64, Float64]:
    """Sums of the kernel over each pair of blocks (B, B), and over each block's pictures with themselves (B,)."""
    sums, own = np.zeros((len(blocks), len(blocks))), np.zeros(len(blocks))
    for i, first in enumerate(blocks):
        for j, second in enumerate(blocks[: i + 1]):
            values = kernel(first, second)
            sums[i, j] = sums[j, i] = float(values.sum())
            if i == j:
                own[i] = float(values.diagonal().sum())
    return sums, own


def _sum(kernel: Kernel, first: Tensor, second: Tensor) -> float:
    return sum(
        float(kernel(first, second[start : start + _COLUMNS]).sum()) for start in range(0, len(second), _COLUMNS)
    )
