"""The benchmark of a training step: the plain step is the same step, and every part runs."""

import contextlib
import io
import json
import math
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_scripts import FOLDER, benchmark

SCRIPT = FOLDER / "training_step.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    with benchmark("training_step") as module:
        yield module


def sides(bench: ModuleType) -> tuple[Any, Any, Any]:
    """The plain step, ours, and a batch."""
    model = bench.build_network("tiny")
    plain, ours = bench.Plain(model, CPU), bench.Ours("tiny", model, CPU)
    return plain, ours, ours.batches(1, 4)[0]


def test_the_plain_step_has_our_loss_gradients_update_and_average(bench, monkeypatch):
    monkeypatch.setattr(bench, "DECAY", 0.5)  # moves far enough to be seen
    plain, ours, batch = sides(bench)
    for joint in (False, True):
        errors = bench.check_equal(plain, ours, batch, joint, strict=True)
        assert errors["fp32_loss_error"] < 1e-6
        assert errors["fp32_gradient_error"] < 1e-5
        assert 1e-6 < errors["bf16_gradient_error"] < 0.05  # bfloat16 has 8 bits
    assert not all(mask.all() for mask in batch.draws.passes[1].masks.down)

    before = bench.to_official(ours.model)
    for each in ours.batches(3, 4):  # the difference of gradients counts from the second update on
        plain.step(each)
        ours.step(each)
    for found, expected in (
        (bench.to_official(ours.model), dict(plain.net.named_parameters())),
        (bench.to_theirs(bench.key_map(bench.TINY["depths"]), averages(ours)), plain.average),
    ):
        # The updates themselves agree, not only the weights that they hardly change. The softmax cancels the bias of
        # the keys, whose gradients are rounding errors that Adan makes as large as any.
        names = [name for name in expected if not name.endswith("qkv.bias")]
        moved = {name: expected[name].detach() - before[name] for name in names}
        ours_moved = {name: found[name] - before[name] for name in names}
        assert bench.relative(ours_moved, moved) < 0.01


def averages(ours: Any) -> dict[str, torch.Tensor]:
    return {**ours.model.state_dict(), **ours.ema.main.state_dict()["parameters"]}


@pytest.mark.parametrize("part", ["plain", "ours"])
def test_a_difference_between_the_steps_is_refused(bench, part):
    plain, ours, batch = sides(bench)
    with torch.no_grad():
        if part == "plain":
            plain.net.blocks[0].attn.rel_pos_bias["relative_position_bias_table"].normal_()
        else:
            ours.model.norm_out.modulation.linear.bias.add_(0.01)
    with pytest.raises(AssertionError, match="fp32_gradient_error"):
        bench.check_equal(plain, ours, batch, False, strict=True)


def test_every_figure_is_told_with_its_goal(bench, tmp_path):
    told = tmp_path / "told.json"
    bench.main([
        "--size", "tiny", "--batch", "2", "--repeats", "3", "--windows", "1", "--device", "cpu",
        "--only", "fp32,bf16,passes,overhead", "--json", str(told),
    ])  # fmt: skip
    results = json.loads(told.read_text())
    assert results["machine"]["threads"] == 1
    assert results["machine"]["torch"] == torch.__version__
    assert set(results["step_seconds"]) == {"plain", "fp32", "fp32 joint", "bf16", "bf16 joint"}
    for name in ("fp32_speedup", "bf16_speedup", "joint_speedup_fp32", "joint_speedup_bf16", "engine_overhead"):
        low, high = results["spread"][name]
        assert low <= results[name] <= high
        assert math.isfinite(results[name])
    assert results["engine_overhead"] > -1
    assert results["engine_overhead_bf16"] > -1
    for name, better in (("fp32_speedup", True), ("bf16_speedup", True), ("engine_overhead", False)):
        sign, bound = bench.GOALS[name]
        assert results["goals"][name] == {
            "goal": f"{sign} {bound}",
            "reached": (results[name] >= bound) if better else (results[name] < bound),
        }


def test_steps_are_timed_in_turn(bench):
    made: list[tuple[str, int]] = []
    steps = {name: lambda repeat, name=name: made.append((name, repeat)) for name in "abc"}
    seconds = bench.interleaved(steps, 3, CPU)
    assert "".join(name for name, _ in made) == "abc" + "abc" + "bca" + "cab"
    assert [repeat for _, repeat in made] == [0, 0, 0] + [0] * 3 + [1] * 3 + [2] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_part_for_gpus_runs_on_a_cpu(bench, monkeypatch):
    monkeypatch.setattr(bench, "WINDOW_SECONDS", 0.05)
    results = bench.main([
        "--only", "gpu", "--gpu-sizes", "tiny", "--largest-batch", "2", "--repeats", "2", "--device", "cpu",
    ])["gpu"]["tiny"]  # fmt: skip
    assert results["batch"] == results["plain_batch"] == 2
    assert results["speedup"] == results["images_per_second"] / results["plain_images_per_second"]
    model = bench.build_network("tiny")
    per_image = 2 * 3 * 2 * sum(model.multiply_adds().values())  # two passes, backward twice the forward
    achieved = results["images_per_second"] * per_image
    assert results["utilisation"] == pytest.approx(achieved / (results["matmul_peak_tflops"] * 1e12))


def test_memory_that_checkpointing_saves_is_what_the_estimate_says(bench, monkeypatch):
    def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """Instead of the fresh process, whose imports take longer than the measurement."""
        assert command[:2] == [sys.executable, str(SCRIPT)]
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            bench.main(command[2:])
        return subprocess.CompletedProcess(command, 0, told.getvalue(), "")

    monkeypatch.setattr(bench.subprocess, "run", run_here)
    results: dict[str, Any] = {}
    bench.memory(
        results, bench.parse_arguments(["--size", "tiny", "--batch", "64", "--device", "cpu", "--only", "memory"]), CPU
    )
    none, every, two = (results["memory"][name] for name in ("none", "all stages", "stages 0 and 4"))
    for less in (every, two):
        saved = none["peak_mib"] - less["peak_mib"]
        # What the estimate leaves out, the losses' own tensors, is the same with and without.
        assert saved == pytest.approx(none["estimated_mib"] - less["estimated_mib"], rel=0.5)
    assert results["checkpointing_saves"] == 1 - every["peak_mib"] / none["peak_mib"]
    assert results["checkpointing_saves_two_stages"] == 1 - two["peak_mib"] / none["peak_mib"]
