"""Everything that is measured on a GPU, in one script: correctness, speed, memory, and a timed training.

    export PYTHONPATH=src  # where the package is not installed
    python benchmarks/gpu_suite.py --out results --parts tests,parity,sampling
    python benchmarks/gpu_suite.py --out results --parts throughput
    python benchmarks/gpu_suite.py --out results --parts training --data train.npz --test-data test.npz \
        --extractor features.ts --seconds 100
    python benchmarks/gpu_suite.py --out results --merge results/first.json,results/second.json
    python benchmarks/gpu_suite.py --pack train.npz --data train.parquet --limit 15000
    python benchmarks/gpu_suite.py --out /tmp/try --device cpu --tiny

Parts:

- tests       `pytest -m gpu`
- parity      EDT, DiT and MDTv2 (S) at 256 and 512 px, with and without AMM in each of its forms, in float32, TF32,
              bfloat16 and float16, against the same weights in float64: root mean square of the difference over that of
              the output, and whether it is within `BOUNDS`. FlexAttention, which is never taken by itself and compiles
              for long, is tried once (`FLEX_WITH`)
- throughput  images/s and memory of forward passes and training steps at 256 px, in bfloat16, TF32 and float32, eager,
              then compiled in bfloat16, by batch; the steps are those of `compare.py`, and networks are timed in turn
              where they fit in memory together
- training    EDT-S, DiT-S and MDTv2-S on pictures of 32 px (patches of 2, so that there are as many tokens as at 256 px
              with an autoencoder) for equal seconds, and the Fréchet distance of their samples
- sampling    pictures/s of some samplers and feature caches, decoding left out

Beside torch this needs accelerate, diffusers 0.42, huggingface_hub, numpy, pillow, psutil, pydantic, pyyaml, rich and
safetensors; the tests need pytest, and compiling Triton.

Each part stands for itself: what fails is told and the others go on, unless the device answers no more. Results are
written after each row to `gpu_NAME_DATE.json` and a page beside it, into which a later call of the same day puts what
it measures. `--budget` is for the whole call: nothing is begun with less of it left than its kind usually takes, and
what did not fit is named under `left_out`; what has begun is not stopped, and may outlast it, but for the tests and the
training. That is stopped at the end of the budget; the same command goes on with it, as long as `--work` is there. The
call ends with status 1 where one of its parts failed.

`--data` and `--test-data` may be .npz files with uint8 pictures (N, H, W, 3) as `images` or `arr_0` and integer classes
as `labels` or `arr_1`, which need nothing but numpy; `--pack` makes them from any pictures that `edt train` takes.
"""

import argparse
import contextlib
import copy
import functools
import gc
import hashlib
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import compare
import numpy as np
import torch
from harness import reset_peak
from machine import machine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import edt_diffusion
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
FLEX_WITH = ("edt", 256, "bf16")  # network, px and precision
# Seconds of the budget that must be left to begin with something.
TESTS_SECONDS, MOST_OF_TESTS = 30.0, 150.0
PARITY_SECONDS, FLEX_SECONDS = 30.0, 90.0
EAGER_SECONDS, COMPILED_SECONDS = 60.0, 240.0
SAMPLING_SECONDS = 30.0
LEAST_SECONDS = 15.0  # the timed training
SAVE_EVERY = 600.0  # seconds of a training; when asked to stop it saves too
LEFT_OUT = "left_out"

Note = Callable[[dict[str, Any]], None]  # takes what a part has so far


class DeviceLost(Exception):
    """The device answers no more: nothing can be measured by this process."""


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
    deadline = Deadline(options.budget)
    results = begun(options, device)
    for number, part in enumerate(options.parts, 1):
        ended = run_part(part, results, options, device, deadline)
        if ended is not None:
            others = ", ".join(options.parts[number:])
            results["ended_early"] = f"in {part}, {ended}" + (f"; not begun: {others}" if others else "")
            print(f"ended early: {results['ended_early']}", file=sys.stderr, flush=True)
            write(results, options.out)
            break
    return results


def begun(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Results without parts, or with those of an earlier call of this day on the same device.

    Raises:
        UserError: what an earlier call left cannot be read.
    """
    results = {
        "name": re.sub(r"[^a-z0-9]+", "-", name_of(device).lower()).strip("-") + ("-tiny" if options.tiny else ""),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "parts": {},
    }
    earlier = options.out / f"{stem_of(results)}.json"
    if earlier.is_file():
        try:
            found = json.loads(earlier.read_text("utf-8"))
            if found["name"] == results["name"]:
                results["parts"] = dict(found["parts"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{earlier} is damaged ({error}): move it away, or choose another --out") from None
    return results


def exit_status(results: Mapping[str, Any], parts: Sequence[str]) -> int:
    """1 where a call ended early or one of its parts failed; other parts, of earlier calls, do not count."""
    found = [results.get("parts", {}).get(part, {}) for part in parts]
    failed = any("error" in part or "failed_later" in part for part in found)
    return 1 if failed or results.get("ended_early") else 0


def run_part(
    part: str, results: dict[str, Any], options: argparse.Namespace, device: torch.device, deadline: "Deadline"
) -> str | None:
    """Fill in a part, as it grows and as it ends; returns why nothing can follow it, or None."""
    start, before = time.monotonic(), results["parts"].get(part)
    noted: dict[str, Any] = {}
    print(f"{part} ...", file=sys.stderr, flush=True)

    def keep(told: Mapping[str, Any]) -> None:
        if "rows" in told:  # a later call may have another torch
            told = {**told, "rows": [{**row, "torch": torch.__version__} for row in told["rows"]]}
        results["parts"][part] = joined(before, {**told, "took_seconds": round(time.monotonic() - start, 1)})
        write(results, options.out)

    def note(told: dict[str, Any]) -> None:
        noted.update(told)
        keep({**told, "unfinished": True})

    ended = None
    try:
        set_tf32(False)
        told = PART_FUNCTIONS[part](options, device, deadline, note)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a part stands for itself
        told = {**noted, "error": failure(error)}
        print(told["error"], file=sys.stderr, flush=True)
        if isinstance(error, DeviceLost | KeyboardInterrupt):
            ended = told["error"]
    keep(told)
    if ended is None:
        try:
            release(device)
        except DeviceLost as error:
            ended = failure(error)
    return ended


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
    parser.add_argument("--budget", type=float, default=480.0, help="seconds of the whole call")
    parser.add_argument("--sizes", default="S,B,XL", help="of the throughput")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each throughput")
    parser.add_argument("--data", help="pictures with classes: .npz, or as edt train --data")
    parser.add_argument("--test-data", help="held-out pictures, likewise: what a perfect model would get")
    parser.add_argument("--extractor", help="as edt evaluate --extractor")
    parser.add_argument("--seconds", type=float, default=100.0, help="of training, for each network")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each network")
    parser.add_argument("--images", type=int, default=5000, help="samples that are scored")
    parser.add_argument("--train-batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the timed training, for all")
    parser.add_argument("--work", type=Path, help="folder of the timed training (default: a temporary one)")
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
    """Give back memory and compiled graphs.

    Raises:
        DeviceLost: a kernel has failed in a way that ends everything on the device.
    """
    try:
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLost(failure(error)) from error


def set_tf32(allowed: bool) -> None:
    """Products and convolutions of float32 in TF32 or not; torch has it on for convolutions, patch embeddings too."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def failure(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}".removesuffix(": ")


def unheard(_told: dict[str, Any]) -> None:
    """Takes what a part has so far where nobody wants it."""


@functools.cache
def built(network: str, size: str, pixels: int) -> Any:
    return compare.build_network(network, size, pixels)


def network_of(network: str, size: str, pixels: int) -> Any:
    """A network of `compare.build_network`, made once and copied: the large ones take seconds to make."""
    torch.manual_seed(compare.SEED)  # for what is drawn from now on, whether it was made just now or before
    return copy.deepcopy(built(network, size, pixels))


class Kernels(TorchDispatchMode):
    """Counts attention kernels that torch chooses; that without fusion, `attention_math`, in inference mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "scaled_dot_product_attention":  # not taken apart before it comes here, in inference mode
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if "scaled_dot_product" in name and not name.endswith("backward"):
            name = name.removeprefix("_scaled_dot_product_")
            self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def watching(kernels: bool = True) -> Iterator[dict[str, Any]]:
    """Fill in, at the end, which forms of attention the networks took and which of torch's kernels were behind them.

    What is compiled cannot be called while kernels are counted: Dynamo skips what runs within a dispatch mode.
    """
    told: dict[str, Any] = {}
    counting = Kernels() if kernels else None
    with compare.watching_forms() as forms, counting or contextlib.nullcontext():
        yield told
    told |= {"forms": dict(forms)} | ({} if counting is None else {"kernels": counting.seen})


def enabled_kernels() -> list[str]:
    """The kernels that torch's fused attention may choose from."""
    backends = torch.backends.cuda
    allowed = {
        "flash": backends.flash_sdp_enabled(), "efficient": backends.mem_efficient_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(), "math": backends.math_sdp_enabled(),
    }  # fmt: skip
    return [name for name, there in allowed.items() if there]


# Tests


def run_tests(
    _options: argparse.Namespace, device: torch.device, deadline: Deadline, _note: Note = unheard
) -> dict[str, Any]:
    """`pytest -m gpu` on the files that have such tests, in a process of its own."""
    if deadline.left() < TESTS_SECONDS:
        return {"error": "not begun: too little of the budget is left"}
    # Warnings of versions that the project is not tested with are no failures here, nor is a plug-in that is not there.
    words = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfE", "-p", "no:cacheprovider", "-W", "default",
        "-o", "addopts=--strict-markers", "--continue-on-collection-errors", *files_of_tests(),
    ]  # fmt: skip
    seconds = min(deadline.left(), MOST_OF_TESTS)
    try:
        ran = subprocess.run(
            words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        output = output if isinstance(output, str) else output.decode(errors="replace")
        return {"error": "\n".join([f"not done within {seconds:.0f} s; the last lines:", *output.splitlines()[-20:]])}
    told = summary_of_tests(ran.stdout)
    if ran.returncode not in (0, 1) or not told["counts"]:
        return {"error": "\n".join((ran.stdout + ran.stderr).splitlines()[-20:])}
    return {**told, "on_a_gpu": device.type == "cuda"}


def files_of_tests() -> list[str]:
    """The files with tests for a GPU, marked one by one or as a whole, from the root of the repository."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text("utf-8")]


def environment() -> dict[str, str]:
    """That of this process, in which another one finds the package, installed or not."""
    package = str(Path(edt_diffusion.__file__ or "").resolve().parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def summary_of_tests(output: str) -> dict[str, Any]:
    """Counts and failures from what pytest printed."""
    lines = output.strip().splitlines()
    last = next((line for line in reversed(lines) if re.search(r"\bin [\d.]+s", line)), "")
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return {"counts": counts, "failures": [line for line in lines if line.startswith(("FAILED ", "ERROR "))]}


# Parity


def parity(
    options: argparse.Namespace, device: torch.device, deadline: Deadline, note: Note = unheard
) -> dict[str, Any]:
    """Errors of every precision and form of AMM against float64."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    size = "tiny" if options.tiny else "S"

    def told() -> dict[str, Any]:
        return {"bounds": BOUNDS, **verdict(rows), "rows": rows, LEFT_OUT: left_out}

    for pixels in PIXELS if not options.tiny else (128,):
        for network in compare.NETWORKS:
            for amm in (False, True):
                item = f"{network} {pixels} {'AMM' if amm else 'plain'}"
                if deadline.left() < (FLEX_SECONDS if amm and (network, pixels) == FLEX_WITH[:2] else PARITY_SECONDS):
                    left_out.append(item)
                    continue
                try:
                    for row in errors_of(network, size, pixels, amm, device):
                        rows.append({"item": item, **row})
                        note(told())
                except Exception as error:
                    which = {"network": network, "pixels": pixels, "dtype": "all", "amm": "on" if amm else "off"}
                    rows.append({"item": item, **which, "unavailable": failure(error)})
                    note(told())
                release(device)
    return told()


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether all errors are within their bounds, and the largest of each precision."""
    there = [row for row in rows if "within" in row]
    return {
        "within": all(row["within"] for row in there) if there else None,
        "largest": {
            kind: max((infinite(row["error"]) for row in there if row["dtype"] == kind), default=None)
            for kind in BOUNDS
        },
    }


def infinite(error: float | None) -> float:
    """An error as it was before it was JSON."""
    return float("inf") if error is None else error


def errors_of(network: str, size: str, pixels: int, amm: bool, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each precision and form, of one network."""
    model = network_of(network, size, pixels)
    spread_biases(model)
    if amm:
        setting = model.suggested_modulation()
        assert setting is not None
        model.set_attention_modulation(setting.blocks, setting.formula, setting.radius)
    set_form(model, "explicit")
    try:
        exact = compare.pass_of(copy.deepcopy(model), 2, torch.float64, device)().clone()
        for kind, dtype in DTYPES.items():
            if kind == "tf32" and device.type != "cuda":
                continue
            set_tf32(kind == "tf32")
            own = copy.deepcopy(model)  # moving to a dtype rounds the weights: none is to have those of another
            for form in (None, *FORMS) if amm else (None,):
                if form == "flex":
                    if (network, pixels, kind) != FLEX_WITH:
                        continue
                    torch.compiler.reset()  # torch keeps few graphs of one function
                set_form(own, form)
                row = {"network": network, "pixels": pixels, "dtype": kind}
                row["amm"] = (form or "automatic") if amm else "off"
                try:
                    with watching(kernels=form != "flex") as watched:  # which compiles itself
                        out = compare.pass_of(own, 2, dtype, device)()
                    error = relative_rms(out, exact)
                    row |= {**watched, "error": error, "within": error <= BOUNDS[kind]}
                except Exception as problem:  # a form may be absent on this device
                    row["unavailable"] = failure(problem)
                yield row
    finally:
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


def throughput(
    options: argparse.Namespace, device: torch.device, deadline: Deadline, note: Note = unheard
) -> dict[str, Any]:
    """Images/s and memory; what matters most comes first, for the budget may end it, and what compiles last."""
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    kinds = ("bf16", "tf32", "fp32") if device.type == "cuda" else ("bf16", "fp32")
    passes = [(kind, False) for kind in kinds] + ([("bf16", True)] if device.type == "cuda" else [])
    wanted = [
        (what, size, kind, compiled, batch)
        for kind, compiled in passes
        for size in options.sizes
        for what, batches in (("forward", FORWARD_BATCHES), ("train", TRAIN_BATCHES))
        for batch in (batches[size] if kind == "bf16" and not compiled else batches[size][-1:])
    ]
    told = {
        "pixels": pixels_of(options),
        "matmul_peak_tflops": {kind: measured_matmul_peak(device, DTYPES[kind]) / 1e12 for kind in ("bf16", "fp32")},
        "kernels_allowed": enabled_kernels(),
        "rows": rows,
        LEFT_OUT: left_out,
    }
    for what, size, kind, compiled, batch in wanted:
        item = f"{what} {size} {kind} {'compiled' if compiled else 'eager'} {batch}"
        if deadline.left() < (COMPILED_SECONDS if compiled else EAGER_SECONDS) and not options.tiny:
            left_out.append(item)
            continue
        set_tf32(kind == "tf32")
        measured = forward_rates if what == "forward" else training_rates
        common = {"item": item, "what": what, "size": size, "dtype": kind, "compiled": compiled, "batch": batch}
        common["rounds"] = options.rounds
        try:
            rows += [{**common, **row} for row in measured(size, kind, compiled, batch, options, device)]
        except Exception as error:
            rows.append({**common, "unavailable": failure(error)})
        set_tf32(False)
        note(told)
        release(device)
    return told


def forward_rates(
    size: str, kind: str, compiled: bool, batch: int, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each network, timed in turn."""
    calls, facts, failed = {}, {}, []
    for network in compare.NETWORKS:
        try:
            model = network_of(network, size, pixels_of(options))
            call = compare.pass_of(model, batch, DTYPES[kind], device)
            with watching() as watched:
                out = call()
            compare.refuse_degenerate(f"{network} {size} {kind}", out)
            if compiled:
                model.compile_repeated_blocks(fullgraph=True)
                apart = relative_rms(call(), out)
                if apart > BOUNDS[kind]:
                    raise RuntimeError(f"{network} compiled differs from eager by {apart:.2g}")
            else:
                model.train().eval()  # forgets the position biases that it keeps: they are of the pass
            standing = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
            facts[network] = {
                "work": 2 * sum(model.multiply_adds().values()), "peak_mib": peak_of(call, device),
                "standing_mib": standing / 2**20, **watched,
            }  # fmt: skip
            calls[network] = call
        except Exception as error:  # the others go on
            failed.append({"network": network, "unavailable": failure(error)})
    if not calls:
        return failed
    timings, counts = windows(calls, options.rounds, device)
    return rows_of(timings, counts, batch, facts) + failed


def training_rates(
    size: str, kind: str, compiled: bool, batch: int, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each recipe; in turn where all fit in memory at once, one by one where not."""
    recipes = list(compare.RECIPES)
    groups = [recipes] if size in TOGETHER else [[recipe] for recipe in recipes]
    seconds, counts, facts, failed = {}, {}, {}, []
    for group in groups:
        try:
            steps = compare.steps_of(size, pixels_of(options), batch, DTYPES[kind], device, group, network_of)
            # All are watched before any is compiled: recipes share a network, and none may be called compiled then.
            watched = of_each(steps, forms_of_step, failed)
            shared = "edt_star" if len(group) > 1 else None  # its network is compiled with that of edt
            compiling = [recipe for recipe in group if compiled and recipe != shared]
            measure = functools.partial(facts_of_step, compiling=compiling)
            facts |= {recipe: {**told, **watched[recipe]} for recipe, told in of_each(steps, measure, failed).items()}
            if steps:
                timings, made = windows(steps, options.rounds, device)
                for recipe, step in steps.items():
                    compare.refuse_degenerate(f"loss of {recipe} {size}", step.loss)
                seconds |= timings.seconds
                counts |= made
        except Exception as error:
            there = {row["network"] for row in failed}
            failed += [{"network": recipe, "unavailable": failure(error)} for recipe in group if recipe not in there]
        steps = timings = step = None
        release(device)
    return rows_of(Timings(seconds), counts, batch, facts, in_turn=len(groups) == 1) + failed


def of_each(
    steps: dict[str, Any], measure: Callable[[str, Any], dict[str, Any]], failed: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What is measured of each step; one that fails is told, and taken out of the steps."""
    found = {}
    for recipe, step in list(steps.items()):
        try:
            found[recipe] = measure(recipe, step)
        except Exception as error:  # the others go on
            failed.append({"network": recipe, "unavailable": failure(error)})
            del steps[recipe]
    return found


def forms_of_step(_recipe: str, step: Any) -> dict[str, Any]:
    """Forms of attention, and kernels, of the passes of a training step that is not compiled."""
    with watching() as watched:
        step.passes()
    return watched


def facts_of_step(recipe: str, step: Any, compiling: Sequence[str]) -> dict[str, Any]:
    """Work and memory of a training step, which is warm then, and compiled if it is among those."""
    step()  # makes the optimizer's state
    if recipe in compiling:
        step.trained.model.compile_repeated_blocks(fullgraph=True)
    step()
    # Twice the multiply-adds, three times for forward and backward, and the passes that are computed whole.
    whole = 2 * 3 * sum(step.trained.model.multiply_adds().values())
    return {
        "work": None if recipe == "mdtv2" else whole * len(step.objective.passes),
        "peak_mib": peak_of(step, step.trained.device),
        "standing_mib": step.trained.standing_bytes() / 2**20,
    }


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
    facts: Mapping[str, Mapping[str, Any]],
    in_turn: bool = True,
) -> list[dict[str, Any]]:
    """Images/s with quartiles, share of arithmetic, and seconds of an image over EDT's.

    Args:
        timings, counts: of `windows`.
        batch: images of a call.
        facts: of each network what is told of it, and `work`, the operations of an image.
        in_turn: whether neighbours in a round were timed close together; if not, the ratio is that of medians.
    """
    # Windows of different lengths are compared by the seconds of an image.
    images = {name: counts[name] * batch for name in timings.seconds}
    each = Timings({name: [s / images[name] for s in seconds] for name, seconds in timings.seconds.items()})
    rows = []
    for name in each.seconds:
        median, low, high = each.of(name)
        told = dict(facts[name])
        work = told.pop("work")
        row = {
            "network": name,
            "images_per_second": 1 / median,
            "quartiles": [1 / high, 1 / low],
            "tflops": None if work is None else work / median / 1e12,
            **told,
        }
        if "edt" in each.seconds and name != "edt":
            ratio, *spread = each.ratio(name, "edt") if in_turn else (median / each.of("edt")[0],)
            row |= {"seconds_over_edt": ratio, "seconds_over_edt_quartiles": spread or None}
        rows.append(row)
    return rows


def pixels_of(options: argparse.Namespace) -> int:
    return 128 if options.tiny else 256


def peak_of(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB of a call at most, beyond what stands; on CUDA only."""
    if device.type != "cuda":
        return None
    before = reset_peak(device)
    call()
    torch.cuda.synchronize(device)
    return ((peak_memory(device) or 0.0) - before) / 2**20


# The timed training


def training(
    options: argparse.Namespace, device: torch.device, deadline: Deadline, _note: Note = unheard
) -> dict[str, Any]:
    """EDT, DiT and MDTv2 for equal seconds on one data set, and the distance of their samples."""
    if not options.data or not options.extractor:
        raise UserError("the training needs --data and --extractor: give both, or leave the part out with --parts")
    from edt_diffusion.studies.matrix import Budget, Matrix, Results, Variant, run_matrix

    titles, extractor = metrics_of(options.extractor)
    work = options.work or usual_work(options)
    make_folder(work)
    train = readable(options.data, work / "train.zip")
    test = None if not options.test_data else readable(options.test_data, work / "test.zip")
    precision = "bf16" if device.type == "cuda" else "no"
    sampling = {
        "scheduler": "ddim", "steps": 4 if options.tiny else 25, "guidance": 1.0,
        "precision": "bf16" if device.type == "cuda" else "fp32",
    }  # fmt: skip
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
        variants=(Variant("plain", f"DDIM, {sampling['steps']} steps", sampling),),
        images=options.images,
        extractor=options.extractor,
        metrics=tuple(titles),
        ceiling=test,
        batch=None if device.type != "cuda" else 500,
        save_every=SAVE_EVERY,
    )
    left = deadline.left() - 20
    if left < LEAST_SECONDS:
        raise UserError(f"{max(left, 0):.0f} s of --budget are left: too few to go on with the training; name it alone")
    timer = stopped_after(left)
    try:
        with timer:
            results = run_matrix(matrix, work / "runs", processes=1)
    except KeyboardInterrupt:
        if not timer.fired:
            raise
        results = Results.read(work / "runs", matrix)  # it came when the work was just done
        results.stopped = True
    if results.missing or results.stopped:
        print(f"to go on with the training: the same command, with --work {work}", file=sys.stderr, flush=True)
    told: dict[str, Any] = {
        "seconds": options.seconds, "seeds": options.seeds, "images": options.images, "batch": options.train_batch,
        "lr": options.lr, "precision": precision, "sampling": sampling, "networks": [], "extractor": extractor,
        "titles": titles,
        "ceiling": {name: value["value"] for name, value in (results.ceiling or {}).get("metrics", {}).items()},
        "stopped": results.stopped, "missing": results.missing, "failed": results.failed,
    }  # fmt: skip
    for arm in matrix.arms:
        runs = [spent for name, spent in results.done.items() if name.startswith(f"{arm.name}-seed")]
        scores = {metric: results.mean(arm.name, metric) for metric in titles}
        told["networks"].append({
            "name": arm.name, "title": arm.title, **results.spent(arm.name),
            "parameters": runs[0].get("parameters") if runs else None,
            "data_wait_share": data_wait(work / "runs", arm.name, matrix.seeds),
            "scores": {
                metric: {"mean": score.mean, "interval": [score.low, score.high]}
                for metric, score in scores.items()
                if score is not None
            },
        })  # fmt: skip
    return told


def metrics_of(extractor: str) -> tuple[dict[str, str], str]:
    """Those of `METRICS` that an extractor allows, with what each is called with it; and the extractor's name."""
    from edt_diffusion.evaluation.extractors import open_extractor
    from edt_diffusion.evaluation.metrics import METRICS as KNOWN

    network = open_extractor(extractor)
    found = network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    allowed = [name for name in METRICS if "logits" not in KNOWN[name].needs or found.logits is not None]
    return {name: KNOWN[name].title(network.name) for name in allowed}, network.name


def usual_work(options: argparse.Namespace) -> Path:
    """The folder of a timed training, the same for the same settings and the same files."""
    names = ("seconds", "images", "train_batch", "lr", "device", "tiny")
    files = {name: identity(getattr(options, name)) for name in ("data", "test_data", "extractor")}
    settings = json.dumps({**files, **{name: getattr(options, name) for name in names}}, sort_keys=True)
    return Path(tempfile.gettempdir()) / f"edt-gpu-suite-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def identity(path: str | None) -> Any:
    """What tells a file from others and from what it is once it is written anew; what is no file is as it is."""
    if path is None or not Path(path).exists():
        return path
    state = Path(path).stat()
    return [str(Path(path).resolve()), state.st_size, state.st_mtime_ns]


def data_wait(folder: Path, arm: str, seeds: Sequence[int]) -> float | None:
    """The share of its time that a training waited for data, the mean of the lines of its logs."""
    from edt_diffusion.studies.matrix.folder import MatrixFolder, Run
    from edt_diffusion.training.lines import read_log

    lines = [line for seed in seeds for line in read_log(MatrixFolder(folder).run(Run(arm, seed)))]
    shares = [line["data_wait_share"] for line in lines if "data_wait_share" in line]
    return statistics.fmean(shares) if shares else None


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
    """Ask this process to stop, as by Ctrl-C, when the time is over within the body.

    Attributes:
        fired: whether it was asked.
    """

    def __init__(self, seconds: float) -> None:
        self.fired = False
        self._timer = threading.Timer(max(seconds, 0.1), self._ask)
        self._timer.daemon = True

    def _ask(self) -> None:
        self.fired = True
        os.kill(os.getpid(), signal.SIGINT)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()  # nothing comes after the body


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


def sampling(
    options: argparse.Namespace, device: torch.device, deadline: Deadline, note: Note = unheard
) -> dict[str, Any]:
    """Pictures/s of whole samplings, in bfloat16 on a GPU, with random weights and without an autoencoder."""
    from edt_diffusion.pipelines import ClassConditionalPipeline, make_scheduler
    from edt_diffusion.profiling.generation import profile_sampling

    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    size, batch = ("tiny", 2) if options.tiny else ("S", 64)
    precision, dtype = ("bf16", torch.bfloat16) if device.type == "cuda" else ("fp32", torch.float32)
    told = {
        "guidance": 2.0, "precision": precision, "size": size, "pixels": pixels_of(options), "rows": rows,
        LEFT_OUT: left_out,
    }  # fmt: skip
    for network in compare.NETWORKS:
        pipeline: Any = None
        for scheduler, steps, cache in SAMPLINGS:
            item = f"{network} {scheduler} {steps} {cache}"
            row = {"item": item, "network": network, "scheduler": scheduler, "steps": steps, "cache": cache}
            row["batch"] = batch
            if deadline.left() < SAMPLING_SECONDS and not options.tiny:
                left_out.append(item)
                continue
            try:
                if pipeline is None:
                    model = network_of(network, size, pixels_of(options))
                    nn.Module.to(model, device, dtype)
                    pipeline = ClassConditionalPipeline(model, make_scheduler("ddpm", learned_variance=True))
                    pipeline.set_progress_bar_config(disable=True)
                found = profile_sampling(
                    pipeline, batch, clock_for(device), None, scheduler, 5 if options.tiny else steps, 2.0, cache
                )
                rows.append({**row, "pictures_per_second": 1 / found.seconds_per_picture, "passes": found.passes})
            except Exception as error:
                rows.append({**row, "unavailable": failure(error)})
            note(told)
        pipeline = None
        release(device)
    return told


PART_FUNCTIONS: dict[str, Callable[[argparse.Namespace, torch.device, Deadline, Note], dict[str, Any]]] = {
    "tests": run_tests, "parity": parity, "throughput": throughput, "training": training, "sampling": sampling,
}  # fmt: skip


# Results


def merged(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of several calls as one; what a later file has takes the place of what an earlier one has, see `joined`.

    Raises:
        UserError: they are of different devices.
    """
    if len({each["name"] for each in found}) > 1:
        raise UserError(
            f"results of different devices: {', '.join(each['name'] for each in found)}; name files of one device, and "
            "make a page for each"
        )
    parts: dict[str, Any] = {}
    for each in found:
        parts |= {part: joined(parts.get(part), told) for part, told in each["parts"].items()}
    return {**found[-1], "parts": {part: parts[part] for part in PARTS if part in parts}}


def joined(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """A part of two calls: rows of the later one take the place of those of the same item, and nothing else is lost.

    A later call that has nothing but an error leaves the part as it was and adds `failed_later`; a later training that
    has more missing than the one before leaves that as it was and adds `not_kept`.
    """
    if before is None or not has_results(before):
        return dict(now)
    if not has_results(now):
        return {**before, "failed_later": now["error"]} if "error" in now else dict(before)
    if len(now.get("missing", ())) > len(before.get("missing", ())):
        missing = ", ".join(now["missing"])
        return {**before, "not_kept": f"{now['seconds']:g} seconds of training each; missing: {missing}"}
    if "rows" not in before or "rows" not in now:
        return dict(now)
    items = {row["item"] for row in now["rows"]}
    rows = [*(row for row in before["rows"] if row["item"] not in items), *now["rows"]]
    there = {row["item"] for row in rows}
    left_out = [item for item in dict.fromkeys([*before[LEFT_OUT], *now[LEFT_OUT]]) if item not in there]
    return {**now, **(verdict(rows) if "bounds" in now else {}), "rows": rows, LEFT_OUT: left_out}


def has_results(part: Mapping[str, Any]) -> bool:
    return bool(part.keys() - {"error", "took_seconds", "unfinished", "failed_later", "not_kept"})


def stem_of(results: Mapping[str, Any]) -> str:
    return f"gpu_{results['name']}_{results['date']}"


def write(results: Mapping[str, Any], out: Path) -> None:
    make_folder(out)
    stem = stem_of(results)
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
    if results.get("ended_early"):
        lines += ["", f"Ended early: {results['ended_early']}."]
    for part, found in results["parts"].items():
        lines += ["", f"## {part}", ""]
        for what, name in (
            ("Failed", "error"),
            ("A later call failed", "failed_later"),
            ("A later call with more missing is not kept", "not_kept"),
        ):
            if name in found:
                lines += [f"{what}: {found[name]}", ""]
        if found.get("unfinished"):
            lines += ["Not finished: the call was ended from outside.", ""]
        if not has_results(found):
            continue
        lines += [*PAGES[part](found), *mixture(found.get("rows", ()), told["torch"])]
        if found.get(LEFT_OUT):
            lines += ["", f"Left out for want of time: {'; '.join(found[LEFT_OUT])}."]
    return "\n".join(lines) + "\n"


def mixture(rows: Sequence[Mapping[str, Any]], version: str) -> list[str]:
    """Lines on rows of another torch than that of the last call, and on those of different numbers of rounds."""
    versions, rounds = (Counter(row[name] for row in rows if name in row) for name in ("torch", "rounds"))
    lines = [f"Rows of torch {other}: {count}." for other, count in versions.items() if other != version]
    if len(rounds) > 1:
        counts = (f"{count} of {number} rounds" for number, count in sorted(rounds.items()))
        lines.append(f"Not all rows are of as many rounds: {', '.join(counts)}.")
    return [line for each in lines for line in ("", each)]


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
    head = (
        f"Pictures of {found['pixels']} px. Forward passes in bf16 have weights in bf16, training steps in bf16 have "
        "autocast over weights in float32. On a GPU EDT's two passes of a training step run as one batch of twice the "
        "size, MDTv2's one after the other. Compiled are the transformer blocks; the block within MDTv2's side "
        "interpolater, which its masked pass computes, stays eager. MiB are those of torch's allocator: at the peak "
        "beyond what stands, and what stands itself (weights; in training optimizer state and average too). Trainings "
        "of XL are timed one network after the other: their ratio is that of medians, others are of neighbours in time."
    )
    kernels = (
        "Attention is the form that the networks take by themselves, of a forward pass or of the passes of a step, "
        "with the number of calls; behind `sdpa` stand the kernels that torch chose, of those it may choose from "
        f"({', '.join(found['kernels_allowed'])}). That without fusion is `attention_math` in forward passes; in "
        "training it has no name, and stands where none is named."
    )
    rows = [
        [row["what"], row["size"], row["dtype"], "compiled" if row["compiled"] else "eager", row["batch"],
         row.get("network"), row.get("images_per_second") or row.get("unavailable"), row.get("seconds_over_edt"),
         row.get("tflops"), row.get("peak_mib"), row.get("standing_mib"), attention_of(row)]
        for row in found["rows"]
    ]  # fmt: skip
    header = (
        "what", "size", "precision", "", "batch", "network", "images/s", "seconds over EDT's", "TFLOP/s",
        "MiB at the peak", "MiB that stand", "attention",
    )  # fmt: skip
    return [f"{head} Matrix products reach {peak} TFLOP/s here.", "", kernels, "", *table(header, rows)]


def attention_of(row: Mapping[str, Any]) -> str:
    """Forms and kernels with their calls, such as "sdpa 10 (efficient_attention 10)"."""
    forms, kernels = (
        ", ".join(f"{name} {calls}" for name, calls in row.get(what, {}).items()) for what in ("forms", "kernels")
    )
    return forms + (f" ({kernels})" if kernels else "")


def page_of_training(found: Mapping[str, Any]) -> list[str]:
    titles = found["titles"]
    head = (
        f"{found['seconds']:g} seconds of training each, {found['seeds']} seeds, batch {found['batch']}, rate "
        f"{found['lr']:g}, {found['precision']}; {found['images']} samples in {found['sampling']['precision']}, "
        f"{found['sampling']['scheduler']}, {found['sampling']['steps']} steps. Extractor: {found['extractor']}."
    )
    metrics = [metric for metric in titles if any(metric in each["scores"] for each in found["networks"])]
    rows = [
        [each["title"], each["parameters"], each.get("step"), each.get("images"), each.get("data_wait_share"),
         *(each["scores"].get(metric, {}).get("mean") for metric in metrics)]
        for each in found["networks"]
    ]  # fmt: skip
    if found["ceiling"]:
        rows.append(["held-out real pictures", *[None] * 4, *(found["ceiling"].get(name) for name in metrics)])
    header = ("network", "parameters", "steps", "images seen", "share of waiting for data", *map(titles.get, metrics))
    lines = [head, "", *table([str(name) for name in header], rows)]
    if found["stopped"]:
        lines += ["", "Stopped before the end; the same command goes on with it."]
    if found["missing"]:
        lines += ["", f"Missing: {', '.join(found['missing'])}."]
    lines += [line for what, why in found["failed"].items() for line in ("", f"Failed: {what}: {why}")]
    return lines


def page_of_sampling(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["network"], row["scheduler"], row["steps"], row["cache"], row["batch"],
         row.get("pictures_per_second") or row.get("unavailable"), row.get("passes")]
        for row in found["rows"]
    ]  # fmt: skip
    header = ("network", "sampler", "steps", "cache", "batch", "pictures/s", "passes a picture")
    head = (
        f"Networks of size {found['size']} at {found['pixels']} px in {found['precision']}, eager; guidance "
        f"{found['guidance']:g}, random weights, no decoding. One run each, after a short one."
    )
    return [head, "", *table(header, rows)]


PAGES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "tests": page_of_tests, "parity": page_of_parity, "throughput": page_of_throughput,
    "training": page_of_training, "sampling": page_of_sampling,
}  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(exit_status(main(), parse_arguments(None).parts))
    except UserError as error:
        sys.exit(str(error))
