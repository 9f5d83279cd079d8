import copy
import math

import numpy as np
import pytest
import torch

from edt_diffusion.training.optim import LR_SCHEDULES, OPTIMIZERS, Adan, build_optimizer, learning_rate


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), ())]


def gradients(step: int) -> list[torch.Tensor]:
    return [p.detach() for p in parameters(100 + step)]


def run(optimizer, params, steps) -> None:
    for step in steps:
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.clone()
        optimizer.step()


def reference(p: np.ndarray, grads: list[np.ndarray], lr, betas, eps, wd) -> np.ndarray:
    """Algorithm 1 of arXiv 2208.06677 in float64, with betas written as one minus the paper's."""
    b1, b2, b3 = betas
    m, d, v, previous = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), grads[0]
    for k, g in enumerate(grads, start=1):
        difference, previous = g - previous, g
        m = b1 * m + (1 - b1) * g
        d = b2 * d + (1 - b2) * difference
        v = b3 * v + (1 - b3) * (g + b2 * difference) ** 2
        direction = m / (1 - b1**k) + b2 * d / (1 - b2**k)
        p = (p - lr * direction / (np.sqrt(v / (1 - b3**k)) + eps)) / (1 + lr * wd)
    return p


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adan_follows_the_published_algorithm(foreach, weight_decay):
    params = parameters()
    start = [p.detach().double().numpy() for p in params]
    run(Adan(params, lr=0.01, weight_decay=weight_decay, foreach=foreach), params, range(8))
    for i, p in enumerate(params):
        grads = [gradients(step)[i].double().numpy() for step in range(8)]
        expected = reference(start[i], grads, 0.01, (0.98, 0.92, 0.99), 1e-8, weight_decay)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_adan_foreach_equals_per_tensor(max_grad_norm):
    results = []
    for foreach in (True, False):
        params = parameters()
        optimizer = Adan(params, weight_decay=0.1, max_grad_norm=max_grad_norm, foreach=foreach)
        run(optimizer, params, range(5))
        results.append([*params, *(t for state in optimizer.state.values() for t in state.values())])
    assert len(results[0]) == 3 + 3 * 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_adan_clips_by_the_norm_over_all_groups_and_leaves_grad_alone():
    params = parameters()
    grads = [g.double().numpy() for g in gradients(0)]
    norm = math.sqrt(sum((g**2).sum() for g in grads))
    optimizer = Adan([{"params": params[:1]}, {"params": params[1:]}], max_grad_norm=norm / 4)
    run(optimizer, params, [0])
    for p, g, kept in zip(params, grads, gradients(0), strict=True):
        np.testing.assert_allclose(optimizer.state[p]["exp_avg"].numpy(), 0.02 * g / 4, rtol=1e-5)
        assert torch.equal(p.grad, kept)
    loose = parameters()
    unclipped = Adan(loose, max_grad_norm=norm * 4)
    run(unclipped, loose, [0])
    np.testing.assert_allclose(unclipped.state[loose[0]]["exp_avg"].numpy(), 0.02 * grads[0], rtol=1e-5)


@pytest.mark.parametrize("foreach", [True, False])
def test_adan_gradient_that_appears_late(foreach):
    late, early = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Adan([late, early], lr=0.1, foreach=foreach)
    for _ in range(2):
        early.grad = torch.ones(2)
        optimizer.step()
    assert late.tolist() == [1.0, 1.0]
    assert late not in optimizer.state
    late.grad = torch.full((2,), 3.0)
    optimizer.step()
    # k = 3 and D = 0: m = 0.02 * 3, v = 0.01 * 9.
    expected = 1 - 0.1 * (0.06 / (1 - 0.98**3)) / math.sqrt(0.09 / (1 - 0.99**3))
    torch.testing.assert_close(late.detach(), torch.full((2,), expected), rtol=1e-6, atol=0)
    assert optimizer.state[late]["exp_avg_diff"].tolist() == [0.0, 0.0]
    assert optimizer.state[late]["neg_pre_grad"].tolist() == [-3.0, -3.0]


def test_adan_resume_is_exact():
    straight = parameters()
    run(Adan(straight), straight, range(6))
    params = parameters()
    first = Adan(params)
    run(first, params, range(3))
    saved = copy.deepcopy(first.state_dict())
    assert saved["param_groups"][0]["step"] == 3
    assert set(saved["state"][0]) == {"exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"}
    second = Adan(params, lr=123.0)
    second.load_state_dict(saved)
    run(second, params, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, straight, strict=True))


def test_adan_closure_and_sparse():
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = Adan([p], lr=0.1)

    def closure():
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    torch.testing.assert_close(p.detach(), torch.tensor([1.9]))  # the first update is lr * sign(gradient)
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (1,), check_invariants=True)
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1.0},
        {"eps": -1e-8},
        {"betas": (0.9, 0.9)},
        {"betas": (0.9, 0.9, 1.0)},
        {"weight_decay": math.nan},
        {"max_grad_norm": -1.0},
    ],
)
def test_adan_hyperparameters_are_checked(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Adan(parameters(), **arguments)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Adan([{"params": parameters(), **arguments}])


def test_optimizers_by_name():
    assert set(OPTIMIZERS) == {"adan", "adamw"}
    adan = build_optimizer("adan", parameters(), 1e-4, weight_decay=0.02)
    assert isinstance(adan, Adan)
    assert (adan.param_groups[0]["lr"], adan.param_groups[0]["weight_decay"]) == (1e-4, 0.02)
    adamw = build_optimizer("adamw", parameters(), 1e-4, betas=(0.9, 0.95))
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["betas"]) == (1e-4, (0.9, 0.95))
    with pytest.raises(ValueError, match="adan, adamw"):
        build_optimizer("lion", parameters(), 1e-4)


def test_paper_schedule():
    def lr(step, **changes):
        return learning_rate(step, **{"schedule": "paper", "base_lr": 1e-3, **changes})

    assert lr(0) == 1e-3
    assert lr(1) == pytest.approx(1e-3 - 9.5e-4 / 400_000, rel=1e-12)
    assert lr(200_000) == pytest.approx(5.25e-4, rel=1e-12)
    assert lr(400_000) == pytest.approx(5e-5, rel=1e-12)
    assert lr(2_000_000) == lr(400_000)
    assert lr(50, base_lr=5e-4, final_lr=0.0, decay_steps=100) == pytest.approx(2.5e-4, rel=1e-12)


def test_cosine_schedule_is_that_of_torch():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1e-3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-5)
    for step in range(21):
        ours = learning_rate(step, schedule="cosine", base_lr=1e-3, final_lr=1e-5, decay_steps=20)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert learning_rate(99, schedule="cosine", base_lr=1e-3, final_lr=1e-5, decay_steps=20) == pytest.approx(1e-5)


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_warmup_scales_every_schedule(schedule):
    arguments = {"schedule": schedule, "base_lr": 1e-3, "decay_steps": 100}
    for step, factor in ((0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (300, 1.0)):
        plain = learning_rate(step, **arguments)
        assert learning_rate(step, **arguments, warmup_steps=10) == pytest.approx(factor * plain, rel=1e-12)
    assert learning_rate(300, **arguments) == pytest.approx(1e-3 if schedule == "constant" else 5e-5)


def test_bad_schedules():
    with pytest.raises(ValueError, match="paper, constant, cosine"):
        learning_rate(0, schedule="linear", base_lr=1e-3)
    for changes in ({"step": -1}, {"decay_steps": 0}, {"warmup_steps": -1}, {"base_lr": -1e-3}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            learning_rate(**{"step": 0, "schedule": "paper", "base_lr": 1e-3, **changes})
