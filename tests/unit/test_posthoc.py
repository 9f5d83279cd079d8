import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from scipy.integrate import quad
from torch import nn

from edt_diffusion.training.ema import EMAConfig, EMASet, PowerEMA
from edt_diffusion.training.posthoc import SnapshotStore, fit, reconstruct
from edt_diffusion.training.power import (
    power_decay,
    power_exponent,
    power_width,
    profile_products,
    solve_profile,
)
from edt_diffusion.util.errors import UserError

STEPS = 640


class Walker(nn.Module):
    """A parameter that walks at random around a large constant, and one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.walk = nn.Parameter(torch.full((64,), 5.0))
        self.still = nn.Parameter(torch.tensor([3.0, -7.0]))
        self.draws = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def move(self) -> None:
        self.walk += 0.05 * torch.randn(self.walk.shape, generator=self.draws)


def train(folder, every, widths=(0.05, 0.1), tracked=(), steps=STEPS, stop_at=None):
    """Walk, and keep snapshots; returns the averages of `tracked` widths at the end (or at `stop_at`)."""
    net = Walker()
    averages = EMASet(net, EMAConfig(power=widths))
    direct = {width: PowerEMA(net, width) for width in tracked}
    store = SnapshotStore(folder)
    kept = {}
    for step in range(1, steps + 1):
        net.move()
        averages.update(net)
        for average in direct.values():
            average.update(net)
        if step % every == 0:
            store.save(step, *averages.snapshot())
        if step == (stop_at or steps):
            kept = {width: average.state_dict()["parameters"]["walk"].clone() for width, average in direct.items()}
    return kept


def profile(gamma, length):
    return lambda s: (gamma + 1) * s**gamma / length ** (gamma + 1) if 0 < s <= length else 0.0


@given(gamma=st.floats(0.2, 200.0))
@settings(deadline=None)
def test_width_is_the_standard_deviation_of_the_profile(gamma):
    density = profile(gamma, 1.0)
    mean = quad(lambda s: s * density(s), 0, 1)[0]
    spread = math.sqrt(quad(lambda s: (s - mean) ** 2 * density(s), 0, 1)[0])
    assert power_width(gamma) == pytest.approx(spread, rel=1e-6)
    assert power_exponent(power_width(gamma)) == pytest.approx(gamma, rel=1e-6)


def test_exponents_of_the_paper():
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.005)  # arXiv 2312.02696, section 3.1
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.28, float("nan")])
def test_widths_out_of_range_are_refused(width):
    with pytest.raises(UserError, match=r"between 0 and 0\.28"):
        power_exponent(width)


def test_updates_have_the_weights_of_the_profile():
    """Update t weighs the integral of the profile from t - 1 to t."""
    gamma, length = power_exponent(0.1), 20
    weights = np.eye(length)[0] * 0
    for t in range(1, length + 1):
        keep = power_decay(gamma, t)
        weights *= keep
        weights[t - 1] += 1 - keep
    wanted = [quad(profile(gamma, length), t - 1, t)[0] for t in range(1, length + 1)]
    np.testing.assert_allclose(weights, wanted, rtol=1e-9)


def test_products_of_profiles_against_numerical_integration():
    gammas, times = np.array([0.5, 6.94, 16.97]), np.array([3.0, 10.0, 10.0])
    found = profile_products(gammas, times, gammas[::-1], times[::-1])
    for i in range(3):
        for j in range(3):
            one, other = profile(gammas[i], times[i]), profile(gammas[2 - j], times[2 - j])
            wanted = quad(lambda s: one(s) * other(s), 0, min(times[i], times[2 - j]))[0]  # noqa: B023
            assert found[i, j] == pytest.approx(wanted, rel=1e-8)


def test_fit_against_a_dense_solver():
    """The factors and the error are those of a constrained fit of profiles on a fine grid."""
    gammas = np.tile([power_exponent(0.05), power_exponent(0.1)], 4)
    times = np.repeat([2.0, 4.0, 6.0, 8.0], 2)
    gamma = power_exponent(0.17)
    factors, error = solve_profile(gammas, times, gamma, 8.0)
    middles = (np.arange(200_000) + 0.5) * (8.0 / 200_000)
    columns = np.stack([[g, t] for g, t in zip(gammas, times, strict=True)])
    table = np.stack([np.where(middles <= t, (g + 1) * middles**g / t ** (g + 1), 0) for g, t in columns], axis=1)
    wanted = (gamma + 1) * middles**gamma / 8.0 ** (gamma + 1)
    # The last factor is one minus the others: what is left is an unconstrained fit.
    rest = np.linalg.lstsq(table[:, :-1] - table[:, -1:], wanted - table[:, -1], rcond=None)[0]
    dense = np.append(rest, 1 - rest.sum())
    np.testing.assert_allclose(factors, dense, atol=1e-5)
    assert error == pytest.approx(np.linalg.norm(table @ dense - wanted) / np.linalg.norm(wanted), rel=1e-4)
    assert factors.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("width", [0.03, 0.075, 0.15, 0.22])
def test_reconstruction_against_the_average_itself(tmp_path, width):
    errors, fits = [], []
    for snapshots in (4, 32):
        folder = tmp_path / str(snapshots)
        direct = train(folder, STEPS // snapshots, tracked=(width,))[width]
        made = reconstruct(folder, width)
        spread = (direct - 5.0).norm()
        errors.append(float((made.parameters["walk"] - direct).norm() / spread))
        fits.append(made.fit_error)
        assert (made.step, made.snapshots) == (STEPS, snapshots)
        # What never changed is no combination's error.
        torch.testing.assert_close(made.parameters["still"], torch.tensor([3.0, -7.0]), rtol=1e-6, atol=0)
    assert errors[1] < 2e-3
    assert errors[1] < errors[0] / 5
    assert fits[1] < fits[0] / 5
    assert fits[1] < 0.02


def test_an_earlier_step_is_the_average_of_then(tmp_path):
    direct = train(tmp_path, 20, tracked=(0.075,), stop_at=320)[0.075]
    made = reconstruct(tmp_path, 0.075, 320)
    assert (made.step, made.snapshots) == (320, 16)
    assert float((made.parameters["walk"] - direct).norm() / (direct - 5.0).norm()) < 2e-3


def test_stored_averages_come_back_bit_for_bit(tmp_path):
    train(tmp_path, 20)
    for step in (20, 320, STEPS):
        for width in (0.05, 0.1):
            made = reconstruct(tmp_path, width, step)
            with safe_open(SnapshotStore(tmp_path).path(step), framework="pt") as file:
                assert torch.equal(made.parameters["walk"], file.get_tensor(f"ema-{width:.3f}.walk"))
            assert made.fit_error < 1e-7
            # No other snapshot is read for it.
            assert list(fit(SnapshotStore(tmp_path).snapshots(step), width)[0]) == [(step, width)]


def test_a_snapshot_says_what_it_holds_and_is_float32(tmp_path):
    net = Walker().to(torch.bfloat16)
    averages = EMASet(net, EMAConfig(power=(0.1, 0.0501)))
    for _ in range(3):
        averages.update(net)
    store = SnapshotStore(tmp_path / "ema")
    store.save(7, *averages.snapshot())
    facts = store.facts(7)
    assert (facts.step, facts.updates, facts.widths) == (7, 3, (0.1, 0.0501))
    with safe_open(store.path(7), framework="pt") as file:
        assert set(file.keys()) == {f"{group}.{name}" for group in ("ema-0.100", "ema-0.050")
                                    for name in ("walk", "still")}  # fmt: skip
        assert all(file.get_tensor(key).dtype == torch.float32 for key in file.keys())  # noqa: SIM118
    SnapshotStore(tmp_path / "none").save(7, 3, {})
    assert not (tmp_path / "none").exists()


def test_updates_not_steps_are_the_time(tmp_path):
    """A run that left steps out, or began counting elsewhere, has the averages of its updates."""
    train(tmp_path / "a", 20)
    shifted = SnapshotStore(tmp_path / "b")
    for step in SnapshotStore(tmp_path / "a").steps():
        shifted.folder.mkdir(exist_ok=True)
        shifted.path(3 * step + 1000).write_bytes(SnapshotStore(tmp_path / "a").path(step).read_bytes())
    one, other = reconstruct(tmp_path / "a", 0.15), reconstruct(tmp_path / "b", 0.15)
    assert torch.equal(one.parameters["walk"], other.parameters["walk"])
    assert other.step == 3 * STEPS + 1000


def test_a_left_future_is_dropped(tmp_path):
    train(tmp_path, 20, steps=100)
    store = SnapshotStore(tmp_path)
    left = tmp_path / ".step-00000120.safetensors.0123456789abcdef.tmp"
    left.write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    store.drop_after(60)
    assert store.steps() == [20, 40, 60]
    assert not left.exists()
    assert (tmp_path / "notes.txt").exists()
    SnapshotStore(tmp_path / "none").drop_after(0)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no snapshots.*ema\.power=\[0\.05,0\.10\]"):
        reconstruct(tmp_path / "none", 0.1)
    train(tmp_path, 20, widths=(0.05,), steps=60)
    with pytest.raises(UserError, match=r"one width \(0\.05\) only"):
        reconstruct(tmp_path, 0.1)
    assert reconstruct(tmp_path, 0.05).fit_error < 1e-7
    with pytest.raises(UserError, match="step 80 is not reached: the newest snapshot is of step 60"):
        reconstruct(tmp_path, 0.05, 80)
    with pytest.raises(UserError, match="step 35 has no snapshot: the nearest one is of step 40"):
        reconstruct(tmp_path, 0.05, 35)
    with pytest.raises(UserError, match=r"width 0\.3"):
        reconstruct(tmp_path, 0.3)
    path = SnapshotStore(tmp_path).path(40)
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match=r"step-00000040\.safetensors is no whole snapshot"):
        reconstruct(tmp_path, 0.05)


def test_a_snapshot_of_another_model_is_refused(tmp_path):
    train(tmp_path, 20, steps=60)
    SnapshotStore(tmp_path).save(40, 40, {0.05: {"walk": torch.zeros(3)}, 0.1: {"walk": torch.zeros(3)}})
    with pytest.raises(UserError, match=r"step-00000040\.safetensors does not fit the other snapshots"):
        reconstruct(tmp_path, 0.2)
