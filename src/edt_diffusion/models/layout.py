"""The layout of a staged network: which sizes, depths and widths fit together."""

from collections.abc import Sequence
from typing import Any

from ..util.errors import UserError

Grid = tuple[int, int]


def check_layout(
    sample_size: int | Sequence[int],
    patch_size: int,
    in_channels: int,
    num_classes: int | None,
    learn_sigma: bool,
    depths: Sequence[int],
    dims: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
) -> list[Grid]:
    """Validate the arguments of the model and return the token grid of each stage."""
    size: list[Any] = list(sample_size) if isinstance(sample_size, list | tuple) else [sample_size] * 2
    if len(size) != 2 or not all(_positive(n) for n in size):
        raise ValueError(f"sample_size={sample_size!r}: expected a positive integer or (height, width)")
    for name, value in (("patch_size", patch_size), ("in_channels", in_channels)):
        if not _positive(value):
            raise ValueError(f"{name}={value!r}: expected a positive integer")
    if num_classes is not None and not _positive(num_classes):
        raise ValueError(
            f"num_classes={num_classes!r}: expected a positive integer, or None for an unconditional model"
        )
    if not isinstance(learn_sigma, bool):
        raise ValueError(f"learn_sigma={learn_sigma!r}: expected true or false")
    for name, value in (("depths", depths), ("dims", dims), ("num_heads", num_heads)):
        if not isinstance(value, list | tuple) or not all(_positive(n) for n in value):
            raise ValueError(f"{name}={value!r}: expected one positive integer per stage, such as [2, 2, 2, 3, 3]")
    if not len(depths) == len(dims) == len(num_heads) or len(depths) % 2 == 0:
        raise ValueError(
            f"depths, dims and num_heads have {len(depths)}, {len(dims)} and {len(num_heads)} entries: expected the "
            "same odd number of stages (five in the paper)"
        )
    for stage, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
        if dim % 4 or dim % heads:
            raise ValueError(
                f"stage {stage} has depth {depth}, width {dim}, {heads} heads: expected a width that 4 and the number "
                "of heads divide"
            )
    if isinstance(mlp_ratio, bool | str) or int(min(dims) * mlp_ratio) < 1:
        raise ValueError(
            f"mlp_ratio={mlp_ratio!r}: expected a positive number, hidden over outer width (4 in the paper)"
        )
    downs = len(depths) // 2
    multiple = patch_size * 2**downs
    if any(n % multiple for n in size):
        nearest = " x ".join(str(max(multiple, round(n / multiple) * multiple)) for n in size)
        raise ValueError(
            f"sample_size={sample_size!r} cannot be divided by {multiple} (patch size {patch_size} times 2 for each of "
            f"{downs} down-samplings): use {nearest}"
        )
    first = (size[0] // patch_size, size[1] // patch_size)
    levels = [*range(downs + 1), *range(downs - 1, -1, -1)]
    return [(first[0] >> level, first[1] >> level) for level in levels]


def one_stage(**arguments: int) -> tuple[list[int], list[int], list[int]]:
    """Depths, widths and heads, as `check_layout` takes them, of a network on one grid: (depth, width, heads) by name.

    Raises:
        ValueError: for what is no positive integer.
    """
    for name, value in arguments.items():
        if not _positive(value):
            raise ValueError(f"{name}={value!r}: expected a positive integer")
    depth, width, heads = arguments.values()
    if width % 4 or width % heads:
        name, _, by = list(arguments)[1], None, list(arguments)[2]
        raise ValueError(f"{name}={width}, {by}={heads}: expected a width that 4 and the number of heads divide")
    return [depth], [width], [heads]


def check_stages(stages: Sequence[int] | bool | None, count: int) -> tuple[int, ...]:
    """The stage numbers meant, ascending and each once; True means all of `count`, None and False none.

    Raises:
        UserError: for what is not a stage number of 0 ... count - 1.
    """
    if stages is None or isinstance(stages, bool):
        return tuple(range(count)) if stages else ()
    if isinstance(stages, str | int) or not all(type(stage) is int and 0 <= stage < count for stage in stages):
        raise UserError(f"stages {stages!r}: expected a list of numbers from 0 to {count - 1}, or true for all")
    return tuple(sorted(set(stages)))


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
