"""What an evaluation's statistics cost: 50,000 vectors of 2,048 features streamed, and the Fréchet distance of them.

    python benchmarks/feature_statistics.py --json results.json

Vectors are drawn batch by batch, correlated, unequally wide and far from 0; drawing them is not counted. Threads are
those of numpy's BLAS (OMP_NUM_THREADS). Figures (goals in brackets; a missed goal is reported and is no failure):

- stream_seconds [< 120]          mean and covariance of all vectors
- stream_memory_gib [< 0.5]       growth of the process's peak memory meanwhile
- covariance_error [< 1e-10]      of some rows of the covariance against two passes in extended precision, over the
  largest entry
- batch_error [< 1e-10]           the same between two batch sizes
- fid_seconds [< 20]              one Fréchet distance, reference factored too
- fid_memory_gib                  growth of peak memory meanwhile
- fid_error [< 1e-8]              relative, against the closed form |d|² + (1 - c)² tr A of N(m, A) and N(m + d, c² A)
- deficient_fid_seconds, deficient_fid_error [< 1e-6]  with fewer vectors than features: the same closed form, and the
  nuclear norm of the product of two data matrices; the larger error of the two
- replicate_seconds               one resample of 10,000 vectors for an interval
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from edt_diffusion.evaluation.metrics import frechet_distance
from edt_diffusion.evaluation.metrics.frechet import FrechetDistance, WeightedDistances
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.util.rng import Purpose, stream

T = TypeVar("T")

BLOCK = 1000  # vectors that are drawn at a time, whatever the batch size
ROWS = 16  # of the covariance, that are computed anew
GOALS = {
    "stream_seconds": 120,
    "stream_memory_gib": 0.5,
    "covariance_error": 1e-10,
    "batch_error": 1e-10,
    "fid_seconds": 20,
    "fid_error": 1e-8,
    "deficient_fid_error": 1e-6,
}


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "blas_threads": os.environ.get("OMP_NUM_THREADS", "as many as cores"),
        "count": arguments.count,
        "dimensions": arguments.dimensions,
        "batch": arguments.batch,
    }
    statistics, figures = streaming(arguments.count, arguments.dimensions, arguments.batch)
    results |= figures
    results |= full_rank(statistics)
    results |= rank_deficient(arguments.dimensions)
    results |= replicates(min(arguments.count, 10_000), arguments.dimensions)
    results["goals"] = {name: bool(results[name] < bound) for name, bound in GOALS.items()}
    for name, value in results.items():
        goal = f"   (goal < {GOALS[name]:g})" if name in GOALS else ""
        print(f"{name:24} {value:.4g}{goal}" if isinstance(value, float) else f"{name:24} {value}{goal}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    return parser.parse_args()


def block(number: int, dimensions: int) -> np.ndarray:
    """Vectors number * BLOCK and on, float32 (BLOCK, D): correlated, widths over two decades, 3 away from 0."""
    draw = stream(0, Purpose.VALIDATION, position=number).standard_normal((BLOCK, dimensions), dtype=np.float32)
    common = draw[:, :1] + draw[:, 1:2]
    width = np.logspace(0, -2, dimensions, dtype=np.float32)
    return (draw + common) * width + 3


def vectors(count: int, dimensions: int) -> np.ndarray:
    return np.concatenate([block(number, dimensions) for number in range(-(-count // BLOCK))])[:count]


def streaming(count: int, dimensions: int, batch: int) -> tuple[GaussianStatistics, dict[str, float]]:
    block(0, dimensions)
    statistics, seconds = GaussianStatistics.empty(dimensions), 0.0
    GaussianStatistics.of(np.eye(64))  # start the threads of BLAS

    def run() -> None:
        nonlocal seconds
        for first in range(0, count, BLOCK):
            rows = block(first // BLOCK, dimensions)[: count - first]
            start = time.perf_counter()
            for at in range(0, len(rows), batch):
                statistics.update(rows[at : at + batch])
            seconds += time.perf_counter() - start

    _, memory = with_peak(run)
    some = np.linspace(0, dimensions - 1, ROWS).astype(int)
    known = covariance_rows(count, dimensions, some)
    largest = float(np.abs(statistics.covariance).max())
    few = vectors(min(count, 8 * BLOCK), dimensions)
    by_batch = [GaussianStatistics.empty(dimensions) for _ in range(2)]
    for found, size in zip(by_batch, (64, 1500), strict=True):
        for at in range(0, len(few), size):
            found.update(few[at : at + size])
    difference = np.abs(by_batch[0].covariance - by_batch[1].covariance).max()
    return statistics, {
        "stream_seconds": seconds,
        "stream_memory_gib": memory,
        "covariance_error": float(np.abs(statistics.covariance[some] - known).max()) / largest,
        "batch_error": float(difference / np.abs(by_batch[0].covariance).max()),
    }


def covariance_rows(count: int, dimensions: int, some: np.ndarray) -> np.ndarray:
    """Rows of the covariance by two passes over the same vectors in extended precision."""
    mean, products = np.zeros(dimensions, np.longdouble), np.zeros((len(some), dimensions), np.longdouble)
    for first in range(0, count, BLOCK):
        mean += block(first // BLOCK, dimensions)[: count - first].sum(axis=0, dtype=np.longdouble)
    mean /= count
    for first in range(0, count, BLOCK):
        rows = block(first // BLOCK, dimensions)[: count - first] - mean
        for place, column in enumerate(some):
            products[place] += (rows[:, column, None] * rows).sum(axis=0)
    return (products / (count - 1)).astype(np.float64)


def moved(statistics: GaussianStatistics, scale: float) -> tuple[GaussianStatistics, float]:
    """N(m + 0.1, scale² A) for N(m, A), and its distance in closed form."""
    covariance = statistics.covariance
    other = GaussianStatistics.from_moments(statistics.mean + 0.1, scale**2 * covariance, statistics.count)
    return other, 0.01 * statistics.dimensions + (1 - scale) ** 2 * float(np.trace(covariance))


def full_rank(statistics: GaussianStatistics) -> dict[str, float]:
    reference, known = moved(statistics, 1.3)
    start = time.perf_counter()
    found, memory = with_peak(lambda: frechet_distance(statistics, reference))
    seconds = time.perf_counter() - start
    return {"fid_seconds": seconds, "fid_memory_gib": memory, "fid_error": relative(found, known)}


def rank_deficient(dimensions: int) -> dict[str, float]:
    x, y = vectors(dimensions // 2, dimensions), vectors(dimensions, dimensions)[dimensions // 2 :] * 1.5
    one, other = GaussianStatistics.of(x), GaussianStatistics.of(y)
    reference, known = moved(one, 1.3)
    start = time.perf_counter()
    found = frechet_distance(one, reference)
    seconds = time.perf_counter() - start
    a, b = (rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64) for rows in (x, y))
    nuclear = np.linalg.norm(a @ b.T, "nuc") / math.sqrt((len(a) - 1) * (len(b) - 1))
    difference = float(((one.mean - other.mean) ** 2).sum())
    by_data = difference + float(np.trace(one.covariance + other.covariance)) - 2 * float(nuclear)
    errors = relative(found, known), relative(frechet_distance(one, other), by_data)
    return {"deficient_fid_seconds": seconds, "deficient_fid_error": max(errors)}


def replicates(count: int, dimensions: int) -> dict[str, float]:
    x = vectors(count, dimensions)
    reference, _ = moved(GaussianStatistics.of(x), 1.3)
    weighted = WeightedDistances(x, FrechetDistance(reference))
    start = time.perf_counter()
    weighted.replicates(0, 3)
    return {"replicate_seconds": (time.perf_counter() - start) / 3}


def relative(found: float, known: float) -> float:
    return abs(found - known) / abs(known)


def with_peak(work: Callable[[], T]) -> tuple[T, float]:
    """The outcome of `work`, and the GiB by which the process's memory grew at its peak (0 where Linux is not)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # begin the high-water mark anew
    except OSError:
        return work(), 0.0
    before = psutil.Process().memory_info().rss
    outcome = work()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return outcome, max(int(line.split()[1]) * 1024 - before, 0) / 2**30


if __name__ == "__main__":
    main()
