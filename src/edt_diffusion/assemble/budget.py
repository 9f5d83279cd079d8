"""What a run will take: memory before it starts, and how its batch is cut to fit."""

import os
from typing import Any

import torch
from accelerate import Accelerator

from ..config import RunConfig
from ..data.loader import StepBatchSampler
from ..data.order import GlobalShuffle
from ..training.memory import MemoryEstimate, available_memory, estimate_training_memory, fitting_micro_batches

_OPTIMIZER_STATES = {"adan": 4, "adamw": 2}


def joint_passes(config: RunConfig, device: torch.device) -> bool:
    """Whether the full and the masked pass run as one doubled batch: see `MaskedTraining`.

    One large batch keeps a GPU busier and exchanges a sharded network's weights once. On a CPU the two are equally fast
    within a few per cent (benchmarks/training_step.py), and two passes are what the paper describes.
    """
    if config.train.joint_passes is not None:
        return config.train.joint_passes
    return device.type != "cpu" or config.train.sharding != "none"


def estimate(config: RunConfig, model: Any, device: torch.device, processes: int, micro: int) -> MemoryEstimate:
    """Memory of one of the processes that train `model` with `micro` micro-batches.

    Sharded gradients stay whole until the last micro-batch, after which they are exchanged (`Parallel.exchange`).
    """
    local = config.train.batch_size // processes
    whole = estimate_training_memory(
        model,
        batch=-(-local // micro),
        passes=len((config.objective.passes or "full+masked").split("+")),
        joint=joint_passes(config, device),
        precision=config.train.mixed_precision,
        optimizer_states=_OPTIMIZER_STATES[config.optimizer.name],
        emas=1 + len(config.ema.power),
        masks=config.objective.passes != "full",
        checkpointing=config.train.gradient_checkpointing,
        device=device.type,
    )
    return whole if config.train.sharding == "none" else whole.spread(processes, whole_gradients=micro > 1)


def free_memory(device: torch.device) -> int:
    """Bytes for this process: processes of one machine share what a CPU has."""
    sharers = 1 if device.type != "cpu" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return available_memory(device) // sharers


def fitted(config: RunConfig, model: Any, accelerator: Accelerator) -> RunConfig:
    """The settings with as few micro-batches as fit into the memory that is free (`--batch auto`).

    The global batch, and with it what is learned, stays.

    Raises:
        UserError: the batch cannot be split evenly over the processes, or not even one sample at a time fits.
    """
    device, processes = accelerator.device, accelerator.num_processes
    _refuse_uneven(config.train.batch_size, processes, 1)
    local = config.train.batch_size // processes
    uncut = estimate(config, model, device, processes, 1)
    cut = uncut if config.train.sharding == "none" else estimate(config, model, device, processes, local)
    micro = fitting_micro_batches(lambda size: (uncut if size == local else cut).at(size), local, free_memory(device))
    # All processes must cut their share alike, and the fullest device decides.
    found = torch.as_tensor(accelerator.gather(torch.tensor([micro], device=device)))
    train = config.train.model_copy(update={"micro_batches": int(found.max())})
    return config.model_copy(update={"train": train})


def memory_lines(config: RunConfig, model: Any, device: torch.device, processes: int) -> list[str]:
    """What the run will take in each process, for people, and a warning if that is more than there is.

    Raises:
        UserError: the batch cannot be split evenly over processes and micro-batches.
    """
    _refuse_uneven(config.train.batch_size, processes, config.train.micro_batches)
    needed = estimate(config, model, device, processes, config.train.micro_batches)
    free = free_memory(device)
    lines = [f"memory: about {needed.total / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"]
    if needed.total > free:
        remedy = "try --batch auto, train.gradient_checkpointing=true or train.mixed_precision=bf16"
        lines += [*needed.lines(), f"this may not fit: {remedy}"]
    return lines


def _refuse_uneven(batch: int, processes: int, micro: int) -> None:
    """Raise what the loader will, before anything is told of a share that nobody can have."""
    StepBatchSampler(GlobalShuffle(1, 0), global_batch=batch, world_size=processes, micro_batches=micro)
