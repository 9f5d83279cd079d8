"""Small models of every backbone, alike in their inputs, with random weights."""

from typing import Any

from tiny_models import TINY, randomise, tiny_inputs

from edt_diffusion.models import BACKBONES, Backbone

__all__ = ["TINY_OF", "randomise", "tiny_backbone", "tiny_inputs"]

_ENDS = {name: TINY[name] for name in ("sample_size", "patch_size", "in_channels", "num_classes")}
# Arguments by family. Of MDTv2's blocks two leave long skips, two take them, two are of the decoder.
TINY_OF: dict[str, dict[str, Any]] = {
    "EDT": TINY,
    "DiT": {**_ENDS, "depth": 4, "hidden_size": 16, "num_heads": 2},
    "MDTv2": {**_ENDS, "depth": 6, "hidden_size": 16, "num_heads": 2, "decode_layers": 2},
}


def tiny_backbone(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A model of a family, in eval mode."""
    model: Backbone = BACKBONES[family](**{**TINY_OF[family], **overrides})
    randomise(model, seed)
    return model.eval()
