"""MDTv2 weights in the authors' names (github.com/sail-sg/MDT) to and from `MDT2DModel`.

Their blocks stand in lists by role (`en_inblocks`, `en_outblocks`, `de_blocks`, `sideblocks`), ours in one list in
execution order with the side interpolater among them. Their index of relative positions is a saved buffer; ours is
computed, and written when a model is turned back into their form.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.mdt import MDT2DModel
from ..nn.attention import relative_position_index
from .keymap import Entry, block_entries, entry_and_exit, load, pair, to_theirs
from .shapes import count_blocks, entry_config, mlp_ratio, with_given

_INDEX = ".attn.rel_pos_bias.relative_position_index"
_TABLE = ".attn.rel_pos_bias.relative_position_bias_table"


def _places(depth: int, decode_layers: int) -> list[tuple[str, str, bool]]:
    """(their name, our name, whether it fuses a long skip) of every block, the side block among them."""
    half = (depth - decode_layers) // 2
    places = [(f"en_inblocks.{i}", f"blocks.{i}", False) for i in range(half)]
    places += [(f"en_outblocks.{i}", f"blocks.{half + i}", True) for i in range(half)]
    places += [("sideblocks.0", f"blocks.{2 * half}.block", False)]
    return places + [(f"de_blocks.{i}", f"blocks.{2 * half + 1 + i}", True) for i in range(decode_layers)]


def key_map(depth: int, decode_layers: int, conditional: bool = True) -> list[Entry]:
    """Entries of an MDTv2 with so many blocks, but for the saved indices."""
    entries = entry_and_exit(conditional)
    side = f"blocks.{(depth - decode_layers) // 2 * 2}"
    entries += pair("decoder_pos_embed", f"{side}.pos_embed", "") + pair("mask_token", f"{side}.mask_token", "")
    for theirs, ours, fuses in _places(depth, decode_layers):
        entries += block_entries(theirs, ours, biased=True)
        if fuses:
            entries += pair(f"{theirs}.skip_linear", f"{ours}.skip_linear", ".weight", ".bias")
    return entries


def infer_config(state: Mapping[str, Tensor], sample_size: int | Sequence[int] | None = None) -> dict[str, Any]:
    """Constructor arguments told by the shapes of the authors' tensors.

    Raises:
        ValueError: if a tensor that must be there is not, or shapes contradict each other or `sample_size`.
    """
    entry, out, decoder, side = (
        count_blocks(state, name, "MDTv2") for name in ("en_inblocks", "en_outblocks", "de_blocks", "sideblocks")
    )
    if entry != out or side != 1:
        raise ValueError(
            f"{entry} in-blocks, {out} out-blocks, {side} side blocks: expected as many in as out, one side"
        )
    config = entry_config(state, "MDTv2", sample_size)
    first = "en_inblocks.0"
    if f"{first}{_TABLE}" not in state:
        raise ValueError(f"entry '{first}{_TABLE}' is missing: this is not an MDTv2 checkpoint")
    width = state["x_embedder.proj.weight"].shape[0]
    return {
        **config,
        "depth": entry + out + decoder,
        "hidden_size": width,
        "num_heads": state[f"{first}{_TABLE}"].shape[1],
        "mlp_ratio": mlp_ratio([(width, state[f"{first}.mlp.fc1.weight"].shape[0])]),
        "decode_layers": decoder,
    }


def from_official(state: Mapping[str, Tensor], **config: Any) -> MDT2DModel:
    """Build a model from the authors' state dict; see `edt_diffusion.convert.from_official`."""
    inferred = infer_config(state, config.get("sample_size"))
    model = MDT2DModel(**with_given(config, inferred))
    own = relative_position_index(*model.grids[0])
    named = {}
    for name, tensor in state.items():
        if not name.endswith(_INDEX):
            named[name] = tensor
        elif tensor.numel() == own.numel() and not torch.equal(tensor.view_as(own), own):
            raise ValueError(
                f"{name} is not that of sample_size={inferred['sample_size']!r} (height and width exchanged?)"
            )
    entries = key_map(inferred["depth"], inferred["decode_layers"], inferred["num_classes"] is not None)
    return load(model, entries, named)


def to_official(model: MDT2DModel) -> dict[str, Tensor]:
    """The model's tensors under the authors' names; see `edt_diffusion.convert.to_official`."""
    depth, decode_layers = model.config["depth"], model.config["decode_layers"]
    state = to_theirs(key_map(depth, decode_layers, model.class_embedder is not None), model.state_dict())
    for theirs, _, _ in _places(depth, decode_layers):
        state[theirs + _INDEX] = relative_position_index(*model.grids[0])
    return state
