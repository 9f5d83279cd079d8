"""What a latent store costs to read: speed against one .npy per image, memory, time to open, share of a training step.

    python benchmarks/data_store.py --json results.json

Figures (goals in brackets; a missed goal is reported and is no failure):

- read_ratio_vs_npy [>= 20]  shuffled rows/s from a store over those from the layout of the DiT and EDT code (one .npy
  of features and one of labels per image, read by a torch DataLoader), one process, warm cache, 20,000 rows of
  4x32x32, batches of 256, stored dtype into a tensor; the median of interleaved rounds
- read_ratio_moments         the same for rows of moments (mean and log-variance: twice the bytes)
- read_ratio_decoded         moments drawn from, as float32 and scaled, over the same npy rate
- rss_gib_1m_rows [< 1]      growth of anonymous and shared memory over all loader processes while one epoch of a real
  store of 1,000,000 rows of 4x32x32 float16 latents (8.2 GB) is read by two workers
- open_seconds_1m_rows [< 2] from a path to the first row of it
- wait_share [< 0.01]        share of a CPU EDT-S/2 training step that is spent waiting for data
"""

import argparse
import gc
import hashlib
import io
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from edt_diffusion.assemble import build_trainer
from edt_diffusion.config import parse_config
from edt_diffusion.data import GlobalShuffle, LatentStore, training_loader
from edt_diffusion.data.manifest import (
    LABELS,
    MANIFEST,
    Bucket,
    Manifest,
    Preparation,
    Scaling,
    ShardFacts,
    SourceFacts,
    Statistics,
    to_json,
)
from edt_diffusion.data.shards import ShardRows, write_shard

CHANNELS, SIDE, CLASSES, BATCH = 4, 32, 1000, 256
SHAPE = (CHANNELS, SIDE, SIDE)
ROW_BYTES = 2 * CHANNELS * SIDE * SIDE
SHARD_ROWS = 8192
GOALS = {
    "read_ratio_vs_npy": (">=", 20),
    "rss_gib_1m_rows": ("<", 1),
    "open_seconds_1m_rows": ("<", 2),
    "wait_share": ("<", 0.01),
}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    results["threads"] = arguments.threads
    folder = Path(tempfile.mkdtemp(prefix="edt-data-store-", dir=arguments.folder))
    try:
        if "read" in arguments.only:
            results |= read_speed(folder, arguments.rows, arguments.rounds)
        if "memory" in arguments.only:
            results |= memory_and_opening(folder, arguments.memory_rows)
        if "wait" in arguments.only:
            results |= waiting(folder, arguments.train_batch, arguments.train_steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results["goals"] = {
        name: bool(results[name] >= bound if sign == ">=" else results[name] < bound)
        for name, (sign, bound) in GOALS.items()
        if name in results
    }
    for name, value in results.items():
        goal = f"   (goal {' '.join(map(str, GOALS[name]))})" if name in GOALS else ""
        print(f"{name:28} {value:.4g}{goal}" if isinstance(value, float) else f"{name:28} {value}{goal}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--folder", help="where to make the stores (default: the system's temporary folder)")
    parser.add_argument("--only", nargs="+", default=["read", "memory", "wait"], choices=["read", "memory", "wait"])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-rows", type=int, default=1_000_000)
    parser.add_argument("--train-batch", type=int, default=16)
    parser.add_argument("--train-steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=max((os.cpu_count() or 2) // 2, 1))
    return parser.parse_args()


# Stores of random numbers


def make_store(folder: Path, rows: int, kind: str) -> Path:
    """A store as `edt encode` writes it, of random latents or moments."""
    folder.mkdir()
    kept = 2 * CHANNELS if kind == "moments" else CHANNELS
    generator = np.random.default_rng(0)
    shards, labels = [], generator.integers(0, CLASSES, rows).astype("<i4")
    for number, first in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - first)
        # Random 14-bit patterns are finite float16 numbers below 2: quicker than a million normal draws a shard.
        bits = generator.integers(0, 0x3FFF, (count, kept, SIDE, SIDE), dtype=np.uint16)
        content = ShardRows(
            row=np.arange(first, first + count),
            label=labels[first : first + count],
            key=[f"{row}.png" for row in range(first, first + count)],
            picture_sha256=[bytes(32)] * count,
            views={"plain": bits.view(np.float16)},
        )
        name = f"shard-{number:05d}.arrow"
        size, sha256 = write_shard(folder / name, content)
        shards.append(ShardFacts(file=name, bucket=0, first=first, rows=count, bytes=size, sha256=sha256))
    held = io.BytesIO()
    np.save(held, labels)
    (folder / LABELS).write_bytes(held.getvalue())
    manifest = Manifest(
        kind=kind,
        dtype="float16",
        views=["plain"],
        codec=None,
        scaling=Scaling(shift=[0.0] * CHANNELS, scale=[0.18215] * CHANNELS),
        statistics=Statistics(mean=[0.0] * CHANNELS, std=[1.0] * CHANNELS),
        preparation=Preparation(crop="center", channels=3),
        buckets=[Bucket(pictures=(256, 256), shape=SHAPE)],
        class_names=[str(label) for label in range(CLASSES)],
        class_counts=np.bincount(labels, minlength=CLASSES).tolist(),
        source=SourceFacts(pictures=rows, sha256="0" * 64),
        rows=rows,
        skipped=0,
        labels_sha256=hashlib.sha256(held.getvalue()).hexdigest(),
        shards=shards,
    )
    (folder / MANIFEST).write_text(to_json(manifest))
    return folder


# Speed


class NpyFolder(Dataset):
    """The layout and the way of reading of the DiT and EDT code: two .npy files per image."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.features, self.labels = folder / "imagenet256_features", folder / "imagenet256_labels"
        self.files = [f"{row}.npy" for row in range(rows)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = np.load(self.features / self.files[index])
        labels = np.load(self.labels / self.files[index])
        return torch.from_numpy(features), torch.from_numpy(labels)


def make_npy(store: LatentStore, folder: Path) -> None:
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True)
    for row in range(len(store)):
        np.save(folder / "imagenet256_features" / f"{row}.npy", store.stored([row]))
        np.save(folder / "imagenet256_labels" / f"{row}.npy", store.labels[[row]])


def read_speed(folder: Path, rows: int, rounds: int) -> dict[str, float]:
    latents = LatentStore.open(make_store(folder / "latents", rows, "latents"))
    moments = LatentStore.open(make_store(folder / "moments", rows, "moments"))
    make_npy(latents, folder / "npy")  # float16, as the store: the authors' own are float32, twice the bytes
    files = DataLoader(NpyFolder(folder / "npy", rows), batch_size=BATCH, shuffle=True)

    def by_npy() -> None:
        for features, labels in files:
            assert features.dtype == torch.float16
            assert len(labels)

    def by_store(store: LatentStore) -> Callable[[], None]:
        def read() -> None:
            for indices, _ in batches(rows):
                assert torch.from_numpy(store.stored(indices)).dtype == torch.float16
                torch.from_numpy(store.labels[indices])

        return read

    def decoded() -> None:
        for indices, epochs in batches(rows):
            assert moments.batch(indices, epochs, 0).dtype == torch.float32

    ways = {"npy": by_npy, "store": by_store(latents), "moments": by_store(moments), "decoded": decoded}
    for read in ways.values():
        read()  # warm the cache
    rates = {name: [] for name in ways}
    for _ in range(rounds):  # in turn, so that a busy machine slows all of them
        for name, read in ways.items():
            start = time.perf_counter()
            read()
            rates[name].append(rows / (time.perf_counter() - start))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    return {
        **{f"rows_per_second_{name}": value for name, value in middle.items()},
        "read_ratio_vs_npy": middle["store"] / middle["npy"],
        "read_ratio_moments": middle["moments"] / middle["npy"],
        "read_ratio_decoded": middle["decoded"] / middle["npy"],
    }


def batches(rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    order = GlobalShuffle(rows, seed=0)
    for start in range(0, rows, BATCH):
        yield order.places(start, min(BATCH, rows - start))


# Memory


def memory_and_opening(folder: Path, rows: int) -> dict[str, float]:
    free = shutil.disk_usage(folder).free
    if free < rows * ROW_BYTES * 1.22:
        fewer = int(free / 1.22 / ROW_BYTES)
        print(f"only {free / 1e9:.1f} GB are free: the memory figures are of {fewer} rows instead of {rows}")
        rows = fewer
    where = make_store(folder / "large", rows, "latents")
    gc.collect()
    before = memory_of_all()
    start = time.perf_counter()
    store = LatentStore.open(where)
    store.stored([rows // 2])
    opened = time.perf_counter() - start
    peak, read, start = before, 0, time.perf_counter()
    for step, batch in enumerate(training_loader(store, seed=0, global_batch=BATCH, workers=2)):
        read += len(batch["inputs"])
        if step % 100 == 0:
            peak = max(peak, memory_of_all())
        if read >= rows:
            peak = max(peak, memory_of_all())
            break
    seconds = time.perf_counter() - start
    shutil.rmtree(where)
    return {
        "memory_rows": rows,
        "rss_gib_1m_rows": (peak - before) / 2**30,
        "open_seconds_1m_rows": opened,
        "rows_per_second_two_workers": read / seconds,
    }


def memory_of_all() -> int:
    """Bytes of anonymous and shared memory of this process and its children; shared pages count once."""
    total = 0
    for process in [os.getpid(), *children(os.getpid())]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) * 1024
    return total


def children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


# Waiting


def waiting(folder: Path, batch: int, steps: int) -> dict[str, float]:
    store = make_store(folder / "small", 20_000, "moments")
    tree = {
        "model": {"name": "EDT", "size": "S"},
        "data": {"path": str(store)},
        "train": {"steps": steps, "batch_size": batch, "sample_every": 0, "log_every": 1000, "save_every": steps + 1},
    }
    # The store names no autoencoder: none is needed to time the steps.
    import edt_diffusion.assemble.run as assemble

    assemble.open_codec = lambda *_: None
    trainer = build_trainer(parse_config(tree), folder / "run", quiet=True)
    waited, marks = [0.0], []
    make_loader = trainer.make_loader

    def timed(start_step: int) -> Iterator[Any]:
        loader = make_loader(start_step)
        while True:
            start = time.perf_counter()
            found = next(loader)
            now = time.perf_counter()
            waited.append(now - start)
            marks.append(now)
            yield found

    trainer.make_loader = timed
    trainer.saving.save = lambda step, seconds: setattr(trainer.saving, "saved_at", step)
    trainer.fit()
    spent = marks[-1] - marks[0]  # whole steps, each with the wait for the next batch
    return {"wait_share": sum(waited[2:]) / spent, "step_seconds": spent / (len(marks) - 1), "train_batch": batch}


if __name__ == "__main__":
    main()
