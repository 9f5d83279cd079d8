"""EDT, the Efficient Diffusion Transformer: train, run and judge an image generator on your own labelled pictures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names load their module on first use: `edt --help` must not wait for torch.
_EXPORTS = {
    "ClassConditionalPipeline": "pipelines",
    "DiT2DModel": "models",
    "EDTTransformer2DModel": "models",
    "MDT2DModel": "models",
    "MaskPlan": "models",
    "RespacedDDIMScheduler": "pipelines",
    "TokenMasks": "models",
}

__all__ = [
    "ClassConditionalPipeline",
    "DiT2DModel",
    "EDTTransformer2DModel",
    "MDT2DModel",
    "MaskPlan",
    "RespacedDDIMScheduler",
    "TokenMasks",
    "__version__",
]

if TYPE_CHECKING:
    from .models import DiT2DModel as DiT2DModel
    from .models import EDTTransformer2DModel as EDTTransformer2DModel
    from .models import MaskPlan as MaskPlan
    from .models import MDT2DModel as MDT2DModel
    from .models import TokenMasks as TokenMasks
    from .pipelines import ClassConditionalPipeline as ClassConditionalPipeline
    from .pipelines import RespacedDDIMScheduler as RespacedDDIMScheduler


_PACKAGES = ("convert", "data", "evaluation", "models", "objectives", "pipelines", "training")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
