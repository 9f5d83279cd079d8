"""Masks at the input: how they are drawn, and how a training step uses them."""

from typing import Any

import pytest
import torch
from tiny_backbones import tiny_backbone

from edt_diffusion.models.masking import INPUT_MASKS, MaskPlan, TokenMasks
from edt_diffusion.objectives import LearnedVarianceObjective, MaskedTraining, UniformTimesteps
from edt_diffusion.objectives.config import MaskConfig, default_masks, usual_passes
from edt_diffusion.objectives.draws import can_be_joined

GRID = ((8, 8),)
PLAN = MaskPlan((), input=(0.3, 0.5))


def kept(plan: MaskPlan, step: int, positions=range(4), grids=GRID, seed: int = 0) -> torch.Tensor:
    masks = plan.draw(seed, step, list(positions), grids)
    assert masks.down == ()
    assert masks.stage0 is None
    assert masks.input is not None
    assert masks.input.dtype == torch.bool
    return masks.input


def test_as_many_tokens_are_kept_in_each_sample():
    """int(N (1 - ratio)) with ratio between the bounds: 32 to 44 of 64, all of them over enough steps."""
    counts = []
    for step in range(300):
        numbers = kept(PLAN, step).sum(1)
        assert len(set(numbers.tolist())) == 1
        counts.append(int(numbers[0]))
    assert set(counts) == set(range(32, 45))
    # The count is the floor of a number uniform in [32, 44.8]: its mean is about 37.9, here to 5 standard errors.
    assert sum(counts) / 300 == pytest.approx(37.9, abs=5 * 3.7 / 300**0.5)


@pytest.mark.parametrize(
    ("share", "tokens", "count"),
    [(0.0, (4, 4), 16), (0.5, (3, 5), 7), (0.3, (4, 4), 11), (0.99, (4, 4), 1), (1.0, (4, 4), 1), (0.5, (16, 16), 128)],
)
def test_the_number_kept_is_rounded_down_and_one_at_least(share, tokens, count):
    mask = kept(MaskPlan((), input=(share, share)), 0, grids=(tokens,))
    assert mask.shape == (4, tokens[0] * tokens[1])
    assert mask.sum(1).tolist() == [count] * 4


def test_every_token_is_as_likely_as_another():
    plan = MaskPlan((), input=(0.5, 0.5))
    often = torch.stack([kept(plan, step, range(8)) for step in range(200)]).float().mean((0, 1))
    # 1600 draws of a half: five standard errors are 0.0625.
    assert (often - 0.5).abs().max() < 0.0625
    first = kept(plan, 0, range(8))
    assert len({tuple(row.tolist()) for row in first}) == 8  # samples differ
    assert not torch.equal(first, kept(plan, 1, range(8)))
    assert not torch.equal(first, kept(plan, 0, range(8), seed=1))


def test_masks_do_not_depend_on_how_the_batch_is_cut():
    whole = kept(PLAN, 5, range(6))
    parts = [kept(PLAN, 5, part) for part in ([0, 1], [2], [3, 4, 5])]
    assert torch.equal(torch.cat(parts), whole)


def test_ratios_of_other_masks_are_drawn_as_before():
    """A mask at the input takes nothing from the streams of the others."""
    grids = ((8, 8), (4, 4))
    alone = MaskPlan(stage0=(0.1, 0.2)).draw(3, 4, [0, 1], grids)
    both = MaskPlan(stage0=(0.1, 0.2), input=(0.3, 0.5)).draw(3, 4, [0, 1], grids)
    assert all(torch.equal(a, b) for a, b in zip(alone.down, both.down, strict=True))
    assert torch.equal(alone.stage0, both.stage0)  # pyright: ignore[reportArgumentType]


def test_numbers_of_the_tokens_that_are_there():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]])
    for dtype in (torch.bool, torch.uint8, torch.float32):
        places = TokenMasks(input=mask.to(dtype)).kept_at_input()
        assert places is not None
        assert places.tolist() == [[1, 3, 4], [0, 1, 4]]
        known = TokenMasks(input=mask.to(dtype), kept_tokens=3)
        assert torch.equal(known.kept_at_input(), places)  # pyright: ignore[reportArgumentType]
    assert TokenMasks((mask,)).kept_at_input() is None
    drawn = MaskPlan((), input=(0.3, 0.5)).draw(0, 1, range(3), [(8, 8)])
    counted = TokenMasks(input=drawn.input).kept_at_input()
    assert counted is not None
    assert drawn.kept_tokens == drawn.to("cpu").kept_tokens == counted.shape[1]
    assert torch.equal(drawn.changed(lambda m: m[1:]).kept_at_input(), counted[1:])  # pyright: ignore
    moved = TokenMasks((mask,), mask, mask).to(dtype=torch.float64)
    assert {m.dtype for m in (*moved.down, moved.stage0, moved.input)} == {torch.float64}  # pyright: ignore


@pytest.mark.parametrize("wrong", [(-0.1, 0.5), (0.5, 0.3), (0.5, 1.1)])
def test_ranges_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"mask range input = .*expected 0 <= low <= high <= 1"):
        MaskPlan((), input=wrong)
    with pytest.raises(ValueError, match="mask range input"):
        MaskConfig(down=(), input=wrong)


def test_a_share_of_the_input_alone_means_no_other_mask():
    assert MaskConfig.model_validate({"input": [0.3, 0.5]}).plan() == MaskPlan(down=(), input=(0.3, 0.5))
    both = MaskConfig.model_validate({"input": [0.3, 0.5], "down": [[0.1, 0.2]]})
    assert both.plan() == MaskPlan(down=((0.1, 0.2),), input=(0.3, 0.5))
    assert MaskConfig.model_validate({"stage0": [0.3, 0.5]}).down == MaskPlan().down


def test_what_is_usual_for_each_backbone():
    assert default_masks({"name": "MDTv2", "size": "S"}) == MaskConfig(down=(), input=(0.3, 0.5))
    assert default_masks({"side_interpolater": True, "size": "XL"}) == MaskConfig(down=(), input=INPUT_MASKS)
    assert default_masks({"name": "EDT", "size": "S"}).input is None
    assert default_masks({"name": "DiT"}) == MaskConfig(down=())
    assert [usual_passes({"name": name}) for name in ("EDT", "DiT", "MDTv2")] == ["full+masked", "full", "full+masked"]


# ---- training steps ----


def training(plan: MaskPlan, joint: bool) -> MaskedTraining:
    return MaskedTraining(LearnedVarianceObjective(), UniformTimesteps(1000), mask_plan=plan, joint=joint)


@pytest.mark.parametrize(("family", "change"), [("MDTv2", {}), ("EDT", {"side_interpolater": True})])
def test_passes_with_fewer_tokens_are_not_joined(family, change):
    model = tiny_backbone(family, **change).train()
    x0 = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    losses = []
    for joint in (False, True):
        train = training(PLAN, joint)
        draws = train.draw(0, 0, [0, 1, 2], labels, 5, (3, 8, 8), model.mask_grids)
        assert not can_be_joined(draws.passes)
        losses.append(train.loss_of(model, x0, draws))
    assert [call["hidden_states"].shape[0] for call in calls] == [3] * 4
    assert [call["token_masks"] is None for call in calls] == [True, False] * 2
    assert torch.equal(losses[0].total, losses[1].total)
    assert losses[0].pass_losses.keys() == {"full", "masked"}
    down = MaskPlan(((0.4, 0.5),))
    if family == "EDT":
        draws = training(down, True).draw(0, 0, [0, 1, 2], labels, 5, (3, 8, 8), model.mask_grids)
        assert can_be_joined(draws.passes)
