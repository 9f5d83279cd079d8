"""EDT weights in the authors' names (github.com/xinwangChen/EDT) to and from `EDTTransformer2DModel`.

Their blocks are numbered flat with down, up and concat modules in lists of their own; ours stand in one list in
execution order. Everything that tensor shapes tell is inferred from the file, the depths included: the released XL
layout and the published XL size differ, so a name cannot be trusted.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from ..models.edt import EDTTransformer2DModel
from .keymap import Entry, pair, to_ours, to_theirs

logger = logging.getLogger(__name__)

# The authors' EMA, applied to frozen tables in fp32, drifts them by up to 1.65e-4.
_TABLE_DRIFT_WARNING = 1e-6
_TABLE_DRIFT_ERROR = 1e-2


def key_map(depths: Sequence[int], conditional: bool = True) -> list[Entry]:
    """Entries of an EDT model with these depths."""
    weight_bias = (".weight", ".bias")
    entries = [
        *pair("pos_embed", "pos_embed", ""),
        *pair("x_embedder.proj", "patch_embed.proj", *weight_bias),
        *pair("t_embedder.mlp.0", "timestep_embedder.linear_1", *weight_bias),
        *pair("t_embedder.mlp.2", "timestep_embedder.linear_2", *weight_bias),
        *pair("final_layer.linear", "proj_out", *weight_bias),
        *pair("final_layer.adaLN_modulation.1", "norm_out.modulation.linear", *weight_bias),
    ]
    if conditional:
        entries += pair("y_embedder.embedding_table", "class_embedder", ".weight")
    position, flat, downs = 0, 0, len(depths) // 2
    for stage, depth in enumerate(depths):
        if stage > downs:
            ours, up = f"blocks.{position}", stage - downs - 1
            entries += pair(f"up_blocks.{up}.expand", f"{ours}.expand", ".weight")
            entries += pair(f"concat_blocks.{up}.pos_embed", f"{ours}.pos_embed", "")
            entries += pair(f"concat_blocks.{up}.adaLN_modulation.1", f"{ours}.norm.modulation.linear", *weight_bias)
            entries += pair(f"concat_blocks.{up}.cat", f"{ours}.fuse", *weight_bias)
            position += 1
        for _ in range(depth):
            theirs, ours = f"blocks.{flat}", f"blocks.{position}"
            table = f"{theirs}.attn.rel_pos_bias.relative_position_bias_table"
            entries.append(Entry(table, (f"{ours}.attn.position_bias.table",)))
            for suffix in weight_bias:
                names = tuple(f"{ours}.attn.to_{part}{suffix}" for part in "qkv")
                entries.append(Entry(f"{theirs}.attn.qkv{suffix}", names))
            entries += pair(f"{theirs}.attn.proj", f"{ours}.attn.to_out.0", *weight_bias)
            entries += pair(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj", *weight_bias)
            entries += pair(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2", *weight_bias)
            entries += pair(f"{theirs}.adaLN_modulation.1", f"{ours}.adaln.linear", *weight_bias)
            position, flat = position + 1, flat + 1
        if stage < downs:
            theirs, ours = f"down_blocks.{stage}", f"blocks.{position}"
            entries += pair(f"{theirs}.pos_embed", f"{ours}.pos_embed", "")
            entries += pair(f"{theirs}.adaLN_modulation.1", f"{ours}.norm.modulation.linear", *weight_bias)
            entries += pair(f"{theirs}.reduction", f"{ours}.reduction", ".weight")
            position += 1
    return entries


def infer_config(state: Mapping[str, Tensor], sample_size: int | Sequence[int] | None = None) -> dict[str, Any]:
    """Constructor arguments told by the shapes of the authors' tensors.

    Args:
        state: their state dict.
        sample_size: needed for rectangles only; without it the grid is taken to be square.

    Raises:
        ValueError: if a tensor that must be there is not, or shapes contradict each other or `sample_size`.
    """
    table_name = "blocks.{}.attn.rel_pos_bias.relative_position_bias_table"
    blocks = []
    while (table := table_name.format(len(blocks))) in state:
        try:
            qkv, mlp = (state[f"blocks.{len(blocks)}.{name}.weight"] for name in ("attn.qkv", "mlp.fc1"))
        except KeyError as error:
            raise ValueError(f"entry {error} is missing: this is not an EDT checkpoint") from None
        blocks.append((qkv.shape[1], state[table].shape[1], state[table].shape[0], mlp.shape[0]))
    if not blocks:
        raise ValueError(f"entry {table_name.format(0)!r} is missing: this is not an EDT checkpoint")
    try:
        patch = state["x_embedder.proj.weight"]
        tokens = state["pos_embed"].shape[1]
        outputs = state["final_layer.linear.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"entry {error} is missing: this is not an EDT checkpoint") from None
    if patch.ndim != 4:
        raise ValueError(f"x_embedder.proj.weight has shape {tuple(patch.shape)}: this is not an EDT checkpoint")
    if not any(name.startswith("down_blocks.") for name in state):
        raise ValueError("no down_blocks in the state dict: this is not an EDT checkpoint")
    # Neighbouring stages of equal width still differ in the size of their bias tables.
    stages = [(width, heads, len(list(run))) for (width, heads, *_), run in groupby(blocks)]
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
        "depths": tuple(depth for _, _, depth in stages),
        "dims": tuple(width for width, _, _ in stages),
        "num_heads": tuple(heads for _, heads, _ in stages),
        "mlp_ratio": _mlp_ratio([(width, hidden) for width, _, _, hidden in blocks]),
    }


def _mlp_ratio(sizes: Sequence[tuple[int, int]]) -> float:
    """The smallest ratio with `int(width * ratio) == hidden` for all pairs (width, hidden), if there is one."""
    ratio = max(hidden / width for width, hidden in sizes)
    # The rounded quotient may miss its own hidden width by one.
    return ratio if all(int(width * ratio) >= hidden for width, hidden in sizes) else math.nextafter(ratio, math.inf)


def from_official(state: Mapping[str, Tensor], **config: Any) -> EDTTransformer2DModel:
    """Build a model from the authors' state dict; see `edt_diffusion.convert.from_official`."""
    inferred = infer_config(state, config.get("sample_size"))
    for name, value in inferred.items():
        given = config.get(name, value)
        if name == "mlp_ratio" and all(int(dim * given) == int(dim * value) for dim in inferred["dims"]):
            inferred[name] = given  # several ratios make the same widths
        elif (tuple(given) if isinstance(given, list | tuple) else given) != value:
            raise ValueError(f"{name}={given!r} was given, but the state dict says {value!r}")
    model = EDTTransformer2DModel(**{**config, **inferred})
    converted = to_ours(key_map(inferred["depths"], inferred["num_classes"] is not None), state)
    computed = model.state_dict()
    wrong = [name for name, tensor in converted.items() if tensor.shape != computed[name].shape]
    if wrong:
        found, built = tuple(converted[wrong[0]].shape), tuple(computed[wrong[0]].shape)
        raise ValueError(
            f"{len(wrong)} tensors do not fit, the first {wrong[0]}: {found} in the file, {built} expected"
        )
    for name, table in converted.items():
        if name.endswith("pos_embed"):
            drift = float((table.float() - computed[name]).abs().max())
            if drift > _TABLE_DRIFT_ERROR:
                raise ValueError(
                    f"position table {name} is {drift:.2g} off its formula: its grid is not that of "
                    f"sample_size={inferred['sample_size']!r} (height and width exchanged?)"
                )
            if drift > _TABLE_DRIFT_WARNING:
                logger.warning("position table %s is %.2e off its formula; the file's values are kept", name, drift)
    model.load_state_dict(converted)
    return model.eval()


def to_official(model: EDTTransformer2DModel) -> dict[str, Tensor]:
    """The model's tensors under the authors' names; see `edt_diffusion.convert.to_official`."""
    return to_theirs(key_map(model.config["depths"], model.class_embedder is not None), model.state_dict())
