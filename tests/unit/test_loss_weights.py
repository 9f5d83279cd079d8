import numpy as np
import pytest
import torch

from edt_diffusion.objectives import LOSS_WEIGHTINGS, FlowMatchingObjective, LearnedVarianceObjective, LossWeighting
from edt_diffusion.objectives.config import ObjectiveConfig, build_objective, resolved
from edt_diffusion.util.errors import UserError

ALPHAS = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
STEPS = [0, 50, 150, 400, 999]


def published(name: str, snr: np.ndarray) -> np.ndarray:
    """Weights of the noise's error as the papers write them."""
    return {"min_snr": np.minimum(snr, 5) / snr, "p2": 1 / (1 + snr)}[name]


@pytest.mark.parametrize("name", ["min_snr", "p2"])
def test_closed_forms(name):
    snr = np.array([1e-6, 0.1, 1.0, 4.9, 5.1, 1e6])
    np.testing.assert_allclose(LossWeighting(name)(torch.tensor(snr)).numpy(), published(name, snr), rtol=1e-12)
    k2 = LossWeighting("p2", p2_k=2.0, p2_gamma=0.5)(torch.tensor(snr))
    np.testing.assert_allclose(k2.numpy(), (2 + snr) ** -0.5, rtol=1e-12)
    assert LossWeighting("none")(torch.tensor(snr), 0.3).tolist() == [1.0] * 6


def ratio(objective, t: torch.Tensor) -> np.ndarray:
    """The weights that an objective applies."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = torch.randn(3, len(t), 2, 4, 4, generator=generator)
    got = objective.terms(lambda **_: (output,), x0, t, noise, None)
    return (got.mse / got.mse_plain).numpy()


@pytest.mark.parametrize("name", ["min_snr", "p2"])
def test_weights_of_every_target(name):
    """eps = sqrt(a) v + sqrt(1 - a) x_t and eps = x_s + (1 - s) velocity: the errors differ by these factors."""
    a, t = ALPHAS[STEPS], torch.tensor(STEPS)
    snr = a / (1 - a)
    noise = LearnedVarianceObjective(loss_weighting=name, learn_sigma=False)
    np.testing.assert_allclose(ratio(noise, t), published(name, snr), rtol=1e-6)
    v = LearnedVarianceObjective(loss_weighting=name, learn_sigma=False, prediction_type="v_prediction")
    np.testing.assert_allclose(ratio(v, t), published(name, snr) * snr / (1 + snr), rtol=1e-6)
    if name == "min_snr":  # as Hang et al. write it for v
        np.testing.assert_allclose(ratio(v, t), np.minimum(snr, 5) / (snr + 1), rtol=1e-6)
    s = np.array([0.001, 0.2, 0.31, 0.5, 0.999])
    snr = ((1 - s) / s) ** 2
    flow = FlowMatchingObjective(loss_weighting=name)
    times = torch.tensor(1000 * s, dtype=torch.float32)
    np.testing.assert_allclose(ratio(flow, times), published(name, snr) * (1 - s) ** 2, rtol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_none_is_the_plain_error_of_the_target(prediction):
    objective = LearnedVarianceObjective(loss_weighting="none", learn_sigma=False, prediction_type=prediction)
    assert ratio(objective, torch.tensor(STEPS)).tolist() == [1.0] * 5
    assert ratio(FlowMatchingObjective(), torch.tensor([0.1, 500.0, 999.0])).tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "arguments", [{"name": "snr"}, {"min_snr_gamma": -1.0}, {"p2_k": 0.0}, {"p2_k": float("inf")}, {"p2_gamma": -0.5}]
)
def test_bad_arguments(arguments):
    what = "loss_weighting" if "name" in arguments else next(iter(arguments))
    with pytest.raises(ValueError, match=what):
        LossWeighting(**{"name": "p2", **arguments})
    if "name" in arguments:
        with pytest.raises(ValueError, match=" or ".join(map(repr, LOSS_WEIGHTINGS))):
            LossWeighting(**arguments)


# ---- as settings ----


def test_nulls_become_what_is_usual_for_the_objective():
    usual = {
        "learned_variance": ("min_snr", "loss_second_moment"),
        "v_prediction": ("min_snr", "loss_second_moment"),
        "flow": ("none", "logit_normal"),
    }
    for name, (weighting, timesteps) in usual.items():
        config = resolved(ObjectiveConfig(name=name))
        assert (config.loss_weighting, config.timesteps) == (weighting, timesteps)
        assert resolved(config) == config
        assert ObjectiveConfig.model_validate(config.model_dump(mode="json")) == config  # as a saved run is read
        built = build_objective(ObjectiveConfig(name=name), learn_sigma=False)
        assert built.objective.loss_weighting.name == weighting
        assert built.timesteps.num_timesteps == 1000
    flow = resolved(ObjectiveConfig(name="flow", logit_std=0.5))
    assert (flow.logit_mean, flow.logit_std, flow.shift, flow.p2_k) == (0.0, 0.5, None, None)
    assert resolved(ObjectiveConfig(loss_weighting="p2", p2_gamma=0.5)).p2_k == 1.0
    assert resolved(ObjectiveConfig(name="flow", timesteps="shifted")).shift == 3.0


def test_nulls_of_a_run_that_is_continued_are_that_runs_values():
    begun = ObjectiveConfig(loss_weighting="none", timesteps="uniform")  # as versions without nulls saved them
    assert resolved(ObjectiveConfig(), begun) == begun
    asked = resolved(ObjectiveConfig(timesteps="loss_second_moment"), begun)
    assert (asked.loss_weighting, asked.timesteps) == ("none", "loss_second_moment")
    assert resolved(ObjectiveConfig(name="flow"), begun).timesteps == "logit_normal"  # another objective altogether
    flow = resolved(ObjectiveConfig(name="flow", timesteps="shifted", shift=2.0))
    assert resolved(ObjectiveConfig(name="flow"), flow) == flow
    assert resolved(ObjectiveConfig(name="flow", shift=4.0, timesteps="shifted"), flow).shift == 4.0
    p2 = resolved(ObjectiveConfig(loss_weighting="p2", p2_k=2.0))
    assert resolved(ObjectiveConfig(), p2) == p2


def test_settings_reach_what_is_built():
    built = build_objective(ObjectiveConfig(loss_weighting="p2", p2_k=2.0, p2_gamma=0.5, vb_weight=0.25), True)
    assert built.objective.loss_weighting == LossWeighting("p2", p2_k=2.0, p2_gamma=0.5)
    assert built.objective.vb_weight == 0.25
    built = build_objective(ObjectiveConfig(name="flow", timesteps="shifted", shift=2.0), False, joint=True)
    assert built.joint
    assert built.timesteps.draw([0.5])[0].tolist() == pytest.approx([1000 * 2 / 3])
    built = build_objective(ObjectiveConfig(name="flow", timesteps="loss_second_moment"), False)
    assert built.timesteps.draw([0.0])[0].tolist() == [0.5]
    built = build_objective(ObjectiveConfig(name="v_prediction", min_snr_gamma=3.0), True)
    assert built.objective.prediction_type == "v_prediction"
    assert built.objective.loss_weighting.min_snr_gamma == 3.0
    assert built.timesteps.draw([0.0])[0].dtype == np.int64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_weighting": "minsnr"}, "unknown loss weighting 'minsnr'.*did you mean 'min_snr'"),
        (
            {"timesteps": "logit_normal"},
            "timesteps=logit_normal is for continuous time .*uniform or loss_second_moment",
        ),
        ({"name": "v_prediction", "timesteps": "shifted"}, "timesteps=shifted is for continuous time"),
        (
            {"name": "flow", "timesteps": "uniform", "logit_mean": 1.0},
            "logit_mean=1 has no effect with timesteps=uniform",
        ),
        ({"name": "flow", "shift": 2.0}, "shift=2 has no effect with timesteps=logit_normal.*choose timesteps=shifted"),
        ({"shift": 2.0}, "shift=2 has no effect with timesteps=loss_second_moment"),
        ({"p2_k": 2.0}, "p2_k=2 has no effect with loss_weighting=min_snr"),
        ({"loss_weighting": "p2", "min_snr_gamma": 3.0}, "min_snr_gamma=3 has no effect with loss_weighting=p2"),
        ({"name": "flow", "vb_weight": 0.5}, "vb_weight=0.5 has no effect on flow"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


def test_flow_with_a_learned_variance_is_refused():
    with pytest.raises(UserError, match=r"set model\.learn_sigma=false"):
        build_objective(ObjectiveConfig(name="flow"), learn_sigma=True)
