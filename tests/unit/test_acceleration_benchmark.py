"""The benchmark of accelerations: its arithmetic, its committed table and model, and one small real run."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.pipelines.acceleration import ACCELERATIONS
from edt_diffusion.pipelines.schedulers import make_scheduler

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
acceleration = pytest.importorskip("acceleration", reason="benchmarks/ is not part of the source distribution")
compact_model = pytest.importorskip("compact_model")


@pytest.fixture(scope="module")
def table() -> dict:
    return json.loads(acceleration.TABLE.read_text())


# ---- the committed model ----


def test_rounded_weights_against_numpy(tmp_path):
    network = tiny_model(num_classes=10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    pipeline = ClassConditionalPipeline(network, make_scheduler("ddpm"), class_names=[f"c{i}" for i in range(10)])
    pipeline.save_pretrained(tmp_path / "whole")
    size = compact_model.write_compact(tmp_path / "whole", tmp_path / "small")
    assert size < 0.5 * sum(file.stat().st_size for file in (tmp_path / "whole").rglob("*") if file.is_file())
    assert compact_model.is_compact(tmp_path / "small")
    assert not compact_model.is_compact(tmp_path / "whole")
    back = compact_model.read_compact(tmp_path / "small")
    assert back.class_names == pipeline.class_names
    for name, value in pipeline.scheduler.config.items():
        assert name.startswith("_") or back.scheduler.config[name] == value
    for (name, ours), theirs in zip(network.state_dict().items(), back.transformer.state_dict().values(), strict=True):
        ours, theirs = ours.double().numpy(), theirs.double().numpy()
        if name.endswith("weight") and ours.ndim == 2:
            step = np.abs(ours).max(1, keepdims=True) / 127
            assert (np.abs(ours - theirs) <= step * 0.5001).all(), name
            assert np.allclose(theirs / step, np.round(theirs / step), atol=1e-4), name
        else:
            assert (theirs == ours.astype(np.float16).astype(np.float64)).all(), name


def test_the_committed_model_is_small_and_whole():
    assert sum(file.stat().st_size for file in acceleration.MODEL.iterdir()) < 10e6
    pipeline = acceleration.open_model(acceleration.MODEL)
    assert len(pipeline.class_names) == 10
    assert all(parameter.isfinite().all() for parameter in pipeline.transformer.parameters())


# ---- the committed table ----


def test_the_table_says_what_its_rows_say(table):
    again = json.loads(json.dumps(table))
    acceleration.conclude(again)
    assert again == table
    fitting = [row["speedup"] for row in table["rows"].values() if "ratio" in row and row["ratio_interval"][1] <= 1.05]
    assert table["best_speedup_within_5pct"] == max(fitting)
    assert table["samples"] >= 5000
    assert table["rows"]["ddpm/250/none"]["recognised"] >= 0.5 * table["recognised_of_real"]


def test_accelerations_are_within_five_percent_in_the_table(table):
    for name in ("balanced", "fast"):
        chosen = ACCELERATIONS[name]["stepped"]
        row = table["rows"][f"{chosen.scheduler}/{chosen.steps}/{chosen.cache}"]
        assert row["within_5pct"]


# ---- arithmetic ----


def gaussian_features(mean: float, deviation: float, count: int = 4000) -> FeatureSet:
    """Features whose mean and covariance are exactly those asked for, so that the distance is a closed form."""
    x = np.random.default_rng(0).standard_normal((count, 3))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    x = x * deviation + mean
    labels = np.arange(count) % 10
    logits = np.eye(10)[labels].astype(np.float32)
    return FeatureSet(GaussianStatistics.of(x), x.astype(np.float32), logits, None, labels, stratified=True)


def test_quality_is_a_ratio_of_frechet_distances():
    """d^2 = 3 (mean^2 + (deviation - 1)^2) to the standard normal."""
    found = {
        "ddpm/250/none": gaussian_features(0.5, 1.0),
        "same": gaussian_features(0.5, 1.0),
        "better": gaussian_features(0.4, 1.0),
        "worse": gaussian_features(0.5, 1.5),
    }
    rows = acceleration.quality(found, gaussian_features(0.0, 1.0), ["same", "better", "worse"], np.arange(4000) % 10)
    assert rows["ddpm/250/none"]["distance"] == pytest.approx(0.75, rel=1e-4)
    assert rows["same"]["ratio"] == pytest.approx(1.0)
    assert rows["better"]["ratio"] == pytest.approx(0.64, rel=1e-4)
    assert rows["worse"]["ratio"] == pytest.approx(2.0, rel=1e-4)
    assert [rows[name]["within_5pct"] for name in ("same", "better", "worse")] == [True, True, False]
    assert all(row["recognised"] == 1.0 for row in rows.values())


def test_the_winner_is_the_fastest_within_the_bound():
    rows = {
        "ddpm/250/none": {"recognised": 0.6},
        "ddim/20/none": {"speedup": 12.0, "within_5pct": True},
        "ddim/20/fora": {"speedup": 18.0, "within_5pct": True},
        "ddim/20/delta": {"speedup": 30.0, "within_5pct": False},
        "ddim/10/none": {"speedup": 25.0},
    }
    table = {"rows": rows, "baseline": "ddpm/250/none", "recognised_of_real": 0.9}
    acceleration.conclude(table)
    assert (table["winner"], table["best_speedup_within_5pct"], table["goal_met"]) == ("ddim/20/fora", 18.0, True)
    assert rows["ddim/20/fora"]["gain_of_cache"] == 1.5
    assert table["recognised_share_of_real"] == pytest.approx(2 / 3)
    rows["ddim/20/none"]["within_5pct"] = rows["ddim/20/fora"]["within_5pct"] = False
    acceleration.conclude(table)
    assert (table["winner"], table["best_speedup_within_5pct"], table["goal_met"]) == (None, None, False)


# ---- a small real run ----


def test_parts_are_made_once_and_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(acceleration, "PART", 4)
    pipeline = ClassConditionalPipeline(
        tiny_model(num_classes=10, sample_size=8, in_channels=3, patch_size=1), make_scheduler("ddpm", clip_sample=True)
    )
    pipeline.set_progress_bar_config(disable=True)
    options = argparse.Namespace(number=10, guidance=2.0, precision="fp32", batch=4)
    samples = acceleration.samples_of(pipeline, ("ddim", 3, "none"), options)
    whole = acceleration.pictures(samples, tmp_path, "ddim/3/none", 10)
    assert whole.shape == (10, 8, 8, 3)
    made, plain = [], samples.make
    monkeypatch.setattr(samples, "make", lambda start, stop: (made.append((start, stop)), plain(start, stop))[1])
    (tmp_path / "ddim_3_none" / "00004.npy").unlink()
    assert (acceleration.pictures(samples, tmp_path, "ddim/3/none", 10) == whole).all()
    assert made == [(4, 8)]


def test_a_stretch_is_scaled_to_all_steps(monkeypatch):
    """With a clock that counts network passes, 3 of 12 steps scaled are 12."""
    pipeline = ClassConditionalPipeline(tiny_model(num_classes=10), make_scheduler("ddpm"))
    pipeline.set_progress_bar_config(disable=True)
    options = argparse.Namespace(number=4, guidance=1.0, precision="fp32", batch=4)
    samples = acceleration.samples_of(pipeline, ("ddpm", 12, "none"), options)
    passes = [0]
    pipeline.transformer.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    monkeypatch.setattr(acceleration.time, "perf_counter", lambda: float(passes[0]))
    assert acceleration.seconds_of(samples, samples.setting, 12) == 12
    passes[0] = 0
    assert acceleration.seconds_of(samples, samples.setting, 12, only=3) == 12
    assert passes[0] == 3
    twice = acceleration.samples_of(pipeline, ("ddpm", 6, "none"), options)
    assert acceleration.speed_up(samples, twice, rounds=2, stretch=3)["speedup"] == pytest.approx(2.0)
