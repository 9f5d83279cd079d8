"""Contiguous ranges of blocks that may be skipped: what goes in and out, and which long skips they take."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def stages_of(network: Any) -> list[int]:
    """The stage of each block; a network without stages has one."""
    return list(getattr(network, "block_stages", [0] * len(network.blocks)))


def taken_skips(blocks: Sequence[nn.Module]) -> int:
    """How many long skips of earlier blocks these take off the stack; who skips the blocks must take them off instead.

    -1 where they leave one for later blocks, so that they cannot be skipped.
    """
    inside = taken = 0
    for block in blocks:
        if getattr(block, "pushes", False):
            inside += 1
        elif getattr(block, "pops", False):
            taken += inside == 0
            inside = max(inside - 1, 0)
    return -1 if inside else taken


def closed(network: Any, first: int, last: int) -> bool:
    """Whether blocks `first` to `last` give tokens of the grid and width that they take, and leave no long skip."""
    blocks, stages = list(network.blocks), stages_of(network)
    if not 0 <= first <= last < len(blocks):
        return False
    # A down-sampling ends its stage and an up-sampling begins one.
    enters = stages[first] - getattr(blocks[first], "begins_stage", False)
    leaves = stages[last] + getattr(blocks[last], "ends_stage", False)
    if enters != leaves:
        dims, grids = network.stage_dims, network.grids
        if dims[enters] != dims[leaves] or grids[enters] != grids[leaves]:
            return False
    return taken_skips(blocks[first : last + 1]) >= 0
