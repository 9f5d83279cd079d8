"""What the benchmarks of speed and memory have in common: options, goals, how figures are handed out, peaks."""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A type of argparse: some of the known names, with commas between them."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if stray := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{stray[0]!r}: expected some of {', '.join(known)}")
        return chosen

    return parse


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that has `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", nargs="?", const="-", help="write the figures to this file, or to standard output")
    return parser


def judged(results: Mapping[str, Any], goals: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    """Which goals, (">=" or "<", bound) by figure, were reached, of figures that were measured."""
    return {
        name: {
            "goal": f"{sign} {bound}",
            "reached": results[name] >= bound if sign == ">=" else results[name] < bound,
        }
        for name, (sign, bound) in goals.items()
        if name in results
    }


def save(results: dict[str, Any], where: str | None) -> None:
    """Write what there is to the file of `--json`; called after each part, since the next ones take minutes."""
    if hasattr(os, "getloadavg"):
        results["machine"]["load_average_after"] = round(os.getloadavg()[0], 2)
    if where not in (None, "-"):
        Path(where).write_text(json.dumps(results, indent=2) + "\n")


def hand_out(results: Mapping[str, Any], where: str | None) -> None:
    """Print the figures: as JSON for `--json` alone, else for people."""
    if where == "-":
        print(json.dumps(results, indent=2))
    else:
        tell(results)


def tell(results: Mapping[str, Any], indent: str = "") -> None:
    """Print figures for people; a list of sentences a line each."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}")
            tell(value, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(line, str) and " " in line for line in value):
            print("\n".join([f"{indent}{name}", *(f"{indent}  {line}" for line in value)]))
        else:
            print(f"{indent}{name:32} {value:.4g}" if isinstance(value, float) else f"{indent}{name:32} {value}")


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock of a call with everything it has queued on the device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until everything that is queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def quartiles(values: Sequence[float]) -> list[float]:
    """25, 50 and 75 per cent."""
    return [float(value) for value in np.percentile(values, [25, 50, 75])]


def reset_peak(device: torch.device) -> float:
    """Forget the peak of memory so far (see `edt_diffusion.util.hardware.peak_memory`).

    Returns:
        What is used now, in bytes.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
