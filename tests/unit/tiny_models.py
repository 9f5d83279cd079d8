"""Small EDT models for tests, with random weights (a new model returns zeros whatever it is given)."""

from typing import Any

import torch

from edt_diffusion import EDTTransformer2DModel

TINY: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 3,
    "num_classes": 5,
    "depths": (2, 1, 2),
    "dims": (16, 24, 16),
    "num_heads": (2, 3, 2),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter: matrices keep the scale of what passes them, the rest is normal with deviation 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            table = name.endswith(("table", "embedder.weight"))
            scale = 0.3 if parameter.ndim < 2 or table else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def tiny_model(seed: int = 0, **overrides: Any) -> EDTTransformer2DModel:
    model = EDTTransformer2DModel(**{**TINY, **overrides})
    randomise(model, seed)
    return model.eval()


def tiny_inputs(model: EDTTransformer2DModel, batch: int = 2, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of one call: noise, timesteps and, for a conditional model, labels (the null label last)."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.sample_size
    shape = (batch, model.config.in_channels, *((size, size) if isinstance(size, int) else size))
    out: dict[str, Any] = {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }
    if (classes := model.config.num_classes) is not None:
        out["class_labels"] = torch.randint(0, classes, (batch,), generator=generator)
        out["class_labels"][-1] = classes
    return out
