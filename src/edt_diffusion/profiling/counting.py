"""Multiply-adds that a network really did, counted as `models.flops` counts: matrix products and convolutions only.

Counted where they are done, so that what a feature cache left out is not in it.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .parts import owner, parts_of


class WorkCounter:
    """What was done while it was on.

    Attributes:
        calls: of the network.
        rows: images that these calls were of; a guided pass has two for each picture.
        work: multiply-adds by name of the part, all rows together; "" for what is in no part.
        by_block: multiply-adds of each call by number of the block.
    """

    def __init__(self) -> None:
        self.calls = self.rows = 0
        self.work: Counter[str] = Counter()
        self.by_block: list[Counter[int]] = []

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return sum(self.work.values())


@contextlib.contextmanager
def counting(network: nn.Module, inside: bool = True) -> Iterator[WorkCounter]:
    """Count the calls of a network and what they do; without `inside` the calls only, as for a compiled network."""
    counter, parts = WorkCounter(), parts_of(network)

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counter.calls += 1
        counter.rows += (args[0] if args else kwargs["hidden_states"]).shape[0]
        counter.by_block.append(Counter())

    handles = [network.register_forward_pre_hook(called, with_kwargs=True)]
    for name, module in network.named_modules() if inside else ():
        attention = _attention_of(network, name)
        part = owner(name, parts) or ""
        block = int(part.split(".")[1]) if part.startswith("blocks.") else None
        if isinstance(module, nn.Linear | nn.Conv2d):

            def did(
                module: nn.Module, args: Any, out: torch.Tensor, part: str = part, block: int | None = block,
                attends: bool = attention,
            ) -> None:  # fmt: skip
                work = out.numel() * _products(module)
                if attends:
                    rows, tokens, channels = args[0].shape
                    work += 2 * rows * tokens**2 * channels  # scores and their products with the values
                counter.work[part] += work
                if block is not None and counter.by_block:
                    counter.by_block[-1][block] += work

            handles.append(module.register_forward_hook(did))
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()


def _products(module: Any) -> int:
    """Multiply-adds of each number of the output of a linear layer or a convolution."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.in_channels // module.groups * math.prod(module.kernel_size)


def _attention_of(network: nn.Module, name: str) -> bool:
    """Whether a module is the last projection of self-attention, which computes only if the attention does."""
    parent, _, last = name.rpartition(".to_out.")
    return last == "0" and hasattr(network.get_submodule(parent), "heads")
