"""Memory of a network: what stays, and what a forward pass takes beyond it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..pipelines.precision import weight_bytes


@dataclass(frozen=True)
class MemoryProfile:
    """In bytes.

    Attributes:
        weights: parameters and buffers as they are stored.
        kept: tensors that modules keep between passes, such as gathered position biases.
        forward: the most that tensors made during a forward pass take together; scratch space inside of the
            matrix libraries is not in it.
    """

    weights: int
    kept: int
    forward: int


@torch.no_grad()
def profile_memory(network: Any, inputs: dict[str, Any]) -> MemoryProfile:
    """Measure a forward pass; the network must have made one with such inputs before."""
    if network.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(network.device)
        before = torch.cuda.memory_allocated(network.device)
        network(**inputs)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(network.device) - before
    else:
        peak = _peak_of_allocations(network, inputs)
    return MemoryProfile(weight_bytes(network), kept_bytes(network), peak)


def kept_bytes(network: nn.Module) -> int:
    """Bytes of tensors that are neither parameters nor buffers and stay from pass to pass."""
    kept = {
        id(value): value.numel() * value.element_size()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor)
    }
    return sum(kept.values())


def _peak_of_allocations(network: Any, inputs: dict[str, Any]) -> int:
    """The highest sum of what torch's allocator gave and took back, from its own record.

    Not the growth of the process: memory that earlier passes have left to the process would hide all of it.
    """
    from torch.profiler import ProfilerActivity, profile

    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        network(**inputs)
    results: Any = record.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = sorted((each.start_ns(), each.nbytes()) for each in results.events() if each.name() == "[memory]")
    held = peak = 0
    for _, given in events:
        held += given
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hold back what torch's profiler writes to the process's stderr when it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
