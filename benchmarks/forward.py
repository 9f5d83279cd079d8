"""A forward pass of EDT by this package against a naive one, what AMM adds to it, and its memory.

    python benchmarks/forward.py --json results.json
    python benchmarks/forward.py --only fp32_512_amm,bf16_512_amm --repeats 30
    python benchmarks/forward.py --device cuda --json results.json

The *naive* pass has the same weights in float32, attention written out, and gathers the relative-position bias in each
call; all else is the model's own. That both passes give the same numbers is checked in each run before anything is
timed (`errors`: largest difference over the largest magnitude). Weights that start as zero are random here, so that
every product is a real one.

Figures of EDT-S/2 (goals in brackets, for CPUs; a missed goal is reported and is no failure):

- fp32_256, bf16_256 [>= 1.03, 2.4]            naive over ours at 256 px (32x32x4 latents), batch 4, without AMM
- fp32_512_amm, bf16_512_amm [>= 1.35, 3.0]    at 512 px (64x64x4), batch 2, with the published AMM
- amm_cost_256, amm_cost_512 [< 0.01, < 0.05]  what AMM adds to a float32 pass, as a share: in each round (`--pairs` of
  them) the attention of each modulated block is timed with and without it, and the differences are summed and divided
  by the time of a whole pass beside them (at 512 px a pass for every few rounds); the median of the rounds;
  amm_cost_*_bf16 likewise
- memory                                       MiB that the passes at 512 px take at most beyond the weights, in fresh
  processes; kept biases are included, and told apart
- gpu                                          images/s of S, B and XL in bfloat16 by form of AMM, eager and compiled

Machines are shared: what is compared is timed in turn, a figure is the median of the ratios of neighbours, and
`spread` has their quartiles. By default all cores are used.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from harness import hand_out, judged, make_parser, names, quartiles, reset_peak, save, seconds_of
from machine import machine
from torch import Tensor, nn

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.models.edt import SIZES
from edt_diffusion.nn.attention import GridAttention
from edt_diffusion.nn.modulated_attention import FORMS
from edt_diffusion.util.hardware import peak_memory

SPEEDS = {  # figure: (pixels, batch, AMM, dtype)
    "fp32_256": (256, 4, False, torch.float32),
    "bf16_256": (256, 4, False, torch.bfloat16),
    "fp32_512_amm": (512, 2, True, torch.float32),
    "bf16_512_amm": (512, 2, True, torch.bfloat16),
}
ROUNDS_OF_A_PASS = {256: 1, 512: 4}  # rounds of attention with and without AMM beside one whole pass
FEWEST_PAIRS = 50
COSTS = {  # figure: (pixels, batch, dtype)
    "amm_cost_256": (256, 4, torch.float32),
    "amm_cost_256_bf16": (256, 4, torch.bfloat16),
    "amm_cost_512": (512, 2, torch.float32),
    "amm_cost_512_bf16": (512, 2, torch.bfloat16),
}
PARTS = (*SPEEDS, *COSTS, "memory", "gpu")
GOALS = {
    "fp32_256": (">=", 1.03),
    "bf16_256": (">=", 2.4),
    "fp32_512_amm": (">=", 1.35),
    "bf16_512_amm": (">=", 3.0),
    "amm_cost_256": ("<", 0.01),
    "amm_cost_512": ("<", 0.05),
}
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.1}
GPU_BATCHES = {256: 64, 512: 16}
SEED = 0
# For trying the script out.
TINY = {"num_classes": 10, "depths": (1,) * 5, "dims": (16, 24, 32, 24, 16), "num_heads": (2,) * 5}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("highest")
    if arguments.child is not None:
        print(json.dumps(memory_of_passes(**json.loads(arguments.child))))
        return {}
    device = torch.device(arguments.device)
    results: dict[str, Any] = {"machine": machine(device), "size": arguments.size, "errors": {}, "seconds": {}}
    results |= {"repeats": arguments.repeats, "pairs": arguments.pairs, "spread": {}}
    for part in (speeds, amm_costs, memory, gpus):
        with torch.inference_mode():
            part(results, arguments, device)
        if device.type == "cpu" and arguments.size == "S":
            results["goals"] = judged(results, GOALS)
        save(results, arguments.json)
    hand_out(results, arguments.json)
    return results


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    sizes = ("tiny", *SIZES)
    parser = make_parser(__doc__)
    parser.add_argument(
        "--only", type=names(PARTS), help=f"some of {','.join(PARTS)} (default: all but gpu; on CUDA gpu)"
    )
    parser.add_argument("--size", default="S", choices=sizes)
    parser.add_argument("--repeats", type=int, default=15, help="interleaved timings of each kind of pass")
    parser.add_argument("--pairs", type=int, default=60, help="rounds of attention with and without AMM")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--gpu-sizes", type=names(sizes), default=["S", "B", "XL"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.only is None:
        on_gpu = arguments.device.startswith("cuda")
        arguments.only = [part for part in PARTS if (part == "gpu") == on_gpu]
    return arguments


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, timed in turn after one that is not counted, every other time in the opposite order."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in list(calls)[:: 1 if repeat % 2 == 0 else -1]:
            seconds[name].append(seconds_of(calls[name], device))
    return seconds


# The passes


class NaiveProcessor:
    """Attention of `GridAttention` as it is first written down: the bias gathered in each call, scores held whole."""

    def __call__(
        self, attn: GridAttention, hidden_states: Tensor, modulate: bool = True, kept: Tensor | None = None
    ) -> Tensor:
        batch, tokens, dim = hidden_states.shape
        heads = attn.heads
        q, k, v = (
            part(hidden_states).reshape(batch, tokens, heads, dim // heads).transpose(1, 2)
            for part in (attn.to_q, attn.to_k, attn.to_v)
        )
        bias = attn.position_bias.table[attn.position_bias.index]  # (N N, heads)
        bias = bias.view(tokens, tokens, heads).permute(2, 0, 1).contiguous()
        scores = (q * (dim // heads) ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        probabilities = scores.softmax(dim=-1)
        if modulate and attn.modulation is not None:
            probabilities = probabilities * attn.modulation
        return attn.to_out[0]((probabilities @ v).transpose(1, 2).reshape(batch, tokens, dim))


def build_network(size: str, pixels: int, amm: bool) -> EDTTransformer2DModel:
    torch.manual_seed(SEED)
    side = pixels // 8
    if size == "tiny":
        model = EDTTransformer2DModel(sample_size=side // 2, **TINY)
    else:
        model = EDTTransformer2DModel.from_size(size, sample_size=side)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("position_bias.table"):
                p.normal_(std=0.5)
            elif not p.any():
                p.normal_(std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    if amm:  # the published setting of this layout, or what is nearest to it
        setting = model.suggested_modulation()
        assert setting is not None
        model.set_attention_modulation(setting.blocks, setting.formula, setting.radius)
    return cast(EDTTransformer2DModel, model.eval())


def naive(model: EDTTransformer2DModel) -> EDTTransformer2DModel:
    model = copy.deepcopy(model)
    for attention, _ in model.attention_layers():
        attention.set_processor(NaiveProcessor())  # pyright: ignore[reportArgumentType]
    return model


def inputs_of(model: EDTTransformer2DModel, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    config = model.config
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    labels = torch.randint(0, config.num_classes, (batch,), generator=generator)
    return {"hidden_states": x.to(device, dtype), "timestep": t.to(device), "class_labels": labels.to(device)}


def pass_of(model: EDTTransformer2DModel, batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    cast(nn.Module, model).to(device, dtype)
    inputs = inputs_of(model, batch, dtype, device)
    return lambda: model(**inputs, return_dict=False)[0]


def speeds(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in the ratios of the naive pass to ours; both dtypes of a size beside the same naive passes."""
    for pixels in (256, 512):
        wanted = {name: each for name, each in SPEEDS.items() if name in arguments.only and each[0] == pixels}
        if not wanted:
            continue
        (batch, amm), *_ = {(batch, amm) for _, batch, amm, _ in wanted.values()}
        model = build_network(arguments.size, pixels, amm)
        calls = {f"naive_{pixels}": pass_of(naive(model), batch, torch.float32, device)}
        expected = calls[f"naive_{pixels}"]()
        for name, (_, _, _, dtype) in wanted.items():
            calls[name] = pass_of(copy.deepcopy(model), batch, dtype, device)
            error = float((calls[name]().float() - expected).abs().max() / expected.abs().max())
            results["errors"][name] = error
            if not error < LARGEST_ERROR[dtype]:
                raise RuntimeError(f"{name}: the passes differ by {error:.3g} of the largest magnitude")
        seconds = interleaved(calls, arguments.repeats, device)
        results["seconds"] |= {name: statistics.median(values) for name, values in seconds.items()}
        for name in wanted:
            ratios = [a / b for a, b in zip(seconds[f"naive_{pixels}"], seconds[name], strict=True)]
            spread = quartiles(ratios)
            results[name], results["spread"][name] = spread[1], spread[::2]


def amm_costs(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in what AMM adds to a pass, as a share of the passes timed beside it."""
    wanted = {name: each for name, each in COSTS.items() if name in arguments.only}
    if wanted and arguments.pairs < FEWEST_PAIRS:
        results["note"] = (
            f"amm_cost_*: of {arguments.pairs} pairs only; {FEWEST_PAIRS} or more for figures to be quoted"
        )
    for name, (pixels, batch, dtype) in wanted.items():
        model = build_network(arguments.size, pixels, amm=True)
        whole = pass_of(model, batch, dtype, device)
        attentions: list[dict[bool, Callable[[], Any]]] = []
        for attention, (height, width) in model.attention_layers():
            if attention.modulation is not None:
                states = torch.randn(batch, height * width, attention.to_q.in_features).to(device, dtype)
                attentions.append({
                    modulate: lambda a=attention, x=states, m=modulate: a(x, modulate=m) for modulate in (True, False)
                })  # fmt: skip
        shares, passes = shares_of_modulation(attentions, whole, arguments.pairs, ROUNDS_OF_A_PASS[pixels], device)
        spread = quartiles(shares)
        results[name], results["spread"][name] = spread[1], spread[::2]
        results["seconds"][f"pass of {name}"] = statistics.median(passes)


def shares_of_modulation(
    attentions: Sequence[dict[bool, Callable[[], Any]]],
    whole: Callable[[], Any],
    rounds: int,
    rounds_of_a_pass: int,
    device: torch.device,
) -> tuple[list[float], list[float]]:
    """The share of each round, and the seconds of the passes.

    In a round each attention is timed with and without modulation (keys True and False), in turn first. A pass is timed
    in the middle of every `rounds_of_a_pass` rounds, and these rounds are compared with it.
    """
    whole()
    shares: list[float] = []
    passes: list[float] = []
    for first in range(0, rounds, rounds_of_a_pass):
        group = range(first, min(first + rounds_of_a_pass, rounds))
        differences: list[float] = []
        for place in group:
            if place == group[len(group) // 2]:
                passes.append(seconds_of(whole, device))
            difference = 0.0
            for number, calls in enumerate(attentions):
                order = (True, False) if (place + number) % 2 == 0 else (False, True)
                calls[order[1]]()  # not counted: it finds caches cold after a pass or another block
                seconds = {modulate: seconds_of(calls[modulate], device) for modulate in order}
                difference += seconds[True] - seconds[False]
            differences.append(difference)
        shares += [difference / passes[-1] for difference in differences]
    return shares, passes


# Memory


def memory(results: dict[str, Any], arguments: argparse.Namespace, _device: torch.device) -> None:
    """Fill in the peaks of the passes at 512 px, each in a fresh process."""
    if "memory" not in arguments.only:
        return
    results["memory"] = {}
    for name in ("naive", "fp32", "bf16"):
        wanted = {"size": arguments.size, "kind": name, "device": arguments.device}
        command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(arguments.threads)]
        # Blocks of freed memory that glibc keeps would hide what a pass takes.
        given_back = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
        ran = subprocess.run(
            [*command, "--child", json.dumps(wanted)],
            env=os.environ | given_back, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            raise RuntimeError(f"the process that measures memory failed:\n{ran.stderr}")
        results["memory"][name] = json.loads(ran.stdout.splitlines()[-1])


@torch.inference_mode()
def memory_of_passes(size: str, kind: str, device: str) -> dict[str, float]:
    """MiB beyond the weights: the peak of two passes, and what of it stays (kept biases, mainly)."""
    where = torch.device(device)
    small, small_batch = build_network("tiny", 256, amm=True), 1  # loads libraries
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    pass_of(small, small_batch, dtype, where)()
    model = build_network(size, 512, amm=True)
    if kind == "naive":
        model = naive(model)
    call = pass_of(model, SPEEDS["fp32_512_amm"][1], dtype, where)
    before = reset_peak(where)
    for _ in range(2):
        call()
    peak = peak_memory(where)
    assert peak is not None
    return {"peak_mib": (peak - before) / 2**20, "kept_mib": (reset_peak(where) - before) / 2**20}


# GPUs


def gpus(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in latency and images/s by size, resolution, form of AMM, eager and compiled."""
    if "gpu" not in arguments.only:
        return
    results["gpu"] = {
        f"{size} {pixels} {name} {'compiled' if compiled else 'eager'}": outcome
        for size in arguments.gpu_sizes
        for pixels in GPU_BATCHES
        for compiled in (False, True)
        for name, outcome in passes_on_gpu(size, pixels, compiled, arguments.repeats, device)
    }


def passes_on_gpu(
    size: str, pixels: int, compiled: bool, repeats: int, device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(form, figures), or what failed where the device lacks a form."""
    forms: dict[str, str | None] = {"no AMM": None, "automatic": None, **{name: name for name in FORMS}}
    for name, form in forms.items():
        model = build_network(size, pixels, amm=name != "no AMM")
        for attention, _ in model.attention_layers():
            attention.processor.form = form  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        try:
            outcome = {}
            for key, batch in (("latency_ms", 1), ("images_per_second", GPU_BATCHES[pixels])):
                torch.compiler.reset()
                call = pass_of(model, batch, torch.bfloat16, device)
                if compiled:
                    model.compile_repeated_blocks(fullgraph=True)
                seconds = interleaved({"pass": call}, repeats, device)["pass"]
                median = statistics.median(seconds)
                outcome[key] = 1000 * median if batch == 1 else batch / median
                outcome["peak_mib"] = (peak_memory(device) or 0.0) / 2**20
            yield name, outcome
        except Exception as error:  # a form may be absent, or refuse to be compiled
            yield name, {"unavailable": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


if __name__ == "__main__":
    main()
