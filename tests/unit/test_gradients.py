"""However a step's batch is cut, the gradients are the same: micro-batches, one doubled batch, two passes."""

import pytest
import torch
from tiny_models import randomise

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.models.edt import SIZE_MASKS, SIZES
from edt_diffusion.objectives.config import ObjectiveConfig, build_objective

CLASSES, BATCH = 10, 4


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
