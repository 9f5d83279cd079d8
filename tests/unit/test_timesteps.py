from collections import deque

import numpy as np
import pytest

from edt_diffusion.objectives import TIMESTEP_SAMPLERS, LossSecondMomentTimesteps, UniformTimesteps


def queues_weights(queues: list[deque], history: int, uniform_prob: float) -> np.ndarray:
    """The published rule, on one queue per timestep."""
    if any(len(queue) < history for queue in queues):
        return np.ones(len(queues))
    w = np.sqrt([np.mean(np.array(queue) ** 2) for queue in queues])
    return w / w.sum() * (1 - uniform_prob) + uniform_prob / len(queues)


def test_vectorised_update_equals_one_queue_per_timestep():
    rng = np.random.default_rng(0)
    sampler = LossSecondMomentTimesteps(5, history=3, uniform_prob=0.01)
    queues = [deque(maxlen=3) for _ in range(5)]
    left_warm_up = 0
    for _ in range(40):
        size = int(rng.integers(0, 30))  # up to 30 losses over 5 timesteps: more repeats than the history holds
        t, losses = rng.integers(0, 5, size), rng.exponential(size=size)
        sampler.update(t, losses)
        for step, loss in zip(t, losses, strict=True):
            queues[step].append(loss)
        expected = queues_weights(queues, 3, 0.01)
        np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-14)
        left_warm_up += expected[0] != 1.0
    assert left_warm_up > 20


def test_uniform_until_every_timestep_has_its_history():
    sampler = LossSecondMomentTimesteps(2, history=2, uniform_prob=0.0)
    sampler.update([0, 0, 0, 1], [5.0, 3.0, 4.0, 1.0])
    assert sampler.weights().tolist() == [1.0, 1.0]
    t, weight = sampler.draw([0.1, 0.6])
    assert (t.tolist(), weight.tolist()) == ([0, 1], [1.0, 1.0])
    sampler.update([1], [7.0])
    root0, root1 = np.sqrt((3**2 + 4**2) / 2), np.sqrt((1**2 + 7**2) / 2)  # the 5 has left the queue
    np.testing.assert_allclose(sampler.weights(), np.array([root0, root1]) / (root0 + root1), rtol=1e-14)


@pytest.mark.parametrize("seed", [0, 1])
def test_draw_equals_numpy_choice(seed):
    rng = np.random.default_rng(seed)
    sampler = LossSecondMomentTimesteps(20, history=1)
    sampler.update(np.arange(20), rng.exponential(size=20))
    p = sampler.weights() / sampler.weights().sum()
    u = np.random.RandomState(seed).random_sample(200)
    t, weight = sampler.draw(u)
    np.testing.assert_array_equal(t, np.random.RandomState(seed).choice(20, size=200, p=p))
    np.testing.assert_allclose(weight, 1 / (20 * p[t]), rtol=1e-6)
    assert (t.dtype, weight.dtype) == (np.int64, np.float32)


def test_importance_weights_keep_the_expectation():
    losses = np.random.default_rng(3).exponential(size=50)
    sampler = LossSecondMomentTimesteps(50, history=1)
    sampler.update(np.arange(50), losses)
    t, weight = sampler.draw((np.arange(200_000) + 0.5) / 200_000)
    assert np.mean(weight * losses[t]) == pytest.approx(losses.mean(), rel=1e-3)
    # Proportional sampling makes weight * loss nearly constant: that is what it is for.
    assert np.std(weight * losses[t]) < 0.05 * np.std(losses)


def test_non_finite_losses_are_ignored_and_counted():
    clean, dirty = LossSecondMomentTimesteps(3, history=2), LossSecondMomentTimesteps(3, history=2)
    t = [0, 1, 2, 0, 1, 2]
    clean.update(t, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    dirty.update([0, *t, 1, 2], [np.nan, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, np.inf, -np.inf])
    assert (clean.rejected, dirty.rejected) == (0, 3)
    np.testing.assert_array_equal(dirty.weights(), clean.weights())
    assert clean.weights()[0] != 1.0


def remembering(count: int = 50, history: int = 10) -> LossSecondMomentTimesteps:
    sampler = LossSecondMomentTimesteps(count, history=history)
    rng = np.random.default_rng(0)
    sampler.update(np.tile(np.arange(count), history), rng.exponential(size=count * history) + 0.1)
    return sampler


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30, 3e38])
def test_one_poisoned_loss_leaves_every_probability_as_it_was(poison):
    sampler = remembering()
    before = sampler.weights()
    assert before.std() > 0
    sampler.update([7], [poison])
    np.testing.assert_array_equal(sampler.weights(), before)
    sampler.update([7, 8, 9], [0.5, poison, 0.6])  # neighbours in the batch are learned from
    assert sampler.rejected == 2
    clean = remembering()
    clean.update([7, 9], [0.5, 0.6])
    np.testing.assert_array_equal(sampler.weights(), clean.weights())


def test_what_an_outlier_is():
    """More than 1000 times the mean of at least 100 remembered losses."""
    sampler = LossSecondMomentTimesteps(20, history=10)
    sampler.update(np.arange(99) % 20, np.full(99, 2.0))
    sampler.update([0], [1e6])  # only 99 are remembered: nobody knows what is usual
    assert sampler.rejected == 0
    sampler = LossSecondMomentTimesteps(20, history=10)
    sampler.update(np.arange(100) % 20, np.full(100, 2.0))
    sampler.update([0, 1], [1999.0, 2001.0])
    assert sampler.rejected == 1
    sampler = LossSecondMomentTimesteps(10, history=10)
    sampler.update(np.arange(100) % 10, np.zeros(100))
    sampler.update([0], [1.0])  # of zero, everything is a multiple too large
    assert sampler.rejected == 0


def test_a_loss_that_grows_is_followed():
    sampler = remembering()
    for scale in (10.0, 300.0, 9000.0):
        sampler.update(np.tile(np.arange(50), 10), np.full(500, scale))
    assert sampler.rejected == 0
    np.testing.assert_allclose(sampler.weights(), 1 / 50)


def test_all_losses_zero_is_uniform():
    sampler = LossSecondMomentTimesteps(3, history=1)
    sampler.update([0, 1, 2], [0.0, 0.0, 0.0])
    assert sampler.draw([0.0, 0.5, 0.99])[0].tolist() == [0, 1, 2]


def test_resume_continues_exactly():
    rng = np.random.default_rng(5)
    rounds = [(rng.integers(0, 4, 7), rng.exponential(size=7)) for _ in range(30)]
    straight, first = LossSecondMomentTimesteps(4, history=3), LossSecondMomentTimesteps(4, history=3)
    for t, losses in rounds:
        straight.update(t, losses)
    for t, losses in rounds[:17]:
        first.update(t, losses)
    first.update([0], [np.nan])
    state = first.state_dict()
    assert all(isinstance(value, int | np.ndarray) for value in state.values())
    first.update([0], [1e6])  # the saved state must not follow
    second = LossSecondMomentTimesteps(4, history=3)
    second.load_state_dict(state)
    for t, losses in rounds[17:]:
        second.update(t, losses)
    np.testing.assert_array_equal(second.weights(), straight.weights())
    assert second.rejected == 1
    assert straight.weights()[0] != 1.0


def test_uniform():
    sampler = UniformTimesteps(1000)
    u = np.array([0.0, 0.25, 0.9996, np.nextafter(1.0, 0.0)])
    sampler.update([3], [1e9])
    t, weight = sampler.draw(u)
    assert t.tolist() == [0, 250, 999, 999]
    assert (weight.tolist(), weight.dtype, t.dtype) == ([1.0] * 4, np.float32, np.int64)
    sampler.load_state_dict(sampler.state_dict())


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
@pytest.mark.parametrize("u", [[1.0], [-0.1], [np.nan]])
def test_uniforms_out_of_range(name, u):
    with pytest.raises(ValueError, match=r"expected uniforms in \[0, 1\)"):
        TIMESTEP_SAMPLERS[name](10).draw(u)


def test_states_of_other_samplers_are_refused():
    moment = LossSecondMomentTimesteps(10, history=3)
    with pytest.raises(ValueError, match="another kind"):
        moment.load_state_dict(UniformTimesteps(10).state_dict())
    with pytest.raises(ValueError, match="num_timesteps = 9"):
        moment.load_state_dict(LossSecondMomentTimesteps(9, history=3).state_dict())
    with pytest.raises(ValueError, match="history = 4"):
        moment.load_state_dict(LossSecondMomentTimesteps(10, history=4).state_dict())
    with pytest.raises(ValueError, match="damaged"):
        moment.load_state_dict({**moment.state_dict(), "seen": np.zeros(3)})
    with pytest.raises(ValueError, match="num_timesteps = 10"):
        UniformTimesteps(9).load_state_dict(UniformTimesteps(10).state_dict())


def test_bad_updates_and_arguments():
    sampler = LossSecondMomentTimesteps(10)
    with pytest.raises(ValueError, match=r"0\.\.9"):
        sampler.update([10], [1.0])
    with pytest.raises(ValueError, match=r"0\.\.9"):
        sampler.update([-1], [1.0])
    with pytest.raises(ValueError, match="two vectors"):
        sampler.update([1, 2], [1.0])
    with pytest.raises(ValueError, match="history = 0"):
        LossSecondMomentTimesteps(10, history=0)
    with pytest.raises(ValueError, match="uniform_prob"):
        LossSecondMomentTimesteps(10, uniform_prob=1.5)
    with pytest.raises(ValueError, match="num_timesteps = 0"):
        UniformTimesteps(0)
