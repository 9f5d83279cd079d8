"""What each precision, compiling and offloading cost in exactness, and gain in time and memory, against float32.

    python benchmarks/precision.py --json results.json
    python benchmarks/precision.py --model runs/a --only fp32,bf16,int8 --steps 20

For each variant:

- forward_error    relative L2 error of one prediction against float32, by timestep
- grey_levels      mean absolute difference of final samples from float32's, of 255 levels over [-1, 1] (latents are
                   taken alike, unclamped); DPM-Solver++, same seeds
- speed            time of a float32 forward pass over this one's, timed in turn: median of the ratios of neighbours,
                   with their quartiles
- weights_mb       parameters and buffers as they are stored

Without --model EDT-S/2 at 256 px with random weights, none of them zero; its samples are noise, so that only a trained
model's grey levels mean something. One thread by default. A variant that this machine lacks is reported as such.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.pipelines.loading import load_pipeline
from edt_diffusion.pipelines.precision import PRECISIONS, compile_network, in_precision, offload_network, weight_bytes
from edt_diffusion.profiling.job import ProfileRequest, open_model
from edt_diffusion.profiling.measure import example_inputs
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.rng import image_seed

TIMESTEPS = (20, 250, 500, 750, 980)
VARIANTS: dict[str, Callable[[Any], Any]] = {
    **{name: (lambda network, name=name: in_precision(network, name)) for name in PRECISIONS},
    "fp32 compiled": lambda network: compile_network(copy.deepcopy(network)),
    "bf16 compiled": lambda network: compile_network(in_precision(network, "bf16")),
    "fp32 offloaded": lambda network: offload_network(copy.deepcopy(network), network.device),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="EDT-S/2", help="run folder, diffusers folder or published size")
    parser.add_argument("--json", nargs="?", const="-", help="write the figures to this file, or to standard output")
    parser.add_argument("--only", default=",".join(VARIANTS), help="some of the variants, separated by commas")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if stray := [name for name in arguments.only.split(",") if name not in VARIANTS]:
        parser.error(f"{stray[0]!r}: expected some of {', '.join(VARIANTS)}")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch's compiler
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "threads": arguments.threads,
                    "torch": torch.__version__, "device": arguments.device},
        "model": Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        "batch": arguments.batch, "steps": arguments.steps, "guidance": arguments.guidance,
        "repeats": arguments.repeats, "variants": {},
    }  # fmt: skip
    pipeline = open_pipeline(arguments.model).to(arguments.device)
    plain = pipeline.transformer
    expected, expected_sample = predictions(plain, arguments.batch), sample(pipeline, arguments)
    for name in arguments.only.split(","):
        try:
            network = VARIANTS[name](plain)
        except UserError as error:
            results["variants"][name] = {"left_out": str(error)}
            continue
        pipeline.transformer = network
        found = predictions(network, arguments.batch)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
        difference = (sample(pipeline, arguments) - expected_sample).abs().mean() * 255 / 2
        ratios = speed(plain, network, arguments)
        pipeline.transformer = plain
        results["variants"][name] = {
            "forward_error": dict(zip(map(str, TIMESTEPS), errors, strict=True)),
            "forward_error_mean": statistics.fmean(errors),
            "grey_levels": float(difference),
            "speed": statistics.median(ratios),
            "speed_quartiles": [float(value) for value in np.percentile(ratios, [25, 75])],
            "weights_mb": weight_bytes(network) / 1e6,
        }
        if arguments.json not in (None, "-"):
            Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    if arguments.json == "-":
        print(json.dumps(results, indent=2))
    else:
        tell(results)
    return results


def open_pipeline(model: str) -> ClassConditionalPipeline:
    if Path(model).exists():
        pipeline = load_pipeline(model)
        pipeline.transformer.eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    return open_model(ProfileRequest(model))


@torch.no_grad()
def predictions(network: Any, batch: int) -> list[torch.Tensor]:
    inputs = example_inputs(network, batch)
    return [network(**{**inputs, "timestep": inputs["timestep"] * 0 + t})[0].float() for t in TIMESTEPS]


def sample(pipeline: ClassConditionalPipeline, arguments: argparse.Namespace) -> torch.Tensor:
    classes = pipeline.transformer.config.num_classes
    seeds = [image_seed(0, number) for number in range(arguments.batch)]
    labels = None if classes is None else [number % classes for number in range(arguments.batch)]
    made = pipeline(
        labels, seeds=seeds, scheduler="dpm++", num_inference_steps=arguments.steps, output_type="latent",
        guidance_scale=1.0 if labels is None else arguments.guidance,
    )  # fmt: skip
    return made.images.float().cpu()


@torch.no_grad()
def speed(plain: Any, network: Any, arguments: argparse.Namespace) -> list[float]:
    calls = [(each, example_inputs(each, arguments.batch)) for each in (plain, network)]
    taken: list[list[float]] = [[], []]
    for repeat in range(arguments.repeats + 2):
        for side, (each, inputs) in enumerate(calls):
            start = time.perf_counter()
            each(**inputs)
            if arguments.device != "cpu":
                torch.accelerator.synchronize()
            if repeat >= 2:
                taken[side].append(time.perf_counter() - start)
    return [a / b for a, b in zip(*taken, strict=True)]


def processor() -> str:
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def tell(results: dict[str, Any]) -> None:
    print(f"{'variant':16} {'error':>9} {'grey levels':>12} {'speed':>7} {'MB':>8}")
    for name, found in results["variants"].items():
        if "left_out" in found:
            print(f"{name:16} {found['left_out']}")
            continue
        print(
            f"{name:16} {found['forward_error_mean']:9.2e} {found['grey_levels']:12.3f} {found['speed']:7.2f} "
            f"{found['weights_mb']:8.1f}"
        )


if __name__ == "__main__":
    main()
