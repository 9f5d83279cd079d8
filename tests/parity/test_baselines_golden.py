"""DiT and MDTv2 against outputs of their authors' code, and with AMM against that of EDT's authors.

Tolerances are those stated with the golden arrays: rule A atol 5e-6, rule B atol 6e-5 (fp32 on the CPU).
"""

import numpy as np
import pytest
import torch
from golden_models import filled_like, inputs, largest_error, load

from edt_diffusion.models import DiT2DModel, MDT2DModel
from edt_diffusion.pipelines.guidance import Guidance, GuidedNetwork, PowerCosine

TOLERANCE = {"A": 5e-6, "B": 6e-5}


def check(record_property, actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    error = largest_error(actual, expected)
    record_property("largest_error", error)
    assert actual.shape == expected.shape
    assert error <= tolerance


def network(kind: type, rule: str):
    if kind is DiT2DModel:
        return filled_like(kind.from_size("S"), rule, "dit")
    # Everything of MDTv2 is trainable, and filled.
    return filled_like(kind.from_size("S"), rule, "mdtv2", kept=("nothing",))


@pytest.mark.parametrize("rule", ["A", "B"])
@pytest.mark.parametrize(("kind", "name"), [(DiT2DModel, "dit_s2"), (MDT2DModel, "mdtv2_s2")])
@torch.no_grad()
def test_forward(record_property, kind, name, rule):
    golden = load(f"{name}_{rule}")
    t, y = (torch.from_numpy(golden[key]) for key in ("t", "y"))
    out = network(kind, rule)(inputs(golden), t, y).sample
    check(record_property, out, golden["out_noamm"], TOLERANCE[rule])


@pytest.mark.parametrize("rule", ["A", "B"])
@torch.no_grad()
def test_power_cosine_guidance_of_mdt(record_property, rule):
    """Each image at its own timestep, batches of one; the first half of the golden batch is the conditional one."""
    golden = load(f"mdtv2_s2_{rule}")
    x, model = inputs(golden), network(MDT2DModel, rule)
    guidance = Guidance(3.8, PowerCosine(4.0), channels="authors")
    out = [
        GuidedNetwork(model, torch.tensor([y]), guidance, 1000)(x[i : i + 1], int(t))
        for i, (t, y) in enumerate(zip(golden["t"], golden["y"], strict=True))
    ]
    check(record_property, torch.cat(out), golden["out_cfg3.8_pow4"][:2], TOLERANCE[rule])
