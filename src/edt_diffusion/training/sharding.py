"""Tensors that are spread over processes (FSDP2): their local part, the whole, and the way back.

`torch.distributed.fsdp.fully_shard` turns parameters into `DTensor`s cut along their first dimension as `torch.chunk`
cuts, over a mesh of one dimension. Everything here takes ordinary tensors too and leaves them as they are, so that its
callers need not ask.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is spread over processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory; an ordinary tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered; every process of the mesh must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor whole, on the CPU, one after the other; every process must call it."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in state.items()}


def like(full: Tensor, own: Tensor) -> Tensor:
    """A whole tensor cut as `own` is: this process's part of it as a `DTensor`, or the tensor itself.

    Args:
        full: the whole, the same in all processes.
        own: a tensor of the same shape, or an optimizer's number beside one.
    """
    if not isinstance(own, DTensor) or full.shape != own.shape:
        return full
    placement = own.placements[0]
    assert isinstance(placement, Shard)
    assert (placement.dim, len(own.placements)) == (0, 1)
    rank = cast(Any, own.device_mesh).get_local_rank()
    chunks = full.chunk(own.device_mesh.size(), dim=0)
    # Fewer rows than processes leave the last ones with nothing.
    part = chunks[rank] if rank < len(chunks) else full[:0]
    part = part.to(own.to_local().device, copy=True).contiguous()
    return DTensor.from_local(part, own.device_mesh, own.placements, shape=full.shape, stride=full.stride())


@torch.no_grad()
def copy_into(own: Tensor, full: Tensor) -> None:
    """Overwrite `own` by (its part of) a whole tensor."""
    local(own).copy_(local(like(full, own)))
