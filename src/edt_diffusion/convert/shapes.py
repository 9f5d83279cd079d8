"""What the shapes of the authors' tensors tell of a model, alike in all families."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def count_blocks(state: Mapping[str, Tensor], prefix: str, family: str) -> int:
    """How many blocks `prefix.0`, `prefix.1`, ... there are.

    Raises:
        ValueError: if there is none.
    """
    count = 0
    while f"{prefix}.{count}.attn.qkv.weight" in state:
        count += 1
    if not count:
        raise ValueError(f"entry '{prefix}.0.attn.qkv.weight' is missing: this is not {an(family)} checkpoint")
    return count


def entry_config(
    state: Mapping[str, Tensor], family: str, sample_size: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """Size of the input, patches, channels, classes and outputs.

    Args:
        state: their state dict.
        family: its name, for messages.
        sample_size: needed for rectangles only; without it the grid is taken to be square.

    Raises:
        ValueError: if a tensor that must be there is not, or shapes contradict each other or `sample_size`.
    """
    try:
        patch = state["x_embedder.proj.weight"]
        tokens = state["pos_embed"].shape[1]
        outputs = state["final_layer.linear.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"entry {error} is missing: this is not {an(family)} checkpoint") from None
    if patch.ndim != 4:
        raise ValueError(f"x_embedder.proj.weight has shape {tuple(patch.shape)}: this is not {an(family)} checkpoint")
    patch_size, in_channels = patch.shape[2], patch.shape[1]
    if sample_size is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"{tokens} tokens are not a square grid: give sample_size=(height, width)")
        sample_size = side * patch_size
    sample_size = sample_size if isinstance(sample_size, int) else tuple(sample_size)
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    wanted = (height // patch_size) * (width // patch_size)
    if wanted != tokens:
        raise ValueError(
            f"sample_size={sample_size!r} makes {wanted} tokens, the state dict has positions for {tokens}"
        )
    labels = state.get("y_embedder.embedding_table.weight")
    return {
        "sample_size": sample_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_classes": None if labels is None else labels.shape[0] - 1,
        "learn_sigma": outputs == 2 * patch_size**2 * in_channels,
    }


def mlp_ratio(sizes: Sequence[tuple[int, int]]) -> float:
    """The smallest ratio with `int(width * ratio) == hidden` for all pairs (width, hidden), if there is one."""
    ratio = max(hidden / width for width, hidden in sizes)
    # The rounded quotient may miss its own hidden width by one.
    return ratio if all(int(width * ratio) >= hidden for width, hidden in sizes) else math.nextafter(ratio, math.inf)


def heads_of_width(sizes: Mapping[str, Mapping[str, Any]], width: int) -> int:
    """Heads of the published size of that width.

    Raises:
        ValueError: if there is none.
    """
    for size in sizes.values():
        if size["hidden_size"] == width:
            return size["num_heads"]
    raise ValueError(f"no published size has width {width}, and the number of heads is in no tensor: give num_heads")


def with_given(config: Mapping[str, Any], inferred: Mapping[str, Any], widths: Sequence[int] = ()) -> dict[str, Any]:
    """Given arguments and inferred ones together.

    Args:
        config: given.
        inferred: told by the file.
        widths: of the model, to which an MLP ratio that was given may differ in what it rounds to.

    Raises:
        ValueError: if one that is given contradicts the file.
    """
    told = dict(inferred)
    for name, value in inferred.items():
        given = config.get(name, value)
        dims = widths or (inferred.get("hidden_size", 1),)
        if name == "mlp_ratio" and all(int(dim * given) == int(dim * value) for dim in dims):
            told[name] = given  # several ratios make the same widths
        elif (tuple(given) if isinstance(given, list | tuple) else given) != value:
            raise ValueError(f"{name}={given!r} was given, but the state dict says {value!r}")
    return {**config, **told}


def an(family: str) -> str:
    """The name of a family with its article."""
    return f"{'an' if family[0] in 'EM' else 'a'} {family}"
