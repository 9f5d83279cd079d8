"""However a step's batch is cut, the gradients are the same: micro-batches, one doubled batch, two passes."""

import pytest
import torch
from tiny_models import randomise

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.models.edt import SIZES
from edt_diffusion.objectives.config import ObjectiveConfig, build_objective

CLASSES, BATCH = 10, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def small_s(learn_sigma: bool) -> EDTTransformer2DModel:
    """EDT-S/2's stages and blocks, a thirteenth as wide, on latents of 16x16."""
    widths = [width // 13 for width in SIZES["S"]["dims"]]
    model = EDTTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_classes=CLASSES, learn_sigma=learn_sigma,
        depths=SIZES["S"]["depths"], dims=widths, num_heads=[2] * 5,
    )  # fmt: skip
    randomise(model)
    return model.train()


def gradients(
    model: EDTTransformer2DModel, config: ObjectiveConfig, joint: bool, micro: int
) -> dict[str, torch.Tensor]:
    """Gradients of one step's loss over a batch of `BATCH`, added up over `micro` parts of it."""
    objective = build_objective(config, model.config.learn_sigma, joint)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(BATCH, 4, 16, 16, generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    model.zero_grad()
    for places in torch.arange(BATCH).chunk(micro):
        part = objective(model, latents[places], labels[places], seed=3, step=7, positions=places.tolist())
        (part.total / micro).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["learned_variance", "v_prediction", "flow"])
def test_accumulated_doubled_and_two_pass_gradients_are_the_same(name):
    config, model = ObjectiveConfig(name=name), small_s(learn_sigma=name != "flow")
    expected = gradients(model, config, joint=False, micro=1)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    silent = [name for name, gradient in expected.items() if not gradient.any()]
    assert largest > 1e-3
    assert silent == []
    for joint, micro in ((True, 1), (False, 2), (True, 4)):
        got = gradients(model, config, joint, micro)
        worst = max(float((got[key] - expected[key]).abs().max()) for key in expected)
        assert 0 < worst <= 1e-6 * largest, (joint, micro, worst / largest)


def test_another_step_has_other_gradients():
    """What the comparison above would tell: it is not blind."""
    config, model = ObjectiveConfig(), small_s(True)
    expected = gradients(model, config, joint=False, micro=1)
    got = gradients(model, ObjectiveConfig(passes="full"), joint=False, micro=1)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert max(float((got[key] - expected[key]).abs().max()) for key in expected) > 1e-2 * largest
