"""A training step of EDT by this package against a plain one, what the trainer adds, and the memory of a step.

    python benchmarks/training_step.py --json results.json
    python benchmarks/training_step.py --only fp32,bf16 --repeats 20
    python benchmarks/training_step.py --device cuda --only gpu --json results.json

A step is the full and the masked pass, one backward, Adan and one average of the weights. The *plain* step is written
out below: eager float32, explicit attention that gathers its bias anew, two passes, loops over tensors. It has the same
weights and draws; that its loss and gradients are the same is checked in each run, before anything is timed.

Figures (goals in brackets; a missed goal is reported and is no failure):

- fp32_speedup [>= 1.0]      plain step over ours, both float32
- bf16_speedup [>= 1.9]      plain step over ours under bfloat16 autocast (the goal is one for CPUs);
  bf16_loss_error, bf16_gradient_error: its relative errors against float32
- engine_overhead [< 0.03]   a step of the trainer over the bare forward, backward and update, minus one; also
  engine_overhead_bf16
- checkpointing_saves        share of a step's peak memory that gradient checkpointing saves; `memory` has the peaks of
  fresh processes beyond what stands between steps, and beside them what training/memory.py estimates
- joint_speedup_fp32, _bf16  two passes over one doubled batch: above 1 the doubled batch is faster
- gpu                        for S, B and XL: images/s and share of the measured matmul peak, in bfloat16 with compiled
  blocks, and over the plain TF32 step [XL: >= 0.45 and >= 2.5]

Machines are shared and clocks drift: what is compared is timed in turn, and a figure is the median of the ratios of
neighbours; `spread` has their quartiles. By default one thread is used.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from harness import hand_out, judged, make_parser, names, quartiles, reset_peak, save, seconds_of, wait
from machine import machine
from torch import Tensor, nn

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.assemble import build_trainer
from edt_diffusion.assemble.budget import joint_passes
from edt_diffusion.config import RunConfig, parse_config
from edt_diffusion.convert.keymap import to_theirs
from edt_diffusion.convert.official_edt import key_map, to_official
from edt_diffusion.data import ImageDataset
from edt_diffusion.models.edt import SIZES
from edt_diffusion.models.masking import TokenMasks
from edt_diffusion.objectives.config import build_objective, default_masks
from edt_diffusion.objectives.draws import HostDraws, StepDraws
from edt_diffusion.training.adan import Adan
from edt_diffusion.training.ema import EMAConfig, EMASet
from edt_diffusion.training.memory import estimate_training_memory
from edt_diffusion.training.meters import training_flops
from edt_diffusion.util.hardware import measured_matmul_peak, peak_memory

PARTS = ("fp32", "bf16", "overhead", "memory", "passes", "gpu")
GOALS = {
    "fp32_speedup": (">=", 1.0),
    "bf16_speedup": (">=", 1.9),
    "engine_overhead": ("<", 0.03),
    "xl_utilisation": (">=", 0.45),
    "xl_speedup": (">=", 2.5),
}
# For trying the script out.
TINY = {"sample_size": 16, "num_classes": 10, "depths": (1,) * 5, "dims": (16, 24, 32, 24, 16), "num_heads": (2,) * 5}
LR, BETAS, EPS, DECAY = 1e-4, (0.98, 0.92, 0.99), 1e-8, 0.9999
SEED = 0
LOG_EVERY = 10
WINDOW_SECONDS = 1.0  # of the gpu part


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.child is not None:
        print(json.dumps(memory_of_step(**json.loads(arguments.child))))
        return {}
    device = torch.device(arguments.device)
    results: dict[str, Any] = {"machine": machine(device), "size": arguments.size, "batch": arguments.batch}
    results |= {"repeats": arguments.repeats, "spread": {}}
    for part in (compare_steps, trainer_overhead, memory, gpus):
        part(results, arguments, device)
        here = {name: goal for name, goal in GOALS.items() if name != "bf16_speedup" or device.type == "cpu"}
        results["goals"] = judged(results, here)
        save(results, arguments.json)
    hand_out(results, arguments.json)
    return results


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    sizes = ("tiny", *SIZES)
    parser = make_parser(__doc__)
    parser.add_argument("--only", type=names(PARTS), help=f"some of {','.join(PARTS)} (default: all; gpu on CUDA only)")
    parser.add_argument("--size", default="S", choices=sizes)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=12, help="interleaved timings of each kind of step")
    parser.add_argument(
        "--windows", type=int, default=4, help=f"of {LOG_EVERY} trainer steps and {LOG_EVERY} bare ones"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: an accelerator if there is one)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu-sizes", type=names(sizes), default=["S", "B", "XL"])
    parser.add_argument("--largest-batch", type=int, default=256, help="of the search for the batch of the gpu part")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        arguments.device = "cpu" if found is None else found.type
    if arguments.only is None:
        arguments.only = [part for part in PARTS if part != "gpu" or arguments.device.startswith("cuda")]
    return arguments


# The plain step. Names of weights are the authors', whose form of the network this is.


class Attention(nn.Module):
    index: Tensor

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        self.rel_pos_bias = nn.ParameterDict({"relative_position_bias_table": table})
        row, column = np.divmod(np.arange(side * side), side)
        index = (row[:, None] - row + side - 1) * (2 * side - 1) + column[:, None] - column + side - 1
        self.register_buffer("index", torch.from_numpy(index), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = self.rel_pos_bias["relative_position_bias_table"][self.index.view(-1)]
        bias = bias.view(tokens, tokens, self.heads).permute(2, 0, 1).contiguous()
        scores = (q * self.scale) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


def condition(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, out))


def scaled_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def merged(x: Tensor) -> Tensor:
    """Tokens of 2x2 cells side by side: (B, N, C) -> (B, N / 4, 4 C)."""
    batch, tokens, channels = x.shape
    side = math.isqrt(tokens)
    cells = x.view(batch, side // 2, 2, side // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
    return cells.reshape(batch, tokens // 4, 4 * channels)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, side: int, width: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, side)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.adaLN_modulation = condition(width, 6 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(scaled_norm(x, shift1, scale1))
        hidden = F.gelu(self.mlp["fc1"](scaled_norm(x, shift2, scale2)), approximate="tanh")
        return x + gate2.unsqueeze(1) * self.mlp["fc2"](hidden)


class Down(nn.Module):
    pos_embed: Tensor

    def __init__(self, dim: int, out: int, side: int, width: int) -> None:
        super().__init__()
        self.adaLN_modulation = condition(width, 8 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)
        self.register_buffer("pos_embed", torch.empty(1, side * side // 4, out))

    def forward(self, x: Tensor, c: Tensor, keep: Tensor | None) -> Tensor:
        y = scaled_norm(merged(x), *self.adaLN_modulation(c).chunk(2, dim=1))
        if keep is not None:
            y = y * merged(keep.to(x.dtype).unsqueeze(-1).expand(x.shape).contiguous())
        return self.reduction(y) + self.pos_embed


class Up(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 4 * out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        batch, tokens, channels = x.shape
        side = math.isqrt(tokens)
        cells = x.view(batch, side, side, 2, 2, channels // 4).permute(0, 1, 3, 2, 4, 5)
        return cells.reshape(batch, 4 * tokens, channels // 4)


class Concat(nn.Module):
    pos_embed: Tensor

    def __init__(self, dim: int, side: int, width: int) -> None:
        super().__init__()
        self.adaLN_modulation = condition(width, 4 * dim)
        self.cat = nn.Linear(2 * dim, dim)
        self.register_buffer("pos_embed", torch.empty(1, side * side, dim))

    def forward(self, x: Tensor, skip: Tensor, c: Tensor) -> Tensor:
        both = torch.cat([x, skip], dim=-1)
        return self.cat(scaled_norm(both, *self.adaLN_modulation(c).chunk(2, dim=1))) + self.pos_embed


class PlainEDT(nn.Module):
    """The class-conditional network on a square grid, as plainly as it can be written, with the weights of `model`."""

    pos_embed: Tensor

    def __init__(self, model: EDTTransformer2DModel) -> None:
        super().__init__()
        config = model.config
        width, dims, self.depths, self.patch = config.dims[0], config.dims, config.depths, config.patch_size
        sides = [grid[0] for grid in model.grids]
        self.halves = len(dims) // 2
        self.masked_block = min(4, self.depths[0] - 1)
        patches = nn.Conv2d(config.in_channels, width, self.patch, stride=self.patch)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.register_buffer("pos_embed", torch.empty(1, sides[0] ** 2, width))
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, width)})
        self.blocks = nn.ModuleList(
            Block(dim, heads, side, width)
            for dim, heads, side, depth in zip(dims, config.num_heads, sides, self.depths, strict=True)
            for _ in range(depth)
        )
        half = range(self.halves)
        self.down_blocks = nn.ModuleList(Down(dims[d], dims[d + 1], sides[d], width) for d in half)
        ups = range(self.halves + 1, len(dims))
        self.up_blocks = nn.ModuleList(Up(dims[stage - 1], dims[stage]) for stage in ups)
        self.concat_blocks = nn.ModuleList(Concat(dims[stage], sides[stage], width) for stage in ups)
        linear = nn.Linear(dims[-1], self.patch**2 * model.out_channels)
        self.final_layer = nn.ModuleDict({"adaLN_modulation": condition(width, 2 * dims[-1]), "linear": linear})
        self.load_state_dict(to_official(model))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, masks: TokenMasks | None = None) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=x.device) / 128)
        angles = t[:, None].float() * frequencies
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=-1))
        c = c + self.y_embedder["embedding_table"](labels)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        skips, blocks = [], iter(self.blocks)
        for stage, depth in enumerate(self.depths):
            if stage < self.halves:
                skips.append(x)
            if stage > self.halves:
                up = stage - self.halves - 1
                x = self.concat_blocks[up](self.up_blocks[up](x), skips.pop(), c)
            for number in range(depth):
                if stage == 0 and number == self.masked_block and masks is not None and masks.stage0 is not None:
                    keep = masks.stage0.to(x.dtype).unsqueeze(-1)
                    x = x * keep + self.pos_embed * (1 - keep)
                x = next(blocks)(x, c)
            if stage < self.halves:
                x = self.down_blocks[stage](x, c, None if masks is None else masks.down[stage])
        x = scaled_norm(x, *self.final_layer["adaLN_modulation"](c).chunk(2, dim=1))
        x = self.final_layer["linear"](x)
        batch, tokens, _ = x.shape
        side = math.isqrt(tokens)
        x = x.view(batch, side, side, self.patch, self.patch, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, -1, side * self.patch, side * self.patch)


class Diffusion:
    """The paper's loss: min(SNR, 5) / SNR times the error of the noise, plus the variational bound."""

    def __init__(self, device: torch.device) -> None:
        betas = np.linspace(1e-4, 0.02, 1000)
        a = np.cumprod(1 - betas)
        before = np.append(1.0, a[:-1])
        posterior = betas * (1 - before) / (1 - a)
        tables = {
            "signal": np.sqrt(a),
            "noise": np.sqrt(1 - a),
            "x0_of_x": np.sqrt(1 / a),
            "x0_of_noise": np.sqrt(1 / a - 1),
            "of_x0": betas * np.sqrt(before) / (1 - a),
            "of_x": (1 - before) * np.sqrt(1 - betas) / (1 - a),
            "log_max": np.log(betas),
            "log_min": np.log(np.append(posterior[1], posterior[1:])),
            "weight": np.minimum(a / (1 - a), 5) / (a / (1 - a)),
        }
        self.tables = {name: torch.tensor(table, dtype=torch.float32, device=device) for name, table in tables.items()}

    def losses(
        self, net: nn.Module, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor, masks: TokenMasks | None
    ) -> Tensor:
        """Loss of each sample, (B,)."""

        def at(name: str) -> Tensor:
            return self.tables[name][t].view(-1, 1, 1, 1)

        x = at("signal") * x0 + at("noise") * noise
        predicted, v = net(x, t, labels, masks).chunk(2, dim=1)
        mse = ((noise - predicted) ** 2).mean(dim=(1, 2, 3)) * self.tables["weight"][t]
        share = (v + 1) / 2
        log_variance = share * at("log_max") + (1 - share) * at("log_min")
        predicted_x0 = at("x0_of_x") * x - at("x0_of_noise") * predicted.detach()
        mean, true_mean = at("of_x0") * predicted_x0 + at("of_x") * x, at("of_x0") * x0 + at("of_x") * x
        gap = at("log_min") - log_variance
        kl = 0.5 * (gap.exp() - gap - 1 + (true_mean - mean) ** 2 * torch.exp(-log_variance))
        upper, lower = (cdf(torch.exp(-0.5 * log_variance) * (x0 - mean + edge)) for edge in (1 / 255, -1 / 255))
        upper = torch.where(x0 > 0.999, torch.ones_like(x0), upper)
        lower = torch.where(x0 < -0.999, torch.zeros_like(x0), lower)
        nll = -torch.log((upper - lower).clamp(min=1e-12))
        vb = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).mean(dim=(1, 2, 3)) / math.log(2)
        return mse + vb


def cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Plain:
    """The plain step and its state."""

    def __init__(self, model: EDTTransformer2DModel, device: torch.device) -> None:
        self.net = PlainEDT(model).to(device).train()
        self.diffusion = Diffusion(device)
        self.average = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.state: dict[str, list[Tensor]] = {}
        self.k = 0

    def loss(self, batch: "Batch") -> Tensor:
        losses = []
        for drawn in batch.draws.passes:
            assert drawn.labels is not None
            each = self.diffusion.losses(self.net, batch.x0, batch.draws.t, drawn.noise, drawn.labels, drawn.masks)
            losses.append((batch.draws.weight * each).mean())
        return losses[0] + losses[1]

    def step(self, batch: "Batch") -> None:
        self.loss(batch).backward()
        self.update()
        for p in self.net.parameters():
            p.grad = None

    @torch.no_grad()
    def update(self) -> None:
        """Adan (arXiv 2208.06677) and the average, tensor by tensor."""
        self.k += 1
        b1, b2, b3 = BETAS
        for name, p in self.net.named_parameters():
            g = p.grad
            assert g is not None
            if name not in self.state:
                self.state[name] = [torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p), g.clone()]
            m, d, v, before = self.state[name]
            difference = g - before
            m.mul_(b1).add_(g, alpha=1 - b1)
            d.mul_(b2).add_(difference, alpha=1 - b2)
            ahead = g + b2 * difference
            v.mul_(b3).addcmul_(ahead, ahead, value=1 - b3)
            denominator = (v.sqrt() / math.sqrt(1 - b3**self.k)).add_(EPS)
            p.addcdiv_(m, denominator, value=-LR / (1 - b1**self.k))
            p.addcdiv_(d, denominator, value=-LR * b2 / (1 - b2**self.k))
            before.copy_(g)
        for name, p in self.net.named_parameters():
            self.average[name].mul_(DECAY).add_(p.data, alpha=1 - DECAY)


# Our step


@dataclass
class Batch:
    """Latents, labels and everything random of one step: as our objective takes it, and as the plain step does."""

    x0: Tensor
    labels: Tensor
    host: HostDraws
    draws: StepDraws
    positions: list[int]
    step: int


def config_of(size: str, batch: int, **train: Any) -> RunConfig:
    model: dict[str, Any] = dict(TINY) if size == "tiny" else {"size": size}
    quiet = {"batch_size": batch, "sample_every": 0, "log_every": LOG_EVERY, "steps": 10**6, "save_every": 10**6}
    return parse_config({"seed": SEED, "model": model, "data": {"size": 32}, "train": {**quiet, **train}})


def build_network(size: str) -> EDTTransformer2DModel:
    """A network as in the midst of training: what starts as zero is not, or most gradients would be."""
    torch.manual_seed(SEED)
    model = EDTTransformer2DModel(**TINY) if size == "tiny" else EDTTransformer2DModel.from_size(size)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.02 if p.ndim < 2 else p[0].numel() ** -0.5)
    return model.train()


class Ours:
    """The step as the trainer makes it, and its state."""

    def __init__(self, size: str, model: EDTTransformer2DModel, device: torch.device) -> None:
        self.model, self.device = model, device
        cast(nn.Module, model).to(device)
        config = config_of(size, 1)
        self.objective = build_objective(objective_of(config), learn_sigma=True)
        self.optimizer = Adan(model.parameters(), lr=LR, betas=BETAS, eps=EPS)
        self.ema = EMASet(model, EMAConfig(decay=DECAY, warmup=False))

    def batches(self, count: int, size: int) -> list[Batch]:
        """Batches of random latents, already on the device."""
        config, made = self.model.config, []
        shape = (config.in_channels, *((config.sample_size,) * 2))
        generator = torch.Generator().manual_seed(SEED)
        for step in range(count):
            x0 = torch.randn(size, *shape, generator=generator)
            labels = torch.randint(config.num_classes, (size,), generator=generator)
            host = self.objective.host_draws(SEED, step, range(size), shape, self.model.mask_grids, True)
            draws = self.objective.finish(host, labels, self.model.null_label).to(self.device)
            if self.device.type == "cuda":
                host = host.pin_memory()
            made.append(Batch(x0.to(self.device), labels.to(self.device), host, draws, list(range(size)), step))
        return made

    def loss(self, batch: Batch, precision: str, joint: bool) -> Tensor:
        self.objective.joint = joint
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return self.objective(
                self.model, batch.x0, batch.labels, seed=SEED, step=batch.step, positions=batch.positions,
                draws=batch.host,
            ).total  # fmt: skip

    def step(self, batch: Batch, precision: str = "no", joint: bool = False) -> None:
        self.loss(batch, precision, joint).backward()
        self.optimizer.step()
        self.ema.update(self.model)
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, batch: Batch, precision: str, joint: bool) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients, by the authors' names of the weights."""
        loss = self.loss(batch, precision, joint)
        loss.backward()
        # What has no gradient, the position tables, stands in the map too.
        held = {name: torch.zeros_like(value) for name, value in self.model.state_dict().items()}
        held |= {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), to_theirs(key_map(self.model.config.depths), held)


def objective_of(config: RunConfig) -> Any:
    """The objective with the masks published for the size."""
    return config.objective.model_copy(update={"masks": default_masks(config.model)})


# Speed


def relative(difference: dict[str, Tensor], to: dict[str, Tensor]) -> float:
    """Norm of the difference over that of `to`, over all tensors of `to`."""
    norm = math.sqrt(sum(float((difference[name] - value).double().square().sum()) for name, value in to.items()))
    return norm / math.sqrt(sum(float(value.double().square().sum()) for value in to.values()))


def check_equal(plain: Plain, ours: Ours, batch: Batch, joint: bool, strict: bool) -> dict[str, float]:
    """Errors of our loss and gradients against the plain step's, in float32 and bfloat16.

    Args:
        plain, ours: with the same weights.
        batch: what both see.
        joint: how our passes run.
        strict: whether to insist that float32 is equal up to rounding; TF32 is not.
    """
    loss = plain.loss(batch)
    loss.backward()
    gradient = {name: p.grad for name, p in plain.net.named_parameters() if p.grad is not None}
    for p in plain.net.parameters():
        p.grad = None
    errors = {}
    reference = float(loss.detach())
    for name, precision in (("fp32", "no"), ("bf16", "bf16")):
        value, found = ours.gradient(batch, precision, joint)
        errors[f"{name}_loss_error"] = abs(value - reference) / abs(reference)
        errors[f"{name}_gradient_error"] = relative(found, gradient)
    if strict:
        assert errors["fp32_loss_error"] < 1e-4, errors
        assert errors["fp32_gradient_error"] < 1e-3, errors
    return errors


def interleaved(steps: dict[str, Callable[[int], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each kind of step, in turn; the order goes round, so that none always follows the same other."""
    for step in steps.values():
        step(0)
    names, seconds = list(steps), {name: [] for name in steps}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(lambda name=name, repeat=repeat: steps[name](repeat), device))
    return seconds


def compare_steps(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in the speeds of our step against the plain one, and of one doubled batch against two passes."""
    if not {"fp32", "bf16", "passes"} & set(arguments.only):
        return
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as the authors trained
    model = build_network(arguments.size)
    plain, ours = Plain(model, device), Ours(arguments.size, model, device)
    batches = ours.batches(4, arguments.batch)
    joint = joint_passes(config_of(arguments.size, arguments.batch), device)
    results["joint_by_default"] = joint
    results |= check_equal(plain, ours, batches[0], joint, strict=device.type == "cpu")

    def our(precision: str, joint: bool) -> Callable[[int], None]:
        return lambda repeat: ours.step(batches[repeat % len(batches)], precision, joint)

    steps: dict[str, Callable[[int], None]] = {}
    if {"fp32", "bf16"} & set(arguments.only):
        steps["plain"] = lambda repeat: plain.step(batches[repeat % len(batches)])
    for part, precision in (("fp32", "no"), ("bf16", "bf16")):
        if part in arguments.only or "passes" in arguments.only:
            steps[part] = our(precision, joint)
        if "passes" in arguments.only:
            steps[f"{part} {'two' if joint else 'joint'}"] = our(precision, not joint)
    seconds = interleaved(steps, arguments.repeats, device)
    results["step_seconds"] = {name: statistics.median(values) for name, values in seconds.items()}

    def ratio(name: str, over: str, under: str) -> None:
        spread = quartiles([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])
        results[name], results["spread"][name] = spread[1], [spread[0], spread[2]]

    for part in ("fp32", "bf16"):
        if part in arguments.only:
            ratio(f"{part}_speedup", "plain", part)
        if "passes" in arguments.only:
            ratio(f"joint_speedup_{part}", f"{part} two" if joint else part, part if joint else f"{part} joint")


# The trainer


class Latents(ImageDataset):
    """Random latents in memory, in the place of pictures."""

    def __init__(self, shape: tuple[int, int, int], classes: int, rows: int = 256) -> None:
        generator = np.random.default_rng(SEED)
        labels = generator.integers(0, classes, rows)
        super().__init__(
            lambda row: np.zeros((*shape[1:], 3), np.uint8), np.arange(rows), size=shape[1:], channels=3,
            source="random latents", labels=labels, class_names=[str(label) for label in range(classes)],
        )  # fmt: skip
        self._shape = shape
        self._latents = torch.from_numpy(generator.standard_normal((rows, *shape), dtype=np.float32))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int, flip: bool) -> Tensor:
        return self._latents[torch.from_numpy(np.asarray(indices, np.int64))]


class _MeasuredEnough(Exception):
    pass


def trainer_overhead(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in what the trainer adds to a step in float32 and in bfloat16."""
    if "overhead" not in arguments.only:
        return
    for precision, suffix in (("no", ""), ("bf16", "_bf16")):
        told, spread = engine_overhead(arguments.size, arguments.batch, arguments.windows, precision, device)
        results |= {f"{name}{suffix}": value for name, value in told.items()}
        results["spread"][f"engine_overhead{suffix}"] = spread


def engine_overhead(
    size: str, batch: int, windows: int, precision: str, device: torch.device
) -> tuple[dict[str, float], list[float]]:
    """Steps of the real trainer between bare steps on the same objects; and the quartiles over the steps.

    The bare steps run where the trainer asks for its next batch, and are not counted as its own.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # or a second precision would be refused
    precision_of_products = "high" if device.type == "cuda" else "highest"
    config = config_of(size, batch, mixed_precision=precision, matmul_precision=precision_of_products)
    model = EDTTransformer2DModel(**TINY) if size == "tiny" else EDTTransformer2DModel.from_size(size)
    shape = (model.config.in_channels, *((model.config.sample_size,) * 2))
    config = config.model_copy(update={"data": config.data.model_copy(update={"size": shape[1]})})
    data = Latents(shape, model.config.num_classes)
    trained, bare = [], []
    with tempfile.TemporaryDirectory(prefix="edt-training-step-") as folder:
        with patch_environment(accelerate_use_cpu=device.type == "cpu"):
            trainer = build_trainer(config, Path(folder) / "run", data, quiet=True)
        network, objective = trainer.network, trainer.objective
        optimizer = trainer.optimizer.optimizer  # accelerate's wrapper is part of the engine
        make_loader = trainer.make_loader
        # As the trainer's own: what is at hand costs nothing.
        given = next(make_loader(0))
        x0, labels = given["inputs"].to(device), given["class_labels"].to(device)
        draws = objective.finish(given["draws"], labels, network.null_label).to(x0.device)

        def bare_step() -> None:
            with torch.autocast(device.type, enabled=False):  # whatever the trainer has on where it asks for a batch
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                    loss = objective.loss_of(network, x0, draws).total
                torch.clear_autocast_cache()  # inside another autocast the end of one does not
                loss.backward()
                optimizer.step()
                trainer.ema.update(network)
                optimizer.zero_grad(set_to_none=True)

        def stream(start_step: int) -> Iterator[Any]:
            loader, begun = make_loader(start_step), None
            for _ in range(windows * LOG_EVERY + 2):
                wait(device)
                if begun is not None:
                    trained.append(time.perf_counter() - begun)
                bare.append(seconds_of(bare_step, device))
                begun = time.perf_counter()
                yield next(loader)
            raise _MeasuredEnough

        trainer.make_loader = stream
        with contextlib.suppress(_MeasuredEnough):
            trainer.fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    if len(trained) <= windows * LOG_EVERY:
        raise SystemExit("stopped before enough steps of the trainer were timed")
    # The first step makes the optimizer's state and picks kernels. Each other one against the bare ones around it.
    shares = [2 * trained[k] / (bare[k] + bare[k + 1]) - 1 for k in range(1, len(trained))]
    logged = shares[LOG_EVERY - 2 :: LOG_EVERY]
    plain = [share for k, share in enumerate(shares) if k % LOG_EVERY != LOG_EVERY - 2]
    # Of every ten steps one writes a line; medians, for a mean would be one of what else the machine does.
    extra = (statistics.median(logged) - statistics.median(plain)) / LOG_EVERY
    spread = quartiles(plain)
    told = {"engine_overhead": spread[1] + extra, "trainer_step_seconds": statistics.median(trained[1:])}
    return told, [spread[0] + extra, spread[2] + extra]


# Memory


def memory(results: dict[str, Any], arguments: argparse.Namespace, _device: torch.device) -> None:
    """Fill in the peaks of a step without and with gradient checkpointing, each in a fresh process."""
    if "memory" not in arguments.only:
        return
    last = len((TINY if arguments.size == "tiny" else SIZES[arguments.size])["depths"]) - 1
    found = {}
    for name, stages in (("none", False), ("all stages", True), (f"stages 0 and {last}", [0, last])):
        wanted = {"size": arguments.size, "batch": arguments.batch, "checkpointing": stages, "device": arguments.device}
        command = [sys.executable, str(Path(__file__).resolve()), "--threads", str(arguments.threads)]
        # Blocks of freed memory that glibc keeps would hide what a step takes.
        given_back = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
        ran = subprocess.run(
            [*command, "--child", json.dumps(wanted)],
            env=os.environ | given_back, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if ran.returncode:
            raise RuntimeError(f"the process that measures memory failed:\n{ran.stderr}")
        found[name] = json.loads(ran.stdout.splitlines()[-1])
    peaks = [entry["peak_mib"] for entry in found.values()]
    results["memory"] = found
    results["checkpointing_saves"] = 1 - peaks[1] / peaks[0]
    results["checkpointing_saves_two_stages"] = 1 - peaks[2] / peaks[0]


def memory_of_step(size: str, batch: int, checkpointing: bool | list[int], device: str) -> dict[str, float]:
    """MiB that a float32 step takes at most beyond weights, optimizer state and average; measured and estimated."""
    where = torch.device(device)
    ours = Ours(size, build_network(size), where)
    joint = joint_passes(config_of(size, batch), where)
    estimate = estimate_training_memory(
        ours.model, batch=batch, passes=2, joint=joint, checkpointing=checkpointing, device=where.type
    )
    ours.model.set_checkpointed_stages(checkpointing)
    (given,) = ours.batches(1, batch)
    ours.step(given, joint=joint)  # makes the optimizer's state
    gc.collect()
    before = reset_peak(where)
    ours.step(given, joint=joint)
    wait(where)
    peak = peak_memory(where) or math.nan
    return {
        "peak_mib": (peak - before) / 2**20,
        "estimated_mib": (estimate.gradients + max(estimate.activations, estimate.update)) / 2**20,
        "standing_mib": (estimate.weights + estimate.optimizer + estimate.ema) / 2**20,
    }


# GPUs


def gpus(results: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in the use that the sizes make of a GPU."""
    if "gpu" not in arguments.only:
        return
    results["gpu"] = {size: utilisation(size, arguments, device) for size in arguments.gpu_sizes}
    if xl := results["gpu"].get("XL"):
        results |= {"xl_utilisation": xl["utilisation"], "xl_speedup": xl["speedup"]}


def utilisation(size: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Images/s of our compiled bfloat16 step and of the plain TF32 one, each at the batch that fills the memory.

    One after the other, for both would not fit together at the batches they are meant for.
    """
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    release(device)
    peak = measured_matmul_peak(device, torch.bfloat16)
    ours = Ours(size, build_network(size), device)
    multiply_adds = sum(ours.model.multiply_adds().values())

    def our_step(batch: Batch) -> None:
        ours.step(batch, "bf16", joint=True)

    count = fitting_batch(our_step, ours, device, arguments.largest_batch)
    if device.type == "cuda":
        torch.compiler.reset()
        ours.model.compile_repeated_blocks(fullgraph=True)
    ours_rates = rates(our_step, ours.batches(2, count), arguments.repeats, device)
    taken = peak_memory(device)
    plain = Plain(build_network(size), device)
    # Only the draws are made by ours from now on; its weights would take the plain step's room.
    ours.optimizer.state.clear()
    del ours.ema
    cast(nn.Module, ours.model).to("cpu")
    release(device)

    def plain_step(batch: Batch) -> None:
        plain.step(batch)

    plain_count = fitting_batch(plain_step, ours, device, arguments.largest_batch)
    plain_rates = rates(plain_step, ours.batches(2, plain_count), arguments.repeats, device)
    rate, plain_rate = statistics.median(ours_rates), statistics.median(plain_rates)
    return {
        "batch": count,
        "images_per_second": rate,
        "images_per_second_quartiles": quartiles(ours_rates)[::2],
        "utilisation": rate * training_flops(multiply_adds, 1, 2) / peak,
        "matmul_peak_tflops": peak / 1e12,
        "peak_memory_gib": (taken or math.nan) / 2**30,
        "plain_batch": plain_count,
        "plain_images_per_second": plain_rate,
        "plain_images_per_second_quartiles": quartiles(plain_rates)[::2],
        "speedup": rate / plain_rate,
    }


def fitting_batch(step: Callable[[Batch], None], source: Ours, device: torch.device, largest: int) -> int:
    """The largest power of two, up to `largest`, whose step leaves a fifth of the memory free."""
    found = count = 1
    while count <= largest:
        release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            step(source.batches(1, count)[0])
            wait(device)
        except torch.OutOfMemoryError:
            break
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            if torch.cuda.max_memory_reserved(device) > 0.8 * total:
                break
        found, count = count, 2 * count
    release(device)
    return found


def rates(step: Callable[[Batch], None], batches: list[Batch], repeats: int, device: torch.device) -> list[float]:
    """Images/s in windows of about `WINDOW_SECONDS` each, steps queued one behind the other as in a training."""
    for _ in range(2):  # makes the state, compiles
        for batch in batches:
            step(batch)
    count = max(1, round(WINDOW_SECONDS / seconds_of(lambda: step(batches[0]), device)))

    def window() -> None:
        for number in range(count):
            step(batches[number % len(batches)])

    size = len(batches[0].positions)
    return [count * size / seconds_of(window, device) for _ in range(repeats)]


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
