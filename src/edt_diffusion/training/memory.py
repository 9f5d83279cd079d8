"""What a training step needs of memory, before it is made.

Weights, gradients, optimizer and averages are counted; activations are measured, as the sizes of what one forward pass
on tensors without content keeps for the backward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ..util.errors import UserError
from .activations import activation_bytes

_FLOAT32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs for a training step.

    Attributes:
        weights: parameters and buffers.
        gradients: of the trainable parameters.
        optimizer: its state.
        ema: all averages of the weights.
        batch: samples in a micro-batch.
        fixed: activations that do not grow with the batch, such as weights cast to bfloat16.
        per_sample: activations of a sample, over all passes alive at once.
        update: temporaries of the optimizer, of one copy of the trainable weights; they live when activations do not.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    batch: int
    fixed: int
    per_sample: int
    update: int

    @property
    def activations(self) -> int:
        """What a micro-batch keeps for its backward pass."""
        return self.fixed + self.batch * self.per_sample

    @property
    def total(self) -> int:
        """The most that is needed at once."""
        return self.weights + self.gradients + self.optimizer + self.ema + max(self.activations, self.update)

    def at(self, batch: int) -> "MemoryEstimate":
        """The estimate for micro-batches of another size."""
        return replace(self, batch=batch)

    def spread(self, processes: int, whole_gradients: bool = False) -> "MemoryEstimate":
        """The estimate of one of so many processes among which weights and what goes with them are spread (FSDP2).

        Args:
            processes: how many.
            whole_gradients: whether each holds the whole gradient, as it does while micro-batches add up.
        """
        names = ("weights", *(() if whole_gradients else ("gradients",)), "optimizer", "ema", "update")
        return replace(self, **{name: -(-getattr(self, name) // processes) for name in names})

    def lines(self) -> list[str]:
        """For people."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "averages": self.ema,
            f"activations of {self.batch}": self.activations,
            "together": self.total,
        }
        return [f"{name:<20} {readable_bytes(size):>10}" for name, size in parts.items()]


def readable_bytes(size: float) -> str:
    """Bytes as "7.6 GiB" or "12 MiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def estimate_training_memory(
    model: Any,
    *,
    batch: int,
    passes: int,
    joint: bool,
    precision: str = "no",
    optimizer_states: int = 4,
    emas: int = 1,
    masks: bool = True,
    checkpointing: bool | Sequence[int] | None = None,
    device: str | None = None,
) -> MemoryEstimate:
    """Estimate what a training step of one process needs.

    Not in it: the framework itself (0.3 to 1 GiB on a GPU), temporaries of single operations, autocast's copies of the
    weights of checkpointed blocks, copies for the exchange of gradients between processes, an autoencoder.

    The model is left as it is, nothing is computed, and nothing drawn.

    Args:
        model: a bare backbone called `model(hidden_states=, timestep=, class_labels=, token_masks=, return_dict=)`,
            not compiled, wrapped or sharded yet.
        batch: samples in a micro-batch of this process.
        passes: forward passes of a step.
        joint: whether they are one batch of so many times the size; either way one backward pass follows them, and
            the activations of all are alive at once.
        precision: "no", "bf16" or "fp16", the autocast of the forward pass.
        optimizer_states: tensors that the optimizer keeps per parameter: 2 of AdamW, 4 of Adan.
        emas: averages of the weights.
        masks: whether the last pass (all, where they are joint) has token masks in the down-sampling modules.
        checkpointing: gradient checkpointing, everywhere or in the stages listed; None is as the model has it.
        device: type of device to estimate for, whose attention kernels keep what others need not; by default the
            model's own. One that is not there is taken for a CPU, which needs more than a GPU.

    Returns:
        The estimate, which `MemoryEstimate.at` turns into those of other micro-batches.
    """
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    size, number = sum(map(_bytes, trained)), sum(parameter.numel() for parameter in trained)
    kind = device or parameters[0].device.type
    kind = (
        kind if kind == getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu") else "cpu"
    )
    calls = [(passes, masks)] if joint else [(1, masks and index == passes - 1) for index in range(passes)]
    steps = [[(samples * times, masked) for times, masked in calls] for samples in (1, 2)]
    one, two = activation_bytes(model, steps, kind, precision, checkpointing)
    return MemoryEstimate(
        weights=sum(map(_bytes, [*parameters, *model.buffers()])),
        gradients=size,
        optimizer=optimizer_states * size,
        ema=emas * number * _FLOAT32,
        batch=batch,
        fixed=2 * one - two,
        per_sample=two - one,
        update=size,
    )


def fitting_micro_batches(
    estimate: Callable[[int], MemoryEstimate], local_batch: int, available: int, share: float = 0.9
) -> int:
    """The smallest number of equal micro-batches with which a step fits.

    Args:
        estimate: of a micro-batch's size, such as `MemoryEstimate.at`.
        local_batch: samples of a step in one process.
        available: bytes, see `available_memory`.
        share: of it that may be used; the rest is for what the estimate leaves out.

    Raises:
        UserError: if not even micro-batches of one sample fit.
    """
    room = share * available
    for count in range(1, local_batch + 1):
        if local_batch % count == 0 and estimate(local_batch // count).total <= room:
            return count
    least = estimate(1)
    raise UserError(
        f"a training step with one sample at a time needs {readable_bytes(least.total)}, {readable_bytes(room)} are "
        f"there to be used (activations {readable_bytes(least.activations)}): try train.gradient_checkpointing=true, "
        "train.mixed_precision=bf16, fewer ema.power, optimizer.name=adamw or a smaller model"
    )


def available_memory(device: torch.device | str, cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still have: on a GPU what is free there, else what the machine and its container
    leave.

    Args:
        device: where the training will run.
        cgroups: where Linux shows a container's limits.
    """  # fmt: skip
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([psutil.virtual_memory().available, *_container_limits(cgroups)])


def _container_limits(root: Path) -> list[int]:
    """What the control groups from this process's own up to the root have left; page cache that can go is left."""
    out = []
    try:
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        own = []
    for base, paths, limit, usage, cache in (
        (root, [path for number, _, path in own if number == "0"], "memory.max", "memory.current", "inactive_file"),
        (root / "memory", [path for _, kinds, path in own if "memory" in kinds.split(",")],
         "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):  # fmt: skip
        groups = {base}
        for path in paths:
            below = Path(path.lstrip("/"))
            groups |= {base / below, *(base / parent for parent in below.parents)}
        for group in groups:
            try:
                most, used = int((group / limit).read_text()), int((group / usage).read_text())
                told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                out.append(max(most - used + int(told.get(cache, 0)), 0))
            except (OSError, ValueError):  # no such group, no such file, or "max": no limit
                continue
    return out


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
