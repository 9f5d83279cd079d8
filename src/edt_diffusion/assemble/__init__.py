"""Configuration becomes objects, here and nowhere else.

`run.py` puts a training run together from top to bottom; `model.py` makes the network and the pipeline around it,
`during.py` what is done now and then while it trains, `budget.py` what it will take.
"""

from .during import sample_classes
from .model import build_model, build_pipeline, complete, open_codec
from .run import build_trainer, open_data

__all__ = [
    "build_model",
    "build_pipeline",
    "build_trainer",
    "complete",
    "open_codec",
    "open_data",
    "sample_classes",
]
