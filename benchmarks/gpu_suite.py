"""Everything that is measured on a GPU, in one script: correctness, speed, memory, and a timed training.

    python benchmarks/gpu_suite.py --out results --parts tests,parity,throughput
    python benchmarks/gpu_suite.py --out results --parts training --data train.npz --test-data test.npz \
        --extractor features.ts --seconds 240
    python benchmarks/gpu_suite.py --out results --merge results/first.json,results/second.json
    python benchmarks/gpu_suite.py --pack train.npz --data train.parquet --limit 15000
    python benchmarks/gpu_suite.py --out /tmp/try --device cpu --tiny

Parts:

- tests       `pytest -m gpu`
- parity      EDT, DiT and MDTv2 (S) at 256 and 512 px, with and without AMM in each of its forms, in float32, TF32,
              bfloat16 and float16, against the same weights in float64: root mean square of the difference over that of
              the output, and whether it is within `BOUNDS`
- throughput  images/s and peak memory of forward passes and training steps, eager and compiled, in bfloat16, TF32 and
              float32, by batch; the steps are those of `compare.py`, and networks are timed in turn where they fit in
              memory together
- training    EDT-S, DiT-S and MDTv2-S on pictures of 32 px (patches of 2, so that there are as many tokens as at 256 px
              with an autoencoder) for equal seconds, and the Fréchet distance of their samples
- sampling    pictures/s of some samplers and feature caches, decoding left out

Each part stands for itself: what fails is told and the others go on. Results are written after each part, to
`gpu_NAME_DATE.json` and a page beside it. `--budget` is for the whole call: what did not fit is named under `left_out`.
The training can be stopped at the end of the budget and gone on with by the same command and `--work`.

`--data` and `--test-data` may be .npz files with uint8 pictures (N, H, W, 3) as `images` or `arr_0` and integer classes
as `labels` or `arr_1`, which need nothing but numpy; `--pack` makes them from any pictures that `edt train` takes.
"""

import argparse
import copy
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import compare
import numpy as np
import torch
from machine import machine
from torch import Tensor, nn

from edt_diffusion.nn.modulated_attention import FORMS
from edt_diffusion.profiling.clock import clock_for
from edt_diffusion.profiling.side_by_side import Timings, in_turn
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.files import atomic_path, atomic_write_json, atomic_write_text, make_folder
from edt_diffusion.util.hardware import measured_matmul_peak, peak_memory

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "parity", "throughput", "training", "sampling")
# Relative root mean square errors against float64 that are accepted.
BOUNDS = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 3e-2, "fp16": 5e-3}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIXELS = (256, 512)
FORWARD_BATCHES = {"S": (1, 64, 256), "B": (1, 64), "XL": (1, 32), "tiny": (1, 2)}
TRAIN_BATCHES = {"S": (64, 256), "B": (64,), "XL": (32,), "tiny": (2,)}
TOGETHER = ("S", "B", "tiny")  # sizes whose trainings fit in memory beside one another
WINDOW_SECONDS = 0.3  # calls queued one behind the other
SAMPLINGS = (("dpm++", 20, "none"), ("ddim", 50, "none"), ("ddim", 50, "fora"), ("ddim", 50, "taylor"))
METRICS = ("fid", "kid", "is")
LEAST_SECONDS = 15.0  # below which the timed training is not begun
LEFT_OUT = "left_out"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(argv)
    if options.pack is not None:
        pack(options.data, options.pack, options.limit)
        return {}
    if options.merge:
        found = [json.loads(Path(name).read_text("utf-8")) for name in options.merge.split(",")]
        results = merged(found)
        write(results, options.out)
        return results
    device = torch.device(options.device)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    deadline = Deadline(options.budget)
    results = {
        "name": re.sub(r"[^a-z0-9]+", "-", name_of(device).lower()).strip("-") + ("-tiny" if options.tiny else ""),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "parts": {},
    }
    for part in options.parts:
        begun = time.monotonic()
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            told = PART_FUNCTIONS[part](options, device, deadline)
        except (Exception, SystemExit) as error:  # a part stands for itself
            told = {"error": f"{type(error).__name__}: {error}"}
            print(told["error"], file=sys.stderr, flush=True)
        results["parts"][part] = {**told, "took_seconds": round(time.monotonic() - begun, 1)}
        write(results, options.out)
        release(device)
    return results


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def parts(text: str) -> list[str]:
        if stray := [name for name in text.split(",") if name not in PARTS]:
            raise argparse.ArgumentTypeError(f"{stray[0]!r}: expected some of {', '.join(PARTS)}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--parts", type=parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and batches, to try the script out")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds of the whole call")
    parser.add_argument("--sizes", default="S,B,XL", help="of the throughput")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each throughput")
    parser.add_argument("--data", help="pictures with classes: .npz, or as edt train --data")
    parser.add_argument("--test-data", help="held-out pictures, likewise: what a perfect model would get")
    parser.add_argument("--extractor", help="as edt evaluate --extractor")
    parser.add_argument("--seconds", type=float, default=240.0, help="of training, for each network")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each network")
    parser.add_argument("--images", type=int, default=5000, help="samples that are scored")
    parser.add_argument("--train-batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the timed training, for all")
    parser.add_argument("--work", type=Path, help="folder of the timed training (default: in --out)")
    parser.add_argument("--merge", help="join these JSON files, separated by commas, and write a page")
    parser.add_argument("--pack", type=Path, help="write the pictures of --data to this .npz and end")
    parser.add_argument("--limit", type=int, help="of --pack: so many pictures, evenly spaced")
    options = parser.parse_args(argv)
    if options.pack is not None and not options.data:
        parser.error("--pack needs --data")
    if options.tiny:
        options.sizes = "tiny"
    options.sizes = options.sizes.split(",")
    if stray := [size for size in options.sizes if size not in FORWARD_BATCHES]:
        parser.error(f"--sizes {stray[0]}: expected some of {', '.join(FORWARD_BATCHES)}")
    return options


class Deadline:
    """How much of the budget is left."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds

    def left(self) -> float:
        return self._end - self._now()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def release(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def set_tf32(allowed: bool) -> None:
    """Products and convolutions of float32 in TF32 or not; torch has it on for convolutions, patch embeddings too."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def failure(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# Tests


def run_tests(_options: argparse.Namespace, device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """`pytest -m gpu`, in a process of its own."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", "tests"]
    try:
        ran = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=max(deadline.left(), 1.0), check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": "not done within the budget"}
    told = summary_of_tests(ran.stdout)
    if ran.returncode not in (0, 1) or not told["counts"]:
        return {"error": "\n".join((ran.stdout + ran.stderr).splitlines()[-20:])}
    return {**told, "on_a_gpu": device.type == "cuda"}


def summary_of_tests(output: str) -> dict[str, Any]:
    """Counts and failures from what pytest printed."""
    lines = output.strip().splitlines()
    last = next((line for line in reversed(lines) if re.search(r"\bin [\d.]+s", line)), "")
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return {"counts": counts, "failures": [line for line in lines if line.startswith(("FAILED ", "ERROR "))]}


# Parity


def parity(options: argparse.Namespace, device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """Errors of every precision and form of AMM against float64."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    size = "tiny" if options.tiny else "S"
    for pixels in PIXELS if not options.tiny else (128,):
        for network in compare.NETWORKS:
            for amm in (False, True):
                if deadline.left() < 10:
                    left_out.append(f"{network} {pixels} {'AMM' if amm else 'plain'}")
                    continue
                rows += errors_of(network, size, pixels, amm, device)
                release(device)
    there = [row for row in rows if "error" in row]
    return {
        "bounds": BOUNDS,
        "within": all(row["within"] for row in there) if there else None,
        "largest": {
            kind: max((row["error"] for row in there if row["dtype"] == kind), default=None) for kind in BOUNDS
        },
        "rows": rows,
        LEFT_OUT: left_out,
    }


def errors_of(network: str, size: str, pixels: int, amm: bool, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each precision and form, of one network."""
    model = compare.build_network(network, size, pixels)
    spread_biases(model)
    if amm:
        setting = model.suggested_modulation()
        assert setting is not None
        model.set_attention_modulation(setting.blocks, setting.formula, setting.radius)
    set_form(model, "explicit")
    exact = compare.pass_of(copy.deepcopy(model), 2, torch.float64, device)().clone()
    for kind, dtype in DTYPES.items():
        if kind == "tf32" and device.type != "cuda":
            continue
        set_tf32(kind == "tf32")
        own = copy.deepcopy(model)  # moving to a dtype rounds the weights: none is to have those of another
        for form in (None, *FORMS) if amm else (None,):
            set_form(own, form)
            row = {"network": network, "pixels": pixels, "dtype": kind, "amm": (form or "automatic") if amm else "off"}
            try:
                with compare.watching_forms() as forms:
                    out = compare.pass_of(own, 2, dtype, device)()
                error = relative_rms(out, exact)
                yield {**row, "forms": dict(forms), "error": error, "within": error <= BOUNDS[kind]}
            except Exception as problem:  # a form may be absent on this device
                yield {**row, "unavailable": failure(problem)}
    set_tf32(False)


def spread_biases(model: Any) -> None:
    """Position biases as large as those of trained networks: new ones are too small to be seen in the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("position_bias.table"):
                parameter.normal_(std=0.5)


def set_form(model: Any, form: str | None) -> None:
    for attention, _ in model.attention_layers():
        attention.processor.form = form


def relative_rms(out: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of `exact`; infinite where something is not finite."""
    error = float((out.double() - exact.double()).square().mean().sqrt() / exact.double().square().mean().sqrt())
    return error if np.isfinite(error) else float("inf")


# Throughput


def throughput(options: argparse.Namespace, device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """Images/s and memory; what matters most comes first, for the budget may end it."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    kinds = ("bf16", "tf32", "fp32") if device.type == "cuda" else ("bf16", "fp32")
    compiles = (False, True) if device.type == "cuda" else (False,)
    wanted = [
        (what, size, kind, compiled, batch)
        for kind in kinds
        for compiled in compiles
        if not compiled or kind == "bf16"
        for size in options.sizes
        for what, batches in (("forward", FORWARD_BATCHES), ("train", TRAIN_BATCHES))
        for batch in (batches[size] if kind == "bf16" and not compiled else batches[size][-1:])
    ]
    for what, size, kind, compiled, batch in wanted:
        label = f"{what} {size} {kind} {'compiled' if compiled else 'eager'} {batch}"
        if deadline.left() < (90 if compiled else 20) and not options.tiny:
            left_out.append(label)
            continue
        set_tf32(kind == "tf32")
        measured = forward_rates if what == "forward" else training_rates
        common = {"what": what, "size": size, "dtype": kind, "compiled": compiled, "batch": batch}
        try:
            rows += [{**common, **row} for row in measured(size, kind, compiled, batch, options, device)]
        except torch.OutOfMemoryError:
            rows.append({**common, "unavailable": "out of memory"})
        except Exception as error:
            rows.append({**common, "unavailable": failure(error)})
        release(device)
    set_tf32(False)
    peaks = {kind: measured_matmul_peak(device, DTYPES[kind]) / 1e12 for kind in ("bf16", "fp32")}
    return {"matmul_peak_tflops": peaks, "rows": rows, LEFT_OUT: left_out}


def forward_rates(
    size: str, kind: str, compiled: bool, batch: int, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each network, timed in turn."""
    calls, memory, work = {}, {}, {}
    for network in compare.NETWORKS:
        model = compare.build_network(network, size, pixels_of(options))
        call = compare.pass_of(model, batch, DTYPES[kind], device)
        out = call()
        compare.refuse_degenerate(f"{network} {size} {kind}", out)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
            apart = relative_rms(call(), out)
            if apart > BOUNDS[kind]:
                raise RuntimeError(f"{network} compiled differs from eager by {apart:.2g}")
        memory[network] = peak_of(call, device)
        work[network] = 2 * sum(model.multiply_adds().values())
        calls[network] = call
    timings, counts = windows(calls, options.rounds, device)
    return rows_of(timings, counts, batch, memory, work)


def training_rates(
    size: str, kind: str, compiled: bool, batch: int, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each recipe; in turn where all fit in memory at once, one by one where not."""
    recipes = list(compare.RECIPES)
    groups = [recipes] if size in TOGETHER else [[recipe] for recipe in recipes]
    seconds, counts, memory, work, failed = {}, {}, {}, {}, []
    for group in groups:
        try:
            steps = compare.steps_of(size, pixels_of(options), batch, DTYPES[kind], device, group)
            for recipe, step in steps.items():
                step()
                if compiled and (recipe != "edt_star" or "edt" not in group):
                    step.trained.model.compile_repeated_blocks(fullgraph=True)
                step()
                memory[recipe] = peak_of(step, device)
                # Twice the multiply-adds, three times for forward and backward, and the passes that are computed whole.
                whole = 2 * 3 * sum(step.trained.model.multiply_adds().values())
                work[recipe] = None if recipe == "mdtv2" else whole * len(step.objective.passes)
            timings, made = windows(steps, options.rounds, device)
            for recipe, step in steps.items():
                compare.refuse_degenerate(f"loss of {recipe} {size}", step.loss)
            seconds |= timings.seconds
            counts |= made
        except torch.OutOfMemoryError:
            failed += [{"network": recipe, "unavailable": "out of memory"} for recipe in group]
        steps = timings = step = None
        release(device)
    rows = rows_of(Timings(seconds), counts, batch, memory, work, in_turn_with="edt" if len(groups) == 1 else None)
    return rows + failed


def windows(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> tuple[Timings, dict[str, int]]:
    """Time windows of calls queued one behind the other, in turn; and how many calls each window has."""
    clock, counts = clock_for(device), {}
    for name, call in calls.items():
        call()
        clock.settle()
        start = clock.mark()
        call()
        end = clock.mark()
        clock.settle()
        counts[name] = max(1, round(WINDOW_SECONDS / max(clock.seconds(start, end), 1e-9)))

    def window(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(counts[name]):
                calls[name]()

        return run

    return in_turn({name: window(name) for name in calls}, rounds, 1, device), counts


def rows_of(
    timings: Timings,
    counts: Mapping[str, int],
    batch: int,
    memory: Mapping[str, float],
    work: Mapping[str, int | None],
    in_turn_with: str | None = "edt",
) -> list[dict[str, Any]]:
    """Images/s with quartiles, share of arithmetic, and seconds of an image over EDT's."""
    # Windows of different lengths are compared by the seconds of an image.
    images = {name: counts[name] * batch for name in timings.seconds}
    each = Timings({name: [s / images[name] for s in seconds] for name, seconds in timings.seconds.items()})
    rows = []
    for name in each.seconds:
        median, low, high = each.of(name)
        flops = work.get(name)
        row = {
            "network": name,
            "images_per_second": 1 / median,
            "quartiles": [1 / high, 1 / low],
            "tflops": None if flops is None else flops / median / 1e12,
            "peak_mib": memory[name],
        }
        if in_turn_with in each.seconds and name != in_turn_with:
            ratio, *spread = each.ratio(name, in_turn_with)
            row |= {"seconds_over_edt": ratio, "seconds_over_edt_quartiles": spread}
        rows.append(row)
    return rows


def pixels_of(options: argparse.Namespace) -> int:
    return 128 if options.tiny else 256


def peak_of(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB of a call at most, with what stands; on CUDA only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (peak_memory(device) or 0.0) / 2**20


# The timed training


def training(options: argparse.Namespace, device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """EDT, DiT and MDTv2 for equal seconds on one data set, and the distance of their samples."""
    if not options.data or not options.extractor:
        raise UserError("the training needs --data and --extractor: give both, or leave the part out with --parts")
    from edt_diffusion.studies.matrix import Budget, Matrix, Variant, run_matrix

    work = options.work or options.out / "training"
    make_folder(work)
    train = readable(options.data, work / "train.zip")
    test = None if not options.test_data else readable(options.test_data, work / "test.zip")
    precision = "bf16" if device.type == "cuda" else "no"
    steps = 4 if options.tiny else 25
    matrix = Matrix(
        base="small-32",
        arms=tuple(arms(options.tiny)),
        budget=Budget.parse(f"{options.seconds:g}s"),
        settings={
            "data": {"path": train, "size": 32, "channels": 3, "flip": True},
            "optimizer.lr": options.lr,
            "train.batch_size": 4 if options.tiny else options.train_batch,
            "train.mixed_precision": precision,
            "train.matmul_precision": "high" if device.type == "cuda" else "highest",
        },
        seeds=tuple(range(options.seeds)),
        variants=(Variant("plain", f"DDIM, {steps} steps", {"scheduler": "ddim", "steps": steps, "guidance": 1.0}),),
        images=options.images,
        extractor=options.extractor,
        metrics=METRICS,
        ceiling=test,
        batch=None if device.type != "cuda" else 500,
    )
    left = deadline.left() - 20
    if left < LEAST_SECONDS:
        raise UserError(f"{max(left, 0):.0f} s of --budget are left: too few to go on with the training; name it alone")
    with stopped_after(left):
        results = run_matrix(matrix, work / "runs", processes=1)
    told: dict[str, Any] = {
        "seconds": options.seconds, "seeds": options.seeds, "images": options.images, "batch": options.train_batch,
        "lr": options.lr, "precision": precision, "networks": [],
        "ceiling": {name: value["value"] for name, value in (results.ceiling or {}).get("metrics", {}).items()},
        "stopped": results.stopped, "missing": results.missing, "failed": results.failed,
    }  # fmt: skip
    for arm in matrix.arms:
        runs = [spent for name, spent in results.done.items() if name.startswith(f"{arm.name}-seed")]
        scores = {metric: results.mean(arm.name, metric) for metric in METRICS}
        told["networks"].append({
            "name": arm.name, "title": arm.title, **results.spent(arm.name),
            "parameters": runs[0].get("parameters") if runs else None,
            "scores": {
                metric: {"mean": score.mean, "interval": [score.low, score.high]}
                for metric, score in scores.items()
                if score is not None
            },
        })  # fmt: skip
    return told


def arms(tiny: bool) -> list[Any]:
    """The three networks with the masks of each paper."""
    from edt_diffusion.studies.matrix import Arm

    found = []
    for network, (recipe, title) in {
        "edt": ("edt", "EDT-S, its masks"), "dit": ("dit", "DiT-S"), "mdtv2": ("mdtv2", "MDTv2-S, its masks")
    }.items():  # fmt: skip
        own = {name: value for name, value in compare.TINY[network].items() if name != "num_classes"}
        model = {"name": compare.NETWORKS[network], **(own if tiny else {"size": "S"}), "patch_size": 2}
        found.append(Arm(recipe, title, {"model": model, "objective.passes": compare.RECIPES[recipe][1]}))
    return found


class stopped_after:
    """Ask this process to stop, as by Ctrl-C, when the time is over within the body."""

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(max(seconds, 0.1), lambda: os.kill(os.getpid(), signal.SIGINT))
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def readable(path: str, made: Path) -> str:
    """A path that `edt train` reads: the pictures of an .npz are put into a zip of PNG files by class, once."""
    if not path.endswith(".npz"):
        return path
    if not made.is_file():
        with np.load(path) as given:
            images = given["images" if "images" in given else "arr_0"]
            labels = given["labels" if "labels" in given else "arr_1"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1]:
            raise UserError(
                f"{path}: pictures {images.dtype} {images.shape}, labels {labels.shape}; expected uint8 (N, H, W, 3) "
                "and one label for each"
            )
        from PIL import Image

        with atomic_path(made) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png", compress_level=1)
                archive.writestr(f"{int(label):04d}/{number:06d}.png", png.getvalue())
    return str(made)


def pack(source: str, target: Path, limit: int | None) -> None:
    """Write the pictures of a source at 32 px, and their classes, to an .npz."""
    from edt_diffusion.data import open_images

    pictures = open_images(source, size=32)
    if pictures.labels is None:
        raise UserError(f"{source} has no classes: the training needs them")
    count = min(limit or len(pictures), len(pictures))
    rows = np.linspace(0, len(pictures) - 1, count).round().astype(np.int64)
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, images=pictures.images(rows), labels=pictures.labels[rows])
    print(f"{count} pictures in {target}", file=sys.stderr)


# Sampling


def sampling(options: argparse.Namespace, device: torch.device, deadline: Deadline) -> dict[str, Any]:
    """Pictures/s of whole samplings, in bfloat16 on a GPU, with random weights and without an autoencoder."""
    from edt_diffusion.pipelines import ClassConditionalPipeline, make_scheduler
    from edt_diffusion.profiling.generation import profile_sampling

    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    size, batch = ("tiny", 2) if options.tiny else ("S", 64)
    for network in compare.NETWORKS:
        model = compare.build_network(network, size, pixels_of(options))
        nn.Module.to(model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        pipeline = ClassConditionalPipeline(model, make_scheduler("ddpm", learned_variance=True))
        pipeline.set_progress_bar_config(disable=True)
        for scheduler, steps, cache in SAMPLINGS:
            row = {"network": network, "scheduler": scheduler, "steps": steps, "cache": cache, "batch": batch}
            if deadline.left() < 20 and not options.tiny:
                left_out.append(f"{network} {scheduler} {steps} {cache}")
                continue
            try:
                found = profile_sampling(
                    pipeline, batch, clock_for(device), None, scheduler, 5 if options.tiny else steps, 2.0, cache
                )
                rows.append({**row, "pictures_per_second": 1 / found.seconds_per_picture, "passes": found.passes})
            except Exception as error:
                rows.append({**row, "unavailable": failure(error)})
        release(device)
    return {"guidance": 2.0, "rows": rows, LEFT_OUT: left_out}


PART_FUNCTIONS: dict[str, Callable[[argparse.Namespace, torch.device, Deadline], dict[str, Any]]] = {
    "tests": run_tests, "parity": parity, "throughput": throughput, "training": training, "sampling": sampling,
}  # fmt: skip


# Results


def merged(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of several calls as one; a later file's part takes the place of an earlier one's.

    Raises:
        UserError: they are of different devices.
    """
    if len({each["name"] for each in found}) > 1:
        raise UserError(f"results of different devices: {', '.join(each['name'] for each in found)}")
    parts: dict[str, Any] = {}
    for each in found:
        parts |= each["parts"]
    return {**found[-1], "parts": {part: parts[part] for part in PARTS if part in parts}}


def write(results: Mapping[str, Any], out: Path) -> None:
    make_folder(out)
    stem = f"gpu_{results['name']}_{results['date']}"
    atomic_write_json(out / f"{stem}.json", finite(json.loads(json.dumps(results))))
    atomic_write_text(out / f"{stem}.md", page(results))


def finite(value: Any) -> Any:
    """Plain values with None for what JSON has no form for."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    told = results["machine"]
    lines = [
        f"# {told.get('gpu', told['device'])}, {results['date']}", "",
        f"torch {told['torch']}, {told['cpu']}, {told['cores']} cores.",
    ]  # fmt: skip
    for part, found in results["parts"].items():
        lines += ["", f"## {part}", ""]
        if "error" in found:
            lines += [f"Failed: {found['error']}"]
            continue
        lines += PAGES[part](found)
        if found.get(LEFT_OUT):
            lines += ["", f"Left out for want of time: {'; '.join(found[LEFT_OUT])}."]
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def text(cell: Any) -> str:
        return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(map(text, row))} |" for row in rows]


def page_of_tests(found: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{number} {what}" for what, number in found["counts"].items())
    return [f"{counts}.", *found["failures"]]


def page_of_parity(found: Mapping[str, Any]) -> list[str]:
    bounds = ", ".join(f"{kind} {bound:g}" for kind, bound in found["bounds"].items())
    head = f"Root mean square error over that of the output, against float64. Bounds: {bounds}. "
    rows = [
        [row["network"], row["pixels"], row["dtype"], row["amm"], row.get("error"),
         row.get("unavailable") or ("" if row["within"] else "beyond the bound")]
        for row in found["rows"]
    ]  # fmt: skip
    met = {True: "All are within them.", False: "Some are beyond them.", None: ""}[found["within"]]
    return [head + met, "", *table(("network", "px", "precision", "AMM", "error", ""), rows)]


def page_of_throughput(found: Mapping[str, Any]) -> list[str]:
    peak = ", ".join(f"{value:.3g} in {kind}" for kind, value in found["matmul_peak_tflops"].items())
    rows = [
        [row["what"], row["size"], row["dtype"], "compiled" if row["compiled"] else "eager", row["batch"],
         row.get("network"), row.get("images_per_second") or row.get("unavailable"), row.get("seconds_over_edt"),
         row.get("tflops"), row.get("peak_mib")]
        for row in found["rows"]
    ]  # fmt: skip
    header = ("what", "size", "precision", "", "batch", "network", "images/s", "seconds over EDT's", "TFLOP/s", "MiB")
    return [f"Matrix products reach {peak} TFLOP/s here.", "", *table(header, rows)]


def page_of_training(found: Mapping[str, Any]) -> list[str]:
    head = (
        f"{found['seconds']:g} seconds of training each, {found['seeds']} seeds, batch {found['batch']}, rate "
        f"{found['lr']:g}, {found['precision']}; {found['images']} samples. Fréchet distance of the given extractor's "
        "features, which is not FID."
    )
    metrics = list(dict.fromkeys(metric for each in found["networks"] for metric in each["scores"]))
    rows = [
        [each["title"], each["parameters"], each.get("step"), each.get("images"),
         *(each["scores"].get(metric, {}).get("mean") for metric in metrics)]
        for each in found["networks"]
    ]  # fmt: skip
    if found["ceiling"]:
        rows.append(["held-out real pictures", None, None, None, *(found["ceiling"].get(name) for name in metrics)])
    lines = [head, "", *table(("network", "parameters", "steps", "images seen", *metrics), rows)]
    if found["missing"]:
        lines += ["", f"Missing: {', '.join(found['missing'])}."]
    return lines


def page_of_sampling(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["network"], row["scheduler"], row["steps"], row["cache"], row["batch"],
         row.get("pictures_per_second") or row.get("unavailable"), row.get("passes")]
        for row in found["rows"]
    ]  # fmt: skip
    header = ("network", "sampler", "steps", "cache", "batch", "pictures/s", "passes a picture")
    return [f"Guidance {found['guidance']:g}, random weights, no decoding.", "", *table(header, rows)]


PAGES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "tests": page_of_tests, "parity": page_of_parity, "throughput": page_of_throughput,
    "training": page_of_training, "sampling": page_of_sampling,
}  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
