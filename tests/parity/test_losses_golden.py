"""Training losses of the authors' code on given arrays.

The golden data names no tolerance for losses; the strictest it names for float32 arrays is used: atol 5e-6, here
relative where a loss exceeds 1.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from edt_diffusion.objectives import LearnedVarianceObjective, LossTerms

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "training_losses_1.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tensors(golden) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(int(golden["seed"]))
    batch, channels, height, width = golden["shape"]
    made = {
        "x0": rng.standard_normal((batch, channels, height, width), dtype=np.float32),
        "noise": rng.standard_normal((batch, channels, height, width), dtype=np.float32),
        "model_out": rng.standard_normal((batch, 2 * channels, height, width), dtype=np.float32),
    }
    for name, array in made.items():
        np.testing.assert_array_equal(array.ravel()[:8], golden[f"{name}_head"])
    return {name: torch.from_numpy(array) for name, array in made.items()} | {"t": torch.from_numpy(golden["t"])}


@pytest.fixture(scope="module")
def terms(tensors) -> LossTerms:
    return LearnedVarianceObjective().terms(
        lambda **_: (tensors["model_out"],), tensors["x0"], tensors["t"], tensors["noise"], None
    )


def check(record_property, ours: torch.Tensor, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    error = float(np.max(np.abs(ours.numpy() - theirs) / np.maximum(1.0, np.abs(theirs))))
    record_property("largest_error", error)
    assert error <= TOLERANCE


def test_noised_latents(golden, tensors, record_property):
    objective = LearnedVarianceObjective()
    check(record_property, objective.add_noise(tensors["x0"], tensors["t"], tensors["noise"]), golden["x_t"])
    np.testing.assert_array_equal(objective.model_timesteps(tensors["t"]).numpy(), golden["t_model"])


@pytest.mark.parametrize("name", ["mse", "mse_plain", "vb", "loss"])
def test_terms(golden, terms, name, record_property):
    check(record_property, getattr(terms, name), golden[name])
