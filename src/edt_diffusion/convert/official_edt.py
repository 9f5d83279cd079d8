"""EDT weights in the authors' names (github.com/xinwangChen/EDT) to and from `EDTTransformer2DModel`.

Their blocks are numbered flat with down, up and concat modules in lists of their own; ours stand in one list in
execution order. Everything that tensor shapes tell is inferred from the file, the depths included: the released XL
layout and the published XL size differ, so a name cannot be trusted.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from ..models.edt import EDTTransformer2DModel
from .keymap import Entry, block_entries, entry_and_exit, load, pair, to_theirs
from .shapes import entry_config, mlp_ratio, with_given


def key_map(depths: Sequence[int], conditional: bool = True) -> list[Entry]:
    """Entries of an EDT model with these depths."""
    weight_bias = (".weight", ".bias")
    entries = entry_and_exit(conditional)
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
            entries += block_entries(f"blocks.{flat}", f"blocks.{position}", biased=True)
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
    config = entry_config(state, "EDT", sample_size)
    if not any(name.startswith("down_blocks.") for name in state):
        raise ValueError("no down_blocks in the state dict: this is not an EDT checkpoint")
    # Neighbouring stages of equal width still differ in the size of their bias tables.
    stages = [(width, heads, len(list(run))) for (width, heads, *_), run in groupby(blocks)]
    return {
        **config,
        "depths": tuple(depth for _, _, depth in stages),
        "dims": tuple(width for width, _, _ in stages),
        "num_heads": tuple(heads for _, heads, _ in stages),
        "mlp_ratio": mlp_ratio([(width, hidden) for width, _, _, hidden in blocks]),
    }


def from_official(state: Mapping[str, Tensor], **config: Any) -> EDTTransformer2DModel:
    """Build a model from the authors' state dict; see `edt_diffusion.convert.from_official`."""
    inferred = infer_config(state, config.get("sample_size"))
    model = EDTTransformer2DModel(**with_given(config, inferred, inferred["dims"]))
    return load(model, key_map(inferred["depths"], inferred["num_classes"] is not None), state)


def to_official(model: EDTTransformer2DModel) -> dict[str, Tensor]:
    """The model's tensors under the authors' names; see `edt_diffusion.convert.to_official`."""
    own = ("token_information_enhancement", "positional_encoding_supplement")
    if model.config["side_interpolater"] or not all(model.config[name] for name in own):
        raise ValueError("the authors' files have no place for a side interpolater or for modules left out")
    return to_theirs(key_map(model.config["depths"], model.class_embedder is not None), model.state_dict())
