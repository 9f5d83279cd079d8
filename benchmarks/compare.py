"""EDT, DiT and MDTv2 side by side: parameters, multiply-adds, time of a forward pass and of a training step, memory.

    python benchmarks/compare.py --json results.json
    python benchmarks/compare.py --sizes S --parts forward,train --repeats 20 --threads 1
    python benchmarks/compare.py --device cuda --dtype bf16 --sizes S,B,XL --batch 32 --train-batch 64 --json -

All three are this package's, on the same attention module; which of its forms each network took where, as it happened,
is in `forms`, and they need not be the same. Weights that start as zero are random here, so that nothing is multiplied
by zero, and what comes out is checked to be finite. Latents are of pixels / 8 with 4 channels.

A training step is: the passes, their loss, one backward pass, Adan without clipping, and one average of the weights.
Everything random in it is drawn before. The passes are those of each paper's recipe:

- edt        full, and masked in EDT's way, in the down-sampling modules; what is masked is computed all the same
- edt_star   EDT with the full pass only, the paper's EDT*
- dit        full
- mdtv2      full, and masked in MDT's way: 0.3 to 0.5 of the tokens are left out of the blocks before the side
             interpolater, which is computed too (the shares are those of MDTv2-S, for all sizes)

On a CPU the two passes run one after the other; on a GPU those of EDT run as one batch, as in `edt train`, and those of
MDTv2, which have different numbers of tokens, cannot.

Figures, for s, b and xl (goals in brackets, for S on CPUs; a missed goal is reported and is no failure):

- forward_mdtv2_s_over_edt_s [>= 2.2]   time of a forward pass of MDTv2 over that of EDT (the paper, on a GPU: 2.29)
- forward_dit_s_over_edt_s [>= 1.9]     the same of DiT
- train_mdtv2_s_over_edt_s [>= 2.1]     time of a training step of MDTv2 over that of EDT (the paper, on GPUs: 3.93)
- train_dit_s_over_edt_s, train_edt_star_s_over_edt_s
- *_passes                              the same ratio without optimizer and average, whose time does not grow with
  the batch: what the step's ratio tends to as batches grow
- work                                  multiply-adds of one image, of a pass and of the passes of a step, and ratios
- memory                                MiB at the peak beyond what stands, of a pass and of a step, each in a fresh
  process on a CPU; `standing_mib` is weights, optimizer state and average
- discussion                            the paper's training ratios beside what is measured here

Machines are shared: networks are timed in turn, in one process, a figure is the median of the ratios of neighbours, and
`spread` has their quartiles. XL is counted, and timed where `--sizes` names it. `--clock cpu` takes the processor time
of this process instead of the wall clock, for a machine on which much else runs; it says so in the result.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from harness import hand_out, judged, make_parser, names, reset_peak, save
from machine import machine
from torch import Tensor, nn

from edt_diffusion.assemble.budget import joint_passes
from edt_diffusion.config import RunConfig, parse_config
from edt_diffusion.models import BACKBONES, flops
from edt_diffusion.models.masking import INPUT_MASKS
from edt_diffusion.nn import attention
from edt_diffusion.objectives.config import build_objective, default_masks
from edt_diffusion.profiling.clock import Clock, clock_for
from edt_diffusion.profiling.side_by_side import Timings, in_turn
from edt_diffusion.training.adan import Adan
from edt_diffusion.training.ema import EMAConfig, EMASet
from edt_diffusion.util.hardware import peak_memory

NETWORKS = {"edt": "EDT", "dit": "DiT", "mdtv2": "MDTv2"}
RECIPES = {  # of training: network and passes
    "edt": ("edt", "full+masked"),
    "edt_star": ("edt", "full"),
    "dit": ("dit", "full"),
    "mdtv2": ("mdtv2", "full+masked"),
}
PARTS = ("counts", "forward", "train", "memory")
SIZES = ("tiny", "S", "B", "L", "XL")
COUNTED = ("S", "B", "XL")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {
    "forward_mdtv2_s_over_edt_s": (">=", 2.2),
    "forward_dit_s_over_edt_s": (">=", 1.9),
    "train_mdtv2_s_over_edt_s": (">=", 2.1),
}
# EDT over MDTv2 of the same size, as the paper has them (arXiv 2410.23788): training and sampling speed.
PAPER = {"train": {"S": 3.93, "B": 2.84, "XL": 1.92}, "forward": {"S": 2.29, "B": 2.29, "XL": 2.22}}
LR, BETAS, EPS, DECAY = 1e-4, (0.98, 0.92, 0.99), 1e-8, 0.9999
BATCHES = 4  # of training, used one after the other
SEED = 0
# For trying the script out.
TINY: dict[str, dict[str, Any]] = {
    "edt": {"depths": [1] * 5, "dims": [16, 24, 32, 24, 16], "num_heads": [2] * 5, "num_classes": 10},
    "dit": {"depth": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 10},
    "mdtv2": {"depth": 4, "decode_layers": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 10},
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")
    if arguments.child is not None:
        print(json.dumps(memory_of(**json.loads(arguments.child))))
        return {}
    device = torch.device(arguments.device)
    kept = ("sizes", "pixels", "batch", "train_batch", "dtype", "tf32", "compile", "clock", "repeats", "train_repeats")
    results: dict[str, Any] = {
        "machine": machine(device),
        "settings": {name: getattr(arguments, name) for name in kept},
        "spread": {},
        "seconds": {},
        "forms": {},
    }
    for part in (count, time_forward, time_training, measure_memory):
        part(results, arguments, device)
        results["goals"] = judged(results, GOALS) if device.type == "cpu" else {}
        results["discussion"] = discussion(results)
        save(results, arguments.json)
    hand_out(results, arguments.json)
    return results


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", type=names(PARTS), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--sizes", type=names(SIZES), default=["S", "B"], help="sizes that are timed")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="bf16 trains under autocast")
    parser.add_argument("--tf32", action="store_true", help="products of float32 in TF32 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor time of one thread")
    parser.add_argument("--pixels", type=int, default=256, help="side of the pictures; latents have an eighth")
    parser.add_argument("--batch", type=int, default=4, help="images of a forward pass")
    parser.add_argument("--train-batch", type=int, default=8, help="images of a training step")
    parser.add_argument("--repeats", type=int, default=11, help="timed rounds of forward passes")
    parser.add_argument("--train-repeats", type=int, default=5, help="timed rounds of training steps")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.clock == "cpu" and (arguments.device != "cpu" or arguments.threads != 1):
        parser.error("--clock cpu is for --device cpu with --threads 1: threads that wait use up time, too")
    return arguments


def clock_of(arguments: argparse.Namespace) -> Clock:
    return Clock(time.process_time) if arguments.clock == "cpu" else clock_for(torch.device(arguments.device))


# The networks


def settings_of(network: str, size: str, pixels: int) -> dict[str, Any]:
    """`model:` of a configuration."""
    own = TINY[network] if size == "tiny" else {"size": size}
    return {"name": NETWORKS[network], "sample_size": pixels // 8, **own}


def build_network(network: str, size: str, pixels: int = 256) -> Any:
    """A network as in the midst of training: what starts as zero is not."""
    torch.manual_seed(SEED)
    arguments = settings_of(network, size, pixels)
    backbone = BACKBONES[arguments.pop("name")]
    model = backbone(**arguments) if size == "tiny" else backbone.from_size(arguments.pop("size"), **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return model.eval()


def inputs_of(model: Any, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    config = model.config
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    labels = torch.randint(0, config.num_classes, (batch,), generator=generator)
    return {"hidden_states": x.to(device, dtype), "timestep": t.to(device), "class_labels": labels.to(device)}


def pass_of(model: Any, batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A forward pass as in sampling; moves the network to the device and the dtype."""
    nn.Module.to(model, device, dtype)  # diffusers' own speaks of what it keeps in float32, which is nothing
    inputs = inputs_of(model, batch, dtype, device)

    def call() -> Tensor:
        with torch.inference_mode():
            return model(**inputs, return_dict=False)[0]

    return call


def refuse_degenerate(what: str, values: Tensor) -> None:
    """Stop where something is not finite, or all the same: its time would be of something else."""
    if not bool(values.isfinite().all()) or (values.numel() > 1 and not float(values.float().std()) > 0):
        raise RuntimeError(f"{what}: what came out is not finite, or all the same")


# The training step


def config_of(recipe: str, size: str, pixels: int, batch: int) -> RunConfig:
    network, passes = RECIPES[recipe]
    model = settings_of(network, size, pixels)
    objective: dict[str, Any] = {"passes": passes}
    if passes != "full":
        objective["masks"] = default_masks(model).model_dump(mode="json")
    return parse_config({
        "seed": SEED, "model": model, "data": {"size": pixels // 8}, "objective": objective,
        "train": {"batch_size": batch},
    })  # fmt: skip


class Trained:
    """A network with the optimizer and the average of a training."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        cast(nn.Module, model).to(device).train()
        self.optimizer = Adan(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
        self.ema = EMASet(model, EMAConfig(decay=DECAY, warmup=False))

    def standing_bytes(self) -> int:
        """Weights, optimizer state, average."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        kept = [*self.model.parameters(), *self.model.buffers(), *states]
        averaged = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return averaged + sum(each.numel() * each.element_size() for each in kept if isinstance(each, Tensor))


class Step:
    """The training step of a recipe, with batches at hand.

    Attributes:
        marks: of each step made: before the passes, after them, at the end; see `profiling.clock`.
        loss: of the last step.
    """

    def __init__(self, recipe: str, size: str, pixels: int, batch: int, dtype: torch.dtype, trained: Trained) -> None:
        config = config_of(recipe, size, pixels, batch)
        self.trained, self.dtype, self.batch = trained, dtype, batch
        model, device = trained.model, trained.device
        joint = joint_passes(config, device)
        self.objective = build_objective(config.objective, learn_sigma=True, joint=joint)
        self.clock, self.marks, self.made = clock_for(device), [], 0
        self.loss = torch.zeros(())
        self.given: list[tuple[Tensor, Tensor, Any]] = []
        shape = (model.config.in_channels, *((model.config.sample_size,) * 2))
        generator = torch.Generator().manual_seed(SEED)
        for step in range(BATCHES):
            x0 = torch.randn(batch, *shape, generator=generator).to(device)
            labels = torch.randint(model.config.num_classes, (batch,), generator=generator)
            host = self.objective.host_draws(SEED, step, range(batch), shape, model.mask_grids, True)
            self.given.append((x0, labels.to(device), self.objective.finish(host, labels, model.null_label).to(device)))

    def passes(self) -> Tensor:
        """The loss of the next batch, with its graph."""
        x0, _, draws = self.given[self.made % BATCHES]
        with torch.autocast(x0.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.objective.loss_of(self.trained.model, x0, draws).total

    def __call__(self) -> None:
        start = self.clock.mark()
        loss = self.passes()
        loss.backward()
        between = self.clock.mark()
        self.trained.optimizer.step()
        self.trained.ema.update(self.trained.model)
        self.trained.optimizer.zero_grad(set_to_none=True)
        self.marks.append((start, between, self.clock.mark()))
        self.loss, self.made = loss.detach(), self.made + 1

    def updates(self, last: int) -> list[float]:
        """Seconds of optimizer and average in the last steps."""
        self.clock.settle()
        return [self.clock.seconds(between, end) for _, between, end in self.marks[-last:]]


# Forms of attention


@contextlib.contextmanager
def watching_forms() -> Iterator[Counter[str]]:
    """Count the calls of each form of attention by the networks, as they happen; not within compiled blocks."""
    seen: Counter[str] = Counter()
    names = {
        "dispatch_attention_fn": "sdpa",
        "explicit_attention": "explicit",
        "modulated_attention_in_place": "in-place",
        "modulated_attention": "modulated",
    }
    own = {name: getattr(attention, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[names[name]] += 1
            return own[name](*args, **kwargs)

        return call

    for name in names:
        setattr(attention, name, counted(name))
    try:
        yield seen
    finally:
        for name, function in own.items():
            setattr(attention, name, function)


# Counts


def count(results: dict[str, Any], arguments: argparse.Namespace, _device: torch.device) -> None:
    """Fill in parameters and multiply-adds of the sizes that are timed, and of S, B and XL."""
    if "counts" not in arguments.parts:
        return
    sizes = [size for size in SIZES if size in {*COUNTED, *arguments.sizes}]
    if arguments.sizes == ["tiny"]:
        sizes = ["tiny"]
    results["parameters"], results["work"] = {}, {}
    for size in sizes:
        for network in NETWORKS:
            with torch.device("meta"):
                arguments_of = settings_of(network, size, arguments.pixels)
                backbone = BACKBONES[arguments_of.pop("name")]
                model = (
                    backbone(**arguments_of) if size == "tiny"
                    else backbone.from_size(arguments_of.pop("size"), **arguments_of)
                )  # fmt: skip
            own = {name: parameter.numel() for name, parameter in model.named_parameters()}
            idle = set(model.masked_only())
            results["parameters"][f"{network} {size}"] = {
                "inference": sum(number for name, number in own.items() if name not in idle),
                "all": sum(own.values()),
            }
            forward = sum(model.multiply_adds().values())
            masked = masked_multiply_adds(network, model)
            results["work"][f"{network} {size}"] = {
                "forward": forward,
                "step": {"edt": 3 * 2 * forward, "dit": 3 * forward, "mdtv2": 3 * (forward + masked)}[network],
                "masked_pass": None if network == "dit" else masked,
            }
    results["work_ratios"] = {
        f"{what}_{network}_{size}_over_edt_{size}".lower(): results["work"][f"{network} {size}"][what]
        / results["work"][f"edt {size}"][what]
        for what in ("forward", "step")
        for size in sizes
        for network in NETWORKS
        if network != "edt"
    }


def masked_multiply_adds(network: str, model: Any) -> float:
    """Multiply-adds of a masked pass of one image: EDT computes what it masks; MDTv2's mean over the shares left out.

    Of MDTv2's blocks those of the first two stages have the tokens that are left, the side interpolater's and the
    decoder's have all.
    """
    whole = float(sum(model.multiply_adds().values()))
    if network != "mdtv2":
        return whole
    config, (height, width) = model.config, model.grids[0]
    tokens, dim, ratio = height * width, config.hidden_size, config.mlp_ratio
    entry, out, _ = model.stage_depths
    low, high = INPUT_MASKS
    shares = [low + (high - low) * (number + 0.5) / 1000 for number in range(1000)]

    def encoder(count: int) -> int:
        block = sum(flops.transformer_block(count, dim, dim, ratio).values())
        return (entry + out) * block + out * flops.skip_fusion(count, dim)

    left = statistics.fmean(encoder(int(tokens * (1 - share))) for share in shares)
    guess = sum(flops.transformer_block(tokens, dim, dim, ratio).values())
    return whole - encoder(tokens) + left + guess


# Time


def over_edt(results: dict[str, Any], what: str, size: str, names: Sequence[str], timings: Timings) -> None:
    """Fill in the ratios to EDT of a size, with their quartiles."""
    for name in names:
        if name != "edt":
            figure = f"{what}_{name}_{size}_over_edt_{size}".lower()
            results[figure], *results["spread"][figure] = timings.ratio(name, "edt")


def time_forward(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in the time of a forward pass; the one whose forms are watched warms up."""
    if "forward" not in arguments.parts:
        return
    dtype = DTYPES[arguments.dtype]
    for size in arguments.sizes:
        calls: dict[str, Callable[[], Tensor]] = {}
        for network in NETWORKS:
            model = build_network(network, size, arguments.pixels)
            calls[network] = pass_of(model, arguments.batch, dtype, device)
            with watching_forms() as forms:
                out = calls[network]()
            refuse_degenerate(f"{network} {size}", out)
            results["forms"][f"forward {network} {size}"] = dict(forms)
            if arguments.compile:
                model.compile_repeated_blocks(fullgraph=True)
        timings = in_turn(calls, arguments.repeats, int(arguments.compile), device, clock_of(arguments))
        over_edt(results, "forward", size, list(calls), timings)
        for network in calls:
            median, low, high = timings.of(network)
            results["seconds"][f"forward {network} {size}"] = {
                "an image": median / arguments.batch,
                "quartiles": [low / arguments.batch, high / arguments.batch],
            }


def time_training(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in the time of a training step, and of the passes in it; the first, whose forms are watched, warms up."""
    if "train" not in arguments.parts:
        return
    dtype = DTYPES[arguments.dtype]
    for size in arguments.sizes:
        steps = steps_of(size, arguments.pixels, arguments.train_batch, dtype, device)
        for recipe, step in steps.items():
            step.clock = clock_of(arguments)
            with watching_forms() as forms:
                step()
            results["forms"][f"train {recipe} {size}"] = dict(forms)
            if arguments.compile and recipe != "edt_star":  # whose network is that of edt
                step.trained.model.compile_repeated_blocks(fullgraph=True)
        timings = in_turn(steps, arguments.train_repeats, int(arguments.compile), device, clock_of(arguments))
        for recipe, step in steps.items():
            refuse_degenerate(f"loss of {recipe} {size}", step.loss)
        over_edt(results, "train", size, list(steps), timings)
        passes = without_updates(timings, {name: step.updates(timings.rounds) for name, step in steps.items()})
        for recipe in steps:
            median, low, high = timings.of(recipe)
            batch = arguments.train_batch
            results["seconds"][f"train {recipe} {size}"] = {
                "an image": median / batch,
                "quartiles": [low / batch, high / batch],
                "share of the update": 1 - passes.of(recipe)[0] / median,
            }
            if recipe != "edt":
                figure = f"train_{recipe}_{size}_over_edt_{size}_passes".lower()
                results[figure], *results["spread"][figure] = passes.ratio(recipe, "edt")
        del steps


def steps_of(
    size: str,
    pixels: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    recipes: Sequence[str] = tuple(RECIPES),
    build: Callable[[str, str, int], Any] = build_network,
) -> dict[str, Step]:
    """The steps of recipes; those of one network share its weights, optimizer state and average."""
    trained: dict[str, Trained] = {}
    steps = {}
    for recipe in recipes:
        network = RECIPES[recipe][0]
        if network not in trained:
            trained[network] = Trained(build(network, size, pixels), device)
        steps[recipe] = Step(recipe, size, pixels, batch, dtype, trained[network])
    return steps


def without_updates(timings: Timings, updates: Mapping[str, Sequence[float]]) -> Timings:
    """Timings of steps less what optimizer and average took in each."""
    return Timings({
        name: [whole - update for whole, update in zip(seconds, updates[name], strict=True)]
        for name, seconds in timings.seconds.items()
    })  # fmt: skip


# Memory


def measure_memory(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in the peaks of passes and steps, each in a fresh process on a CPU."""
    if "memory" not in arguments.parts:
        return
    results["memory"] = {}
    for size in arguments.sizes:
        for what, timed in (("forward", NETWORKS), ("train", RECIPES)):
            for name in timed:
                wanted = {"what": what, "name": name, "size": size, "pixels": arguments.pixels}
                wanted |= {"batch": arguments.batch if what == "forward" else arguments.train_batch}
                wanted |= {"dtype": arguments.dtype, "device": arguments.device}
                alone = memory_of(**wanted) if device.type == "cuda" else in_fresh_process(wanted, arguments)
                results["memory"][f"{what} {name} {size}"] = alone


def in_fresh_process(wanted: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(arguments.threads)]
    # Blocks of freed memory that glibc keeps would hide what a pass takes.
    given_back = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    ran = subprocess.run(
        [*command, "--child", json.dumps(wanted)],
        env=os.environ | given_back, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def memory_of(what: str, name: str, size: str, pixels: int, batch: int, dtype: str, device: str) -> dict[str, float]:
    """MiB of a second pass or step: the peak beyond what stands, and what stands."""
    where, kind = torch.device(device), DTYPES[dtype]
    loads_libraries = build_network("edt", "tiny", 128)
    pass_of(loads_libraries, 1, kind, where)()
    if what == "forward":
        model = build_network(name, size, pixels)
        call: Callable[[], Any] = pass_of(model, batch, kind, where)
        before = reset_peak(where)  # position biases that are kept are of the passes
        call()
        standing = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
    else:
        (call,) = steps_of(size, pixels, batch, kind, where, [name]).values()
        call()  # makes the optimizer's state
        before, standing = reset_peak(where), call.trained.standing_bytes()
    call()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    peak = peak_memory(where)
    assert peak is not None
    return {"peak_mib": (peak - before) / 2**20, "standing_mib": standing / 2**20}


# What it says


def discussion(results: Mapping[str, Any]) -> list[str]:
    """The paper's ratios beside those measured and counted here, in sentences that hold for these figures."""
    lines = []
    for what, done in (("forward", "a forward pass"), ("train", "a training step")):
        for size, published in PAPER[what].items():
            figure = f"{what}_mdtv2_{size}_over_edt_{size}".lower()
            work = results.get("work_ratios", {}).get(figure.replace("train", "step"))
            told = [f"{size}, {done}, MDTv2 over EDT: paper {published:g}"]
            if work is not None:
                told.append(f"multiply-adds {work:.2f}")
            if figure in results:
                told.append(f"time here {results[figure]:.2f}")
                if f"{figure}_passes" in results:
                    told.append(f"without the update {results[f'{figure}_passes']:.2f}")
                told.append(f"paper over here {published / results[figure]:.2f}")
            if len(told) > 1:
                lines.append(", ".join(told))
    work = {size: results.get("work_ratios", {}).get(f"step_mdtv2_{size}_over_edt_{size}".lower()) for size in COUNTED}
    if all(work.values()):
        paper = PAPER["train"]
        lines.append(
            f"From S to XL the paper's training ratio falls by a factor of {paper['S'] / paper['XL']:.2f}, that of the "
            f"multiply-adds of a step by {work['S'] / work['XL']:.2f}: most of the paper's is not the work of the two "
            "recipes. EDT's masked pass computes every token; MDTv2's leaves 0.3 to 0.5 of them out of its encoder and "
            "computes one block more."
        )
        lines.append(
            "Known of the difference: there two implementations were compared on GPUs, here the two networks are on "
            "one code with one optimizer. Not known, and in the paper's numbers in unknown shares: precision, batch "
            "and data loading of each side, the kernels of each, and whether MDTv2's step had its masked pass."
        )
    return lines


if __name__ == "__main__":
    main()
