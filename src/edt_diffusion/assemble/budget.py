"""What a run will take: memory before it starts, and how its batch is cut to fit."""

from typing import Any

import torch

from ..config import RunConfig
from ..training.memory import MemoryEstimate, available_memory, estimate_training_memory, fitting_micro_batches

_OPTIMIZER_STATES = {"adan": 4, "adamw": 2}


def joint_passes(config: RunConfig, device: torch.device) -> bool:
    """Whether the full and the masked pass run as one doubled batch: see `MaskedTraining`.

    One large batch keeps a GPU busier and exchanges a sharded network's weights once; on a CPU two halves stay closer
    to its caches (measured by benchmarks/training_step.py).
    """
    if config.train.joint_passes is not None:
        return config.train.joint_passes
    return device.type != "cpu" or config.train.sharding != "none"


def estimate(config: RunConfig, model: Any, device: torch.device, local_batch: int, micro: int) -> MemoryEstimate:
    """Memory of one process that trains `model` with `micro` micro-batches."""
    return estimate_training_memory(
        model,
        batch=-(-local_batch // micro),
        passes=len(config.objective.passes.split("+")),
        joint=joint_passes(config, device),
        precision=config.train.mixed_precision,
        optimizer_states=_OPTIMIZER_STATES[config.optimizer.name],
        emas=1 + len(config.ema.power),
        masks=config.objective.passes != "full",
        checkpointing=config.train.gradient_checkpointing,
        device=device.type,
    )


def fitted(config: RunConfig, model: Any, device: torch.device, processes: int) -> RunConfig:
    """The settings with as few micro-batches as fit into the memory that is free (`--batch auto`).

    The global batch, and with it what is learned, stays.
    """
    local = config.train.batch_size // processes
    micro = fitting_micro_batches(estimate(config, model, device, local, 1).at, local, available_memory(device))
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batches": micro})})


def memory_lines(config: RunConfig, model: Any, device: torch.device, processes: int) -> list[str]:
    """What the run will take, for people, and a warning if that is more than there is."""
    local = config.train.batch_size // processes
    needed = estimate(config, model, device, local, config.train.micro_batches)
    free = available_memory(device)
    lines = [f"memory: about {needed.total / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"]
    if needed.total > free:
        remedy = "try --batch auto, train.gradient_checkpointing=true or train.mixed_precision=bf16"
        lines += [*needed.lines(), f"this may not fit: {remedy}"]
    return lines
