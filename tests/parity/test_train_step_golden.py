"""One training step of the authors' code, full pass plus masked pass: losses and the gradient of every parameter.

EDT-S, rule B weights. Stated tolerance: gradient norms rtol 2e-4. None is stated for losses (5e-6 relative is used, as
in test_losses_golden) and single gradient values (2e-4 of the larger of the value and the tensor's root mean square).
"""

import numpy as np
import pytest
import torch
from golden_models import filled_model, load

from edt_diffusion import TokenMasks
from edt_diffusion.convert.official_edt import key_map
from edt_diffusion.objectives import LearnedVarianceObjective, LossTerms


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load("edt_s2_train_step_B")


@pytest.fixture(scope="module")
def step(golden) -> tuple[dict[str, LossTerms], torch.Tensor, dict[str, torch.Tensor]]:
    """Terms of both passes, the total, and gradients under the authors' names."""
    rng = np.random.default_rng(int(golden["seed"]))
    x0, noise_full, noise_masked = (
        torch.from_numpy(rng.standard_normal((2, 4, 32, 32), dtype=np.float32)) for _ in range(3)
    )
    np.testing.assert_array_equal(rng.integers(0, 1000, size=2), golden["t"])
    np.testing.assert_array_equal(rng.integers(0, 1000, size=2), golden["y"])
    model = filled_model("S", "B").train()
    masks = TokenMasks(tuple(torch.from_numpy(golden[f"mask_down{i}_keep"]) for i in range(2)))
    objective, t = LearnedVarianceObjective(), torch.from_numpy(golden["t"])
    terms = {
        "full": objective.terms(model, x0, t, noise_full, torch.from_numpy(golden["y_full"])),
        "masked": objective.terms(model, x0, t, noise_masked, torch.from_numpy(golden["y_masked"]), masks),
    }
    total = terms["full"].loss.mean() + terms["masked"].loss.mean()
    total.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    entries = [entry for entry in key_map(model.config.depths) if not entry.theirs.endswith("pos_embed")]
    assert sorted(name for entry in entries for name in entry.ours) == sorted(ours)
    gradients = {entry.theirs: torch.cat([ours[name] for name in entry.ours]) for entry in entries}
    return terms, total.detach(), gradients


@pytest.mark.parametrize("name", ["mse", "vb", "loss"])
@pytest.mark.parametrize("which", ["full", "masked"])
def test_terms(record_property, golden, step, which, name):
    expected = golden[f"{which}_{name}"]
    error = float(np.max(np.abs(getattr(step[0][which], name).detach().numpy() - expected) / np.abs(expected)))
    record_property("largest_error", error)
    assert error <= 5e-6


def test_total(record_property, golden, step):
    error = abs(float(step[1]) / float(golden["total"]) - 1)
    record_property("largest_error", error)
    assert error <= 5e-6


def test_gradient_norms(record_property, golden, step):
    gradients = step[2]
    assert sorted(gradients) == sorted(golden["names"])
    norms = np.array([float(gradients[name].double().norm()) for name in golden["names"]])
    error = float(np.max(np.abs(norms / golden["grad_norms_f64"] - 1)))
    record_property("largest_error", error)
    assert error <= 2e-4


def test_gradient_heads(record_property, golden, step):
    worst = 0.0
    for name, norm, head in zip(golden["names"], golden["grad_norms_f64"], golden["grad_heads_f64"], strict=True):
        gradient = step[2][name].flatten()
        size = np.maximum(np.abs(head), norm / gradient.numel() ** 0.5)
        worst = max(worst, float(np.max(np.abs(gradient[:4].double().numpy() - head) / size)))
    record_property("largest_error", worst)
    assert worst <= 2e-4
