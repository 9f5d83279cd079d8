"""DiT weights in the authors' names (github.com/facebookresearch/DiT) to and from `DiT2DModel`.

The number of heads is in no tensor: without it, the one of the published size of that width is taken.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..models.dit import SIZES, DiT2DModel
from .keymap import Entry, block_entries, entry_and_exit, load, to_theirs
from .shapes import count_blocks, entry_config, heads_of_width, mlp_ratio, with_given


def key_map(depth: int, conditional: bool = True) -> list[Entry]:
    """Entries of a DiT with so many blocks."""
    entries = entry_and_exit(conditional)
    for block in range(depth):
        entries += block_entries(f"blocks.{block}", f"blocks.{block}", biased=False)
    return entries


def infer_config(state: Mapping[str, Tensor], sample_size: int | Sequence[int] | None = None) -> dict[str, Any]:
    """Constructor arguments told by the shapes of the authors' tensors, but for `num_heads`.

    Raises:
        ValueError: if a tensor that must be there is not, or shapes contradict each other or `sample_size`.
    """
    depth = count_blocks(state, "blocks", "DiT")
    config = entry_config(state, "DiT", sample_size)
    width = state["x_embedder.proj.weight"].shape[0]
    return {
        **config,
        "depth": depth,
        "hidden_size": width,
        "mlp_ratio": mlp_ratio([(width, state["blocks.0.mlp.fc1.weight"].shape[0])]),
    }


def from_official(state: Mapping[str, Tensor], **config: Any) -> DiT2DModel:
    """Build a model from the authors' state dict; see `edt_diffusion.convert.from_official`."""
    inferred = infer_config(state, config.get("sample_size"))
    heads = config.get("num_heads") or heads_of_width(SIZES, inferred["hidden_size"])
    model = DiT2DModel(**with_given({**config, "num_heads": heads}, inferred))
    return load(model, key_map(inferred["depth"], inferred["num_classes"] is not None), state)


def to_official(model: DiT2DModel) -> dict[str, Tensor]:
    """The model's tensors under the authors' names; see `edt_diffusion.convert.to_official`."""
    return to_theirs(key_map(model.config["depth"], model.class_embedder is not None), model.state_dict())
