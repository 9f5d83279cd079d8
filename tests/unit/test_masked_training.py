import hashlib
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from torch.utils.data._utils.pin_memory import pin_memory

from edt_diffusion.models.masking import MaskPlan
from edt_diffusion.objectives import (
    LearnedVarianceObjective,
    LossSecondMomentTimesteps,
    LossTerms,
    MaskedTraining,
    UniformTimesteps,
)

GRIDS = ((4, 4), (2, 2))
KEY = {"seed": 7, "step": 3}


class Stub(nn.Module):
    """A 1x1 convolution that scales with label and timestep, and remembers how it was called."""

    null_label: int | None = 10
    mask_grids = GRIDS

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.calls: list[dict] = []
        self.suspended = False

    @contextmanager
    def suspend_attention_modulation(self):
        self.suspended = True
        yield
        self.suspended = False

    def forward(self, hidden_states, timestep, class_labels=None, token_masks=None, return_dict=True):
        self.calls.append({"labels": class_labels, "masks": token_masks, "suspended": self.suspended})
        scale = 1.0 + timestep / 1000.0 + (0 if class_labels is None else class_labels)
        return (self.conv(hidden_states) * scale.view(-1, 1, 1, 1),)


def training(**changes) -> MaskedTraining:
    return MaskedTraining(
        **{
            "objective": LearnedVarianceObjective(),
            "timesteps": UniformTimesteps(1000),
            "mask_plan": MaskPlan(),
            **changes,
        }
    )


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def draw(train: MaskedTraining, positions, labels=None, **key):
    return train.draw(
        **{**KEY, **key}, positions=positions, labels=labels, null_label=10, shape=(3, 8, 8), mask_grids=GRIDS
    )


def flat(draws) -> list[torch.Tensor]:
    tensors = [draws.t, draws.weight]
    for part in draws.passes:
        tensors.append(part.noise)
        tensors += [] if part.labels is None else [part.labels]
        tensors += [] if part.masks is None else list(part.masks.down)
    return tensors


def test_draws_do_not_depend_on_how_the_global_batch_is_split():
    train = training(label_dropout=0.5)
    labels = batch(8)[1]
    whole = flat(draw(train, range(8), labels))
    halves = zip(flat(draw(train, range(4), labels[:4])), flat(draw(train, range(4, 8), labels[4:])), strict=True)
    assert len(whole) == 2 + 2 * 2 + 2
    for together, (first, second) in zip(whole, halves, strict=True):
        assert torch.equal(together, torch.cat([first, second]))


def test_loss_of_the_global_batch_is_the_mean_over_its_parts():
    train, model = training(label_dropout=0.5), Stub()
    x0, labels = batch(8)
    whole = train(model, x0, labels, **KEY, positions=range(8))
    parts = [train(model, x0[i : i + 4], labels[i : i + 4], **KEY, positions=range(i, i + 4)) for i in (0, 4)]
    torch.testing.assert_close(whole.total, (parts[0].total + parts[1].total) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.sampler_loss, torch.cat([p.sampler_loss for p in parts]), rtol=1e-6, atol=0)
    assert torch.equal(whole.t, torch.cat([p.t for p in parts]))


def test_same_key_same_bits_other_key_other_bits():
    train = training()
    first = flat(draw(train, [0, 5]))
    torch.manual_seed(0)
    np.random.seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first, flat(draw(train, [0, 5])), strict=True))
    for other in ({"seed": 8}, {"step": 4}):
        changed = flat(draw(train, [0, 5], **other))
        assert not torch.equal(first[0], changed[0])  # t
        assert not torch.equal(first[2], changed[2])  # noise


def test_passes_share_timesteps_and_nothing_else():
    full, masked = draw(training(label_dropout=0.5), range(64), torch.zeros(64, dtype=torch.int64)).passes
    assert (full.name, masked.name) == ("full", "masked")
    assert full.masks is None
    assert [tuple(m.shape) for m in masked.masks.down] == [(64, 16), (64, 4)]
    assert not torch.equal(full.labels, masked.labels)
    correlation = np.corrcoef(full.noise.flatten(), masked.noise.flatten())[0, 1]
    assert abs(correlation) < 4 / np.sqrt(full.noise.numel())


def test_a_pass_keeps_its_draws_when_the_other_is_left_out():
    labels = batch(8)[1]
    both = draw(training(), range(8), labels).passes
    (alone,) = draw(training(passes="masked"), range(8), labels).passes
    assert torch.equal(alone.noise, both[1].noise)
    assert torch.equal(alone.labels, both[1].labels)
    assert torch.equal(alone.masks.down[0], both[1].masks.down[0])
    (alone,) = draw(training(passes="full", mask_plan=None), range(8), labels).passes
    assert torch.equal(alone.noise, both[0].noise)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_label_drop_rate(rate):
    count = 5000
    labels = torch.arange(count) % 10
    for part in draw(training(label_dropout=rate), range(count), labels).passes:
        dropped = part.labels == 10
        assert abs(dropped.float().mean().item() - rate) <= 4 * np.sqrt(rate * (1 - rate) / count)
        assert torch.equal(part.labels[~dropped], labels[~dropped])


def test_draws_are_standard_normal_and_timesteps_uniform():
    draws = draw(training(passes="full"), range(2000))
    assert abs(draws.passes[0].noise.mean().item()) < 4 / np.sqrt(2000 * 192)
    assert draws.passes[0].noise.std().item() == pytest.approx(1.0, abs=0.01)
    assert draws.t.float().mean().item() == pytest.approx(499.5, abs=4 * 1000 / np.sqrt(12 * 2000))
    assert draws.passes[0].labels is None


class KnownLosses:
    """loss = t + 1 in the full pass, 10 (t + 1) in the masked one."""

    num_train_timesteps = 4

    def terms(self, model, x0, t, noise, labels, masks=None):
        loss = (t + 1.0) * (1.0 if masks is None else 10.0)
        return LossTerms(loss.requires_grad_(), loss * 0.75, loss * 2, loss * 0.25)


def test_total_sampler_loss_and_metrics_by_hand():
    timesteps = LossSecondMomentTimesteps(4, history=1, uniform_prob=0.0)
    timesteps.update([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
    before = timesteps.weights()
    train = training(objective=KnownLosses(), timesteps=timesteps)
    got = train(Stub(), *batch(6), **KEY, positions=range(6))
    # p_t = (t + 1) / 10, weight = 10 / (4 (t + 1)): weight * loss is 2.5 in the full pass, 25 in the masked one.
    assert got.total.item() == pytest.approx(27.5)
    assert got.total.requires_grad
    assert got.sampler_loss.tolist() == [11.0 * (t + 1) for t in got.t.tolist()]
    assert len(set(got.t.tolist())) > 1
    expected = {"loss": 27.5}
    for name, loss in (("full", 2.5), ("masked", 25.0)):
        shares = {"loss": 1.0, "mse": 0.75, "mse_plain": 2.0, "vb": 0.25}
        expected |= {f"{key}_{name}": share * loss for key, share in shares.items()}
    assert {key: value.item() for key, value in got.metrics.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in [got.sampler_loss, *got.metrics.values()])
    np.testing.assert_array_equal(timesteps.weights(), before)  # the trainer updates, after gathering


def test_terms_are_those_of_the_objective_on_the_draws():
    train, model = training(label_dropout=0.5), Stub()
    x0, labels = batch(4)
    draws = draw(train, range(4), labels)
    got = train(model, x0, labels, **KEY, positions=range(4))
    parts = [train.objective.terms(model, x0, draws.t, p.noise, p.labels, p.masks) for p in draws.passes]
    assert torch.equal(got.sampler_loss, parts[0].loss + parts[1].loss)
    assert torch.equal(got.total, parts[0].loss.mean() + parts[1].loss.mean())
    assert torch.equal(train.loss_of(model, x0, draws).total, got.total)
    got.total.backward()
    assert all(torch.count_nonzero(p.grad) == p.numel() for p in model.parameters())


def test_attention_modulation_is_suspended_during_the_passes():
    model = Stub()
    training()(model, *batch(2), **KEY, positions=[0, 1])
    assert [call["suspended"] for call in model.calls] == [True, True]
    assert [call["masks"] is None for call in model.calls] == [True, False]
    assert model.suspended is False
    model.calls.clear()
    training(train_with_amm=True)(model, *batch(2), **KEY, positions=[0, 1])
    assert [call["suspended"] for call in model.calls] == [False, False]


def test_unconditional_model_gets_no_labels():
    model = Stub()
    model.null_label = None
    training()(model, batch(2)[0], None, **KEY, positions=[0, 1])
    assert [call["labels"] for call in model.calls] == [None, None]


def test_model_wrapped_for_parallel_training(tmp_path):
    """Two forwards and one backward through DistributedDataParallel; the wrapper is what gets called."""
    x0, labels = batch(4)
    bare = Stub()
    expected = training()(bare, x0, labels, **KEY, positions=range(4))
    expected.total.backward()
    gradient = bare.conv.weight.grad.clone()
    bare.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(bare)
        called = []
        wrapped.register_forward_pre_hook(lambda module, args: called.append(module))
        compiled = torch.compile(wrapped, backend="eager")
        got = training()(wrapped, x0, labels, **KEY, positions=range(4))
        got.total.backward()
        assert len(called) == 2
        assert torch.equal(got.total, expected.total)
        torch.testing.assert_close(bare.conv.weight.grad, gradient, rtol=1e-6, atol=0)
        # Looking through a compiled wrapper must leave the parallel one inside it.
        with training()._amm_suspended(compiled):
            assert bare.suspended
        assert compiled._orig_mod is wrapped
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": "both"}, "passes = 'both'"),
        ({"mask_plan": None}, "needs a mask_plan"),
        ({"mask_plan": None, "passes": "masked"}, "needs a mask_plan"),
        ({"label_dropout": 1.1}, "label_dropout = 1.1"),
        ({"timesteps": UniformTimesteps(999)}, "999 timesteps"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        training(**changes)


def test_bad_batches():
    x0, labels = batch(2)
    model = Stub()
    with pytest.raises(ValueError, match="3 positions for 2 latents"):
        training()(model, x0, labels, **KEY, positions=[0, 1, 2])
    with pytest.raises(ValueError, match="labels have shape"):
        training()(model, x0, labels[:1], **KEY, positions=[0, 1])
    model.null_label = None
    with pytest.raises(ValueError, match="no null label"):
        training()(model, x0, labels, **KEY, positions=[0, 1])
    training(label_dropout=0.0)(model, x0, labels, **KEY, positions=[0, 1])
    assert torch.equal(model.calls[-1]["labels"], labels)


# ---- the draws in two halves ----


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def test_bits_of_the_draws():
    """A run that was begun with an older version must go on with the same numbers."""
    train = training(mask_plan=MaskPlan(stage0=(0.15, 0.25)), label_dropout=0.5)
    draws = draw(train, [0, 5, 250], torch.tensor([1, 2, 3]))
    full, masked = draws.passes
    assert draws.t.tolist() == [771, 896, 601]
    assert (full.labels.tolist(), masked.labels.tolist()) == ([10, 2, 10], [1, 10, 3])
    assert (digest(full.noise), digest(masked.noise)) == ("913e8824d4ff50a6", "0278bdbe115c3bc5")
    assert digest(*masked.masks.down, masked.masks.stage0) == "4e884a2168ac5121"


def spread_history(train: MaskedTraining) -> None:
    t = np.tile(np.arange(1000), 10)
    train.timesteps.update(t, np.exp(-t / 200.0))


def test_host_draws_are_finished_with_the_present_history():
    train = training(timesteps=LossSecondMomentTimesteps(1000), label_dropout=0.5)
    labels = batch(8)[1]
    host = train.host_draws(7, 3, range(8), (3, 8, 8), GRIDS, conditional=True)
    assert len(host) == 8
    before = train.finish(host, labels, 10)
    for one, other in zip(flat(before), flat(draw(train, range(8), labels)), strict=True):
        assert torch.equal(one, other)
    spread_history(train)
    after = train.finish(host, labels, 10)
    for one, other in zip(flat(after), flat(draw(train, range(8), labels)), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(after.t, before.t)
    assert torch.equal(after.passes[1].noise, before.passes[1].noise)


def test_a_step_takes_draws_made_before():
    train, model = training(label_dropout=0.5), Stub()
    x0, labels = batch(8)
    drawer = pickle.loads(pickle.dumps(train.drawer(7, (3, 8, 8), GRIDS, conditional=True)))
    host = pickle.loads(pickle.dumps(drawer(3, list(range(8)))))
    given = train(model, x0, labels, **KEY, positions=range(8), draws=host)
    assert torch.equal(given.total, train(model, x0, labels, **KEY, positions=range(8)).total)
    other = train(model, x0, labels, **KEY, positions=range(8), draws=drawer(4, list(range(8))))
    assert not torch.equal(given.total, other.total)  # they are what counts


def test_draws_that_do_not_fit_are_refused():
    train, model = training(), Stub()
    x0, labels = batch(4)

    def step(*arguments, conditional=True):
        host = train.host_draws(7, 3, *arguments, GRIDS, conditional)
        return train(model, x0, labels, **KEY, positions=range(4), draws=host)

    with pytest.raises(ValueError, match=r"draws are for latents of shape \(3, 3, 8, 8\), not \(4, 3, 8, 8\)"):
        step(range(3), (3, 8, 8))
    with pytest.raises(ValueError, match=r"draws are for latents of shape \(4, 3, 4, 4\)"):
        step(range(4), (3, 4, 4))
    with pytest.raises(ValueError, match="conditional=True"):
        step(range(4), (3, 8, 8), conditional=False)


def test_draws_are_pinned_whole(monkeypatch):
    """`DataLoader` calls `pin_memory` of what it does not know; there is no page-locked memory without a device."""
    pinned = []

    def pin(tensor, device=None):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    train = training(mask_plan=MaskPlan(stage0=(0.15, 0.25)))
    host = train.host_draws(7, 3, range(4), (3, 8, 8), GRIDS, conditional=True)
    got = pin_memory({"draws": host})["draws"]
    full, masked = host.passes
    expected = [full.noise, full.dropped, masked.noise, masked.dropped, *masked.masks.down, masked.masks.stage0]
    assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in expected}
    assert got.passes[0].noise is not full.noise
    labels = batch(4)[1]
    for one, other in zip(flat(train.finish(got, labels, 10)), flat(train.finish(host, labels, 10)), strict=True):
        assert torch.equal(one, other)


# ---- both passes as one batch ----


def gradients(model, train, x0, labels) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    got = train(model, x0, labels, **KEY, positions=range(len(x0)))
    got.total.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), got


@pytest.mark.parametrize("stage0", [None, (0.15, 0.25)])
@pytest.mark.parametrize("num_classes", [5, None])
def test_one_doubled_batch_or_two_passes(stage0, num_classes):
    model = tiny_model(num_classes=num_classes).train()
    x0 = batch(4)[0]
    labels = None if num_classes is None else torch.tensor([0, 4, 2, 1])
    timesteps = LossSecondMomentTimesteps(1000)
    train = training(mask_plan=MaskPlan(((0.4, 0.5),), stage0), timesteps=timesteps, label_dropout=0.5)
    spread_history(train)
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    expected, two = gradients(model, train, x0, labels)
    assert len(calls) == 2
    calls.clear()
    train.joint = True
    got, one = gradients(model, train, x0, labels)
    (call,) = calls
    assert call["hidden_states"].shape[0] == 8
    masks = call["token_masks"]
    kept = [*masks.down, *([] if masks.stage0 is None else [masks.stage0])]
    assert len(kept) == (1 if stage0 is None else 2)
    assert all(mask[:4].all() and not mask[4:].all() for mask in kept)
    assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(one.total, two.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.sampler_loss, two.sampler_loss, rtol=2e-6, atol=0)
    assert torch.equal(one.t, two.t)
    assert one.metrics.keys() == two.metrics.keys()
    for name, value in two.metrics.items():
        torch.testing.assert_close(one.metrics[name], value, rtol=2e-6, atol=0)
    for name, value in two.pass_losses.items():
        torch.testing.assert_close(one.pass_losses[name], value, rtol=2e-6, atol=0)
    assert float((two.pass_losses["full"] - two.pass_losses["masked"]).abs().min()) > 1e-4  # not twice the same


def test_a_single_pass_is_not_doubled():
    model = Stub()
    train = training(passes="full", mask_plan=None, joint=True)
    train(model, *batch(2), **KEY, positions=[0, 1])
    assert len(model.calls) == 1
    assert model.calls[0]["masks"] is None
    assert len(model.calls[0]["labels"]) == 2


def test_losses_by_sample_and_where_in_the_process():
    timesteps = LossSecondMomentTimesteps(4, history=1, uniform_prob=0.0)
    timesteps.update([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])
    got = training(objective=KnownLosses(), timesteps=timesteps)(Stub(), *batch(6), **KEY, positions=range(6))
    t = got.t.tolist()
    assert {name: values.tolist() for name, values in got.pass_losses.items()} == {
        "full": [step + 1.0 for step in t],
        "masked": [10.0 * (step + 1) for step in t],
    }
    assert got.t_share.tolist() == [step / 4 for step in t]
    assert not any(values.requires_grad for values in got.pass_losses.values())
