"""Training steps and forward passes of several networks timed side by side on this machine."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...assemble.budget import estimate
from ...assemble.model import build_model
from ...config import RunConfig, parse_config, settled
from ...objectives.config import build_objective
from ...profiling.side_by_side import in_turn
from .page import Interval

# Rounds of a comparison, and of one that is timed alone.
ROUNDS, FEW_ROUNDS = 7, 3
# Pictures of a step at once where a published size is timed.
_CPU_BATCH, _GPU_BATCH = 4, 32


def device_for(name: str | None) -> torch.device:
    """The device named, or the GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


class Contender:
    """A network with all that a training step needs, on random inputs.

    Args:
        config: its settings; of `model` all that pictures decide is said.
        batch: pictures of a step and of a forward pass.
        device: where it computes.
    """

    def __init__(self, config: RunConfig, batch: int, device: torch.device) -> None:
        config = settled(config)
        self.batch, self.device = batch, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.mixed_precision)
        self.network = build_model(config).to(device)
        with torch.no_grad():  # what begins at zero would let a backward pass end early
            for parameter in self.network.parameters():
                if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(std=0.02)
        self.objective = build_objective(config.objective, self.network.config.learn_sigma)
        self.optimizer = config.optimizer.make([p for p in self.network.parameters() if p.requires_grad])
        draws = torch.Generator().manual_seed(0)
        height, width = self.network.grids[0]
        patch, channels = self.network.config.patch_size, self.network.config.in_channels
        self.inputs = torch.randn(batch, channels, height * patch, width * patch, generator=draws).to(device)
        null = self.network.null_label
        self.labels = None if null is None else (torch.arange(batch) % null).to(device)
        self.times = torch.full((batch,), 500, device=device)
        self.made = 0
        local = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": batch})})
        self.memory = float(estimate(local, self.network, device, 1, 1).total)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def step(self) -> None:
        """Forward passes, backward pass, update."""
        self.network.train()
        with self._autocast():
            loss = self.objective(
                self.network, self.inputs, self.labels, seed=0, step=self.made, positions=range(self.batch)
            )
        loss.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.made += 1

    @torch.no_grad()
    def forward(self) -> None:
        """One pass as sampling makes it."""
        self.network.eval()
        with self._autocast():
            self.network(self.inputs, self.times, self.labels)


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        batch: pictures of a step and of a pass.
        training, sampling: by name, how many times as fast as the reference, with quartiles.
        step_seconds, forward_seconds: by name, the median.
        memory: bytes of a training step, estimated, by name.
    """

    batch: int
    training: Mapping[str, Interval]
    sampling: Mapping[str, Interval]
    step_seconds: Mapping[str, float]
    forward_seconds: Mapping[str, float]
    memory: Mapping[str, float]

    def facts(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "batch": self.batch,
            "step_seconds": dict(self.step_seconds),
            "forward_seconds": dict(self.forward_seconds),
            "memory_bytes": dict(self.memory),
            **{
                what: {name: [found.value, found.low, found.high] for name, found in ratios.items()}
                for what, ratios in (("training", self.training), ("sampling", self.sampling))
            },
        }

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> "Speeds":
        """What `facts` gave."""
        training, sampling = (
            {name: Interval(*found) for name, found in facts[what].items()} for what in ("training", "sampling")
        )
        return cls(
            facts["batch"], training, sampling, facts["step_seconds"], facts["forward_seconds"], facts["memory_bytes"]
        )


def compare(
    configs: Mapping[str, RunConfig], reference: str, batch: int, device: torch.device, rounds: int = ROUNDS
) -> Speeds:
    """Time training steps, then forward passes, of all in turn.

    Args:
        configs: by name.
        reference: the name that ratios are to.
        batch: pictures at once, the same for all.
        device: where.
        rounds: of each comparison.
    """
    contenders = {name: Contender(config, batch, device) for name, config in configs.items()}

    def timed(tasks: Mapping[str, Callable[[], object]]) -> tuple[dict[str, Interval], dict[str, float]]:
        timings = in_turn(tasks, rounds, device=device)
        medians = {name: timings.of(name)[0] for name in tasks}
        ratios = {name: Interval(*timings.ratio(reference, name)) for name in tasks if name != reference}
        return ratios | {reference: Interval(1.0)}, medians

    training, step_seconds = timed({name: each.step for name, each in contenders.items()})
    sampling, forward_seconds = timed({name: each.forward for name, each in contenders.items()})
    memory = {name: each.memory for name, each in contenders.items()}
    return Speeds(batch, training, sampling, step_seconds, forward_seconds, memory)


def published_rates(size: str, side: int, device_name: str | None) -> dict[tuple[str, str], float]:
    """Pictures a second in training of EDT, MDTv2 and DiT of a published size on latents of that side."""
    device = device_for(device_name)
    batch = _GPU_BATCH if device.type == "cuda" else _CPU_BATCH
    tasks = {name: contender.step for name, contender in _published(size, side, batch, device)}
    timings = in_turn(tasks, FEW_ROUNDS, device=device)
    return {(name, size): batch / timings.of(name)[0] for name in tasks}


def _published(size: str, side: int, batch: int, device: torch.device) -> Iterator[tuple[str, Contender]]:
    for name in ("EDT", "MDTv2", "DiT"):
        model = {"name": name, "size": size, "sample_size": side}
        config = parse_config({"model": model, "data": {}, "train": {"batch_size": batch}})
        yield name, Contender(config, batch, device)


__all__ = ["Contender", "Speeds", "compare", "device_for", "published_rates"]
