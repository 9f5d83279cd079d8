"""The benchmark of equal seconds: what is compared is as said, and the page says what is there."""

import argparse

import pytest
from benchmark_scripts import benchmark

from edt_diffusion.models import BACKBONES
from edt_diffusion.studies.matrix import Results


@pytest.fixture(scope="module")
def bench():
    with benchmark("equal_seconds") as module:
        yield module


@pytest.fixture
def options() -> argparse.Namespace:
    return argparse.Namespace(
        train="train.parquet", test="test.parquet", extractor="net.ts", budget="10m-cpu", seeds=3, processes=2,
        threads=1, images=1000, only="backbones,masks", lr=2e-3, rates="2e-3,4e-3", trial="60s-cpu", precision="no",
    )  # fmt: skip


def test_the_networks_have_as_many_parameters_in_use_when_they_sample(bench):
    used = {}
    for arm in bench.ARMS:
        arguments = dict(arm.settings["model"])
        network = BACKBONES[arguments.pop("name")](sample_size=16, in_channels=3, num_classes=10, **arguments)
        idle = set(network.masked_only())
        used[arm.name] = sum(p.numel() for name, p in network.named_parameters() if name not in idle)
    assert max(used.values()) <= 1.02 * min(used.values())
    assert used["edt"] == used["edt-nomask"] == used["edt-mdtmask"]


def test_arms_differ_in_network_and_masks_alone(bench, options):
    asked = bench.matrix(options, list(bench.ARMS), "10m-cpu", 3)
    whole = {arm.name: asked.config(arm, 0).model_dump(mode="json") for arm in asked.arms}
    for told in whole.values():
        told.pop("model")
        told["objective"].pop("passes")
        told["objective"].pop("masks")
    assert all(told == whole["edt"] for told in whole.values())
    assert whole["edt"]["data"]["workers"] == 0


def test_the_page_says_what_was_run_and_what_may_be_wrong_with_it(bench, options, tmp_path):
    asked = bench.matrix(options, list(bench.ARMS[:2]), "10m-cpu", 2, points=(1.0,), images=1000)
    values = {"edt": (6.0, 7.0), "dit": (5.0, 6.5)}
    records = [
        {"arm": arm, "seed": seed, "point": 1.0, "variant": "plain", "metrics": {"fid": value}}
        for arm, pair in values.items() for seed, value in enumerate(pair)
    ]  # fmt: skip
    done = {
        f"{arm}-seed{seed}": {
            "parameters": 2_000_000,
            "steps": 1900 + 100 * seed,
            "charged_wall_seconds": 605.2 + 90 * seed,
            "threads": 1,
        }
        for arm in values
        for seed in (0, 1)
    }
    for name in done:
        folder = tmp_path / "points" / f"{name}-1"
        folder.mkdir(parents=True)
        (folder / "point.json").write_text(
            '{"step": 1950, "images": 120000, "charged_wall_seconds": 700, "charged_cpu_seconds": 600}'
        )
    trial = {
        "budget": "60s-cpu",
        "distances": {"edt": {"0.001": 9.0, "0.002": 6.5, "0.004": 7.0}, "dit": {"0.002": 6.7, "0.004": 6.3}},
        "chosen": {"edt": 0.002, "dit": 0.004},
    }
    results = Results(tmp_path, asked, records, done, ["mdt-seed0-1-plain"])
    page = bench.page(results, trial, options)
    # Multiply-adds: see test_baseline_models and test_reproduce_costs for their count.
    assert (
        "| EDT, its masks | 2,000,000 | 36.4 M x 2 | 1900 to 2000 | 605 to 695 | 200 | 6.500 (0.147 to 12.853) |  |"
        in page
    )
    assert (
        "| DiT | 2,000,000 | 95.3 M x 1 | 1900 to 2000 | 605 to 695 | 200 | 5.750 (-3.780 to 15.280) | -0.750" in page
    )
    assert "the lowest or the highest tried for dit:" in page
    assert "Missing: mdt-seed0-1-plain." in page
    command = bench.command(options)
    assert "--rates 2e-3,4e-3 --trial 60s-cpu" in command
    assert "train.parquet" not in command
