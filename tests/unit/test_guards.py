"""Which steps are left out, when a run goes back, and what a loss spike is."""

import math

import numpy as np
import pytest

from edt_diffusion.training.guards import Guards, GuardSettings, SpikeDetector, Verdict, diverged


def judged(guards: Guards, loss: float, norm: float = 1.0):
    return guards.judge(np.array([loss, 1.0]), np.array([norm]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out(bad):
    guards = Guards(GuardSettings())
    assert judged(guards, 1.0).apply
    verdict = judged(guards, bad)
    assert (verdict.apply, verdict.problem) == (False, f"the loss became {bad}")
    verdict = judged(guards, 1.0, norm=bad)
    assert (verdict.apply, verdict.problem) == (False, f"the gradient norm became {bad}")


def test_bad_steps_count_in_a_row():
    guards = Guards(GuardSettings(max_skipped=3))
    good, bad = judged(guards, 1.0), judged(guards, math.nan)
    assert [guards.count(v) for v in (bad, bad, good, bad, bad, bad)] == [False] * 5 + [True]
    assert (guards.skipped, guards.in_row) == (5, 3)


def test_what_the_loss_scaler_leaves_out_is_neither_good_nor_bad():
    guards = Guards(GuardSettings(max_skipped=3))
    bad = judged(guards, math.nan)
    assert [guards.count(v) for v in (bad, Verdict(False), bad, Verdict(False))] == [False] * 4
    assert (guards.skipped, guards.in_row) == (2, 2)


def test_returns_lower_the_rate_and_come_to_an_end():
    guards = Guards(GuardSettings(max_rollbacks=2, rollback_rate=0.25))
    assert [guards.go_back() for _ in range(3)] == [True, True, False]
    assert guards.rate_factor == 0.25**3
    assert guards.in_row == 0


def test_a_spike_lies_ten_robust_deviations_above_the_median():
    detector = SpikeDetector(threshold=10.0, window=100, least=50)
    # ln(loss) takes the values -0.1, 0, 0.1 alike often: median 0, median absolute deviation 0.1.
    for index in range(99):
        assert not detector.is_spike(1000.0)  # too few steps seen, or not a spike below
        if index >= 49:
            break
        detector.remember(math.exp((index % 3 - 1) / 10))
    for index in range(49, 99):
        detector.remember(math.exp((index % 3 - 1) / 10))
    limit = math.exp(10.0 * 1.4826 * 0.1)
    assert detector.is_spike(limit * 1.001)
    assert not detector.is_spike(limit * 0.999)
    assert not detector.is_spike(0.001)  # far below is welcome


def test_equal_losses_make_no_spike_of_the_next_digit():
    detector = SpikeDetector(threshold=10.0)
    for _ in range(100):
        detector.remember(0.5)
    assert not detector.is_spike(0.5 * math.exp(0.099))
    assert detector.is_spike(0.5 * math.exp(0.101))


@pytest.mark.parametrize(("action", "applied", "spikes"), [("warn", True, 1), ("skip", False, 1), ("off", True, 0)])
def test_what_is_done_about_a_spike(action, applied, spikes):
    guards = Guards(GuardSettings(spikes=action))
    losses = np.random.default_rng(0).uniform(0.9, 1.1, 100)
    for loss in losses:
        assert guards.judge(np.array([loss]), np.ones(1)).problem is None
    verdict = guards.judge(np.array([50.0]), np.ones(1))
    assert verdict.apply is applied
    assert guards.spikes == spikes
    assert verdict.problem == (None if action == "off" else "the loss jumped to 50")


def test_a_resumed_run_judges_as_the_uninterrupted_one():
    guards = Guards(GuardSettings(spikes="skip"))
    for loss in np.random.default_rng(0).uniform(0.9, 1.1, 100):
        guards.count(guards.judge(np.array([loss]), np.ones(1)))
    guards.count(judged(guards, math.nan))
    guards.go_back()
    other = Guards(GuardSettings(spikes="skip"))
    other.load(guards.state())
    assert other.state() == guards.state()
    for loss in (1.0, 1.3, 2.0, 3.0, 10.0):
        assert other.judge(np.array([loss]), np.ones(1)) == guards.judge(np.array([loss]), np.ones(1))
    fresh = Guards(GuardSettings())
    fresh.load({})  # a checkpoint of an older version
    assert fresh.state() == Guards(GuardSettings()).state()


def test_the_error_names_what_can_be_done():
    text = str(diverged("the loss became nan", 7, 0.1, 0.0, 5, 3))
    assert text == (
        "the loss became nan at step 7, after 3 returns to the last good state: lower optimizer.lr (now 0.1) or set "
        "train.max_grad_norm; the last checkpoint of the run is step 5"
    )
    assert "lower train.max_grad_norm (now 2)" in str(diverged("x", 1, 0.1, 2.0, 0, 0))
    assert str(diverged("x", 1, 0.1, 2.0, 0, 0)).endswith("the run has no checkpoint yet")
