"""The layout of a staged network: which sizes, depths and widths fit together."""

from collections.abc import Sequence

Grid = tuple[int, int]


def check_layout(
    sample_size: int | Sequence[int],
    patch_size: int,
    in_channels: int,
    num_classes: int | None,
    depths: Sequence[int],
    dims: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
) -> list[Grid]:
    """Validate the arguments of the model and return the token grid of each stage."""
    size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"sample_size={sample_size!r}: expected a positive integer or (height, width)")
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size={patch_size!r}: expected a positive integer")
    if not isinstance(in_channels, int) or in_channels < 1:
        raise ValueError(f"in_channels={in_channels!r}: expected a positive integer")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise ValueError(
            f"num_classes={num_classes!r}: expected a positive integer, or None for an unconditional model"
        )
    if not len(depths) == len(dims) == len(num_heads) or len(depths) % 2 == 0:
        raise ValueError(
            f"depths, dims and num_heads have {len(depths)}, {len(dims)} and {len(num_heads)} entries: expected the "
            "same odd number of stages (five in the paper)"
        )
    for stage, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
        if depth < 1 or heads < 1 or dim % 4 or dim % heads:
            raise ValueError(
                f"stage {stage} has depth {depth}, width {dim}, {heads} heads: expected at least one block and a width "
                "that 4 and the number of heads divide"
            )
    if int(min(dims) * mlp_ratio) < 1:
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
