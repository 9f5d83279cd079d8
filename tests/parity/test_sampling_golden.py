"""Ten-step sampling loops of the authors' code (EDT-S, rule C weights, no clipping); tolerance 1e-5 of the absmax."""

import diffusers.schedulers.scheduling_ddpm
import numpy as np
import pytest
import torch
from golden_models import filled_model, largest_error, load

from edt_diffusion import ClassConditionalPipeline, EDTTransformer2DModel
from edt_diffusion.pipelines import make_scheduler

STEPS = 10
CASES = {"ddpm": "sample_loop_s2_10_C", "ddim": "ddim_loop_s2_10_C"}


@pytest.fixture(scope="module")
def model() -> EDTTransformer2DModel:
    return filled_model("S", "C")


def start(golden: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(int(golden["z_seed"]))
    z = rng.standard_normal((2, 4, 32, 32), dtype=np.float32)
    np.testing.assert_array_equal(rng.integers(0, 1000, size=2), golden["y"])
    return torch.from_numpy(z), torch.from_numpy(golden["y"])


def feed_recorded_noise(monkeypatch, golden: dict[str, np.ndarray]) -> list[int]:
    """Replace the sampler's draws by those of the recorded run; returns the list of seeds it has used so far."""
    used: list[int] = []

    def draw(shape, **_):
        used.append(int(golden["noise_seeds"][len(used)]))
        return torch.from_numpy(np.random.default_rng(used[-1]).standard_normal(tuple(shape), dtype=np.float32))

    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", draw)
    return used


@pytest.mark.parametrize("name", CASES)
def test_timesteps(name):
    golden = load(CASES[name])
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(STEPS)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), golden["timestep_map"][::-1])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_loop(record_property, monkeypatch, model, name):
    golden = load(CASES[name])
    assert golden["amm_blocks"].size == 0
    sample, labels = start(golden)
    used = feed_recorded_noise(monkeypatch, golden)
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(STEPS)
    worst, absmax, original = 0.0, [], sample
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        output = model(sample, timestep, labels, return_dict=False)[0]
        if name == "ddim":
            output = output[:, :4]
        sample, original = scheduler.step(output, timestep, sample, return_dict=False)[:2]
        absmax.append(float(sample.abs().max()))
        if step in (1, 5):
            expected = golden[f"sample_step{step}"]
            worst = max(worst, largest_error(sample, expected) / float(np.abs(expected).max()))
    for ours, key in ((sample, "final"), (original, "final_pred_xstart")):
        worst = max(worst, largest_error(ours, golden[key]) / float(np.abs(golden[key]).max()))
    record_property("largest_error", worst)
    # The authors draw at the last step too, and multiply by zero.
    assert used == ([] if name == "ddim" else golden["noise_seeds"][:-1].tolist())
    np.testing.assert_allclose(absmax, golden["step_absmax"], rtol=1e-5)
    assert worst <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_pipeline(record_property, monkeypatch, model, name):
    golden = load(CASES[name])
    z, labels = start(golden)
    feed_recorded_noise(monkeypatch, golden)
    initial = iter(z)
    pipeline = ClassConditionalPipeline(model, make_scheduler("ddpm"))
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(initial))
    result = pipeline(labels, num_inference_steps=STEPS, seeds=[0, 0], scheduler=name, output_type="latent")
    error = largest_error(result.images, golden["final"]) / float(np.abs(golden["final"]).max())
    record_property("largest_error", error)
    assert error <= 1e-5
