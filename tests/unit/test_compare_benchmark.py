"""The comparison of the three networks: what is counted and timed is what is said."""

import contextlib
import io
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from benchmark_scripts import FOLDER, benchmark

from edt_diffusion.models.masking import MaskPlan
from edt_diffusion.nn import attention
from edt_diffusion.profiling.counting import counting
from edt_diffusion.profiling.side_by_side import Timings

SCRIPT = FOLDER / "compare.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    with benchmark("compare") as module:
        yield module


def test_every_figure_is_told(bench, tmp_path):
    file = tmp_path / "compare.json"
    told = bench.main([
        "--sizes", "tiny", "--pixels", "128", "--threads", "1", "--batch", "2", "--train-batch", "2", "--repeats", "3",
        "--train-repeats", "2", "--parts", "counts,forward,train", "--json", str(file),
    ])  # fmt: skip
    assert json.loads(file.read_text()) == told
    figures = [f"forward_{name}_tiny_over_edt_tiny" for name in ("dit", "mdtv2")]
    trained = [f"train_{name}_tiny_over_edt_tiny" for name in ("edt_star", "dit", "mdtv2")]
    figures += [*trained, *(f"{name}_passes" for name in trained)]
    assert set(figures) == set(told["spread"])
    for name in figures:
        low, high = told["spread"][name]
        assert 0 < low <= told[name] <= high
    for recipe in bench.RECIPES:
        assert 0 < told["seconds"][f"train {recipe} tiny"]["share of the update"] < 1
    assert told["forms"]["forward mdtv2 tiny"] == {"sdpa": 4}
    assert told["forms"]["train dit tiny"] == {"sdpa": 2}  # without a position bias that wants gradients
    assert told["forms"]["train edt tiny"] == {"explicit": 10}  # five blocks, two passes
    assert told["forms"]["train mdtv2 tiny"] == {"explicit": 9}  # four blocks twice, and the side interpolater's
    assert told["goals"] == {}
    assert told["settings"]["train_batch"] == 2


def test_sizes_and_work_are_the_published_ones(bench):
    """Billions of multiply-adds as the papers state them: EDT's (arXiv 2410.23788) and DiT's (arXiv 2212.09748)."""
    told = bench.main(["--parts", "counts", "--threads", "1"])
    published = {"edt S": 2.66, "edt B": 10.20, "dit S": 6.06, "dit B": 23.01, "dit XL": 118.64}
    for name, billions in published.items():
        assert told["work"][name]["forward"] / 1e9 == pytest.approx(billions, rel=0.003)
    assert told["parameters"]["dit S"]["all"] == 32_963_360 - 256 * 384  # its position table is not trained
    assert told["parameters"]["edt XL"]["inference"] == pytest.approx(698.5e6, rel=1e-4)
    mdt = told["parameters"]["mdtv2 S"]
    dim, heads = 384, 6  # of the side interpolater: the block with its biases and tables, and the mask token
    block = 12 * dim**2 + 9 * dim + 6 * (dim**2 + dim) + (31 * 31 + 3) * heads
    assert mdt["all"] - mdt["inference"] == block + dim
    assert told["work_ratios"]["forward_dit_s_over_edt_s"] == pytest.approx(6.06 / 2.66, rel=0.005)
    assert told["work"]["dit S"]["step"] == 3 * told["work"]["dit S"]["forward"]
    assert told["work"]["edt S"]["step"] == 6 * told["work"]["edt S"]["forward"]


@pytest.mark.parametrize("network", ["edt", "dit", "mdtv2"])
def test_counted_work_is_what_is_computed(bench, monkeypatch, network):
    monkeypatch.setattr(bench, "INPUT_MASKS", (0.4, 0.4))
    model = bench.build_network(network, "tiny", 128)
    inputs = bench.inputs_of(model, 2, torch.float32, CPU)
    with torch.no_grad(), counting(model) as counter:
        model(**inputs)
    assert counter.total == 2 * sum(model.multiply_adds().values())
    if network == "dit":
        return
    plan = MaskPlan(down=(), input=(0.4, 0.4)) if network == "mdtv2" else MaskPlan()
    masks = plan.draw(0, 0, range(2), model.mask_grids)
    with torch.no_grad(), counting(model) as counter:
        model(**inputs, token_masks=masks)
    assert counter.total == pytest.approx(2 * bench.masked_multiply_adds(network, model), rel=1e-12)


def test_passes_of_a_step_are_those_of_the_recipe(bench):
    tokens: dict[str, list[int]] = {}
    for recipe, step in bench.steps_of("tiny", 128, 2, torch.float32, CPU).items():
        seen: list[int] = []
        first = step.trained.model.blocks[0]
        hook = first.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[1]))
        before = {name: p.detach().clone() for name, p in step.trained.model.named_parameters()}
        average = {name: value.clone() for name, value in step.trained.ema.main.state_dict()["parameters"].items()}
        step()
        hook.remove()
        tokens[recipe] = seen
        moved = [name for name, p in step.trained.model.named_parameters() if not torch.equal(p, before[name])]
        assert len(moved) > 0.9 * len(before)  # a bias of keys, say, has no gradient
        averaged = step.trained.ema.main.state_dict()["parameters"]
        assert any(not torch.equal(averaged[name], average[name]) for name in average)
        assert all(p.grad is None for p in step.trained.model.parameters())
        assert len(step.marks) == 1
        start, between, end = step.marks[0]
        assert start < between < end
        assert step.updates(1) == [end - between]
    assert tokens["edt"] == [64, 64]
    assert tokens["edt_star"] == tokens["dit"] == [64]
    full, masked = tokens["mdtv2"]
    assert full == 64
    assert 32 <= masked <= 44  # 0.3 to 0.5 are left out


def test_nothing_is_multiplied_by_zero(bench):
    for network in bench.NETWORKS:
        model = bench.build_network(network, "tiny", 128)
        assert all(bool(p.any()) for p in model.parameters())
        out = bench.pass_of(model, 2, torch.float32, CPU)()
        bench.refuse_degenerate(network, out)
    for bad in (torch.zeros(3), torch.tensor([1.0, float("nan")]), torch.tensor(float("inf"))):
        with pytest.raises(RuntimeError, match="not finite, or all the same"):
            bench.refuse_degenerate("network", bad)


def test_forms_are_watched_and_left_alone_afterwards(bench):
    own = attention.dispatch_attention_fn
    model = bench.build_network("edt", "tiny", 128)
    model.set_attention_modulation([0])
    with bench.watching_forms() as seen:
        bench.pass_of(model, 1, torch.float32, CPU)()
    assert seen == {"sdpa": 4, "modulated": 1}
    assert attention.dispatch_attention_fn is own


def test_the_update_is_taken_off_the_step(bench):
    timings = Timings({"edt": [3.0, 5.0], "mdtv2": [7.0, 11.0]})
    passes = bench.without_updates(timings, {"edt": [1.0, 2.0], "mdtv2": [1.0, 2.0]})
    assert passes.seconds == {"edt": [2.0, 3.0], "mdtv2": [6.0, 9.0]}
    assert passes.ratio("mdtv2", "edt")[0] == 3.0


@pytest.mark.slow
def test_memory_of_steps_and_passes(bench, monkeypatch):
    def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """Instead of the fresh process, whose imports take longer than the measurement."""
        assert command[:2] == [sys.executable, str(SCRIPT)]
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            bench.main(command[2:])
        return subprocess.CompletedProcess(command, 0, told.getvalue(), "")

    monkeypatch.setattr(bench.subprocess, "run", run_here)
    monkeypatch.setattr(bench, "RECIPES", {"mdtv2": ("mdtv2", "full+masked")})
    monkeypatch.setattr(bench, "NETWORKS", {"edt": "EDT", "mdtv2": "MDTv2"})
    told = bench.main([
        "--parts", "memory", "--sizes", "tiny", "--pixels", "256", "--threads", "1", "--train-batch", "8",
    ])["memory"]  # fmt: skip
    model = bench.build_network("mdtv2", "tiny", 256)
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    assert told["train mdtv2 tiny"]["standing_mib"] >= 6 * weights  # Adan keeps four, and there is an average
    scores = 8 * 2 * 256**2 * 4 / 2**20  # of one attention: softmax and scores of 4 blocks stay for the backward pass
    assert told["train mdtv2 tiny"]["peak_mib"] > 4 * scores
    assert told["forward mdtv2 tiny"]["peak_mib"] < told["train mdtv2 tiny"]["peak_mib"] / 2


def test_goals_and_discussion_are_computed(bench):
    results = {
        "forward_mdtv2_s_over_edt_s": 2.5, "forward_dit_s_over_edt_s": 1.5, "train_mdtv2_s_over_edt_s": 2.0,
        "train_mdtv2_s_over_edt_s_passes": 2.2,
        "work_ratios": {f"step_mdtv2_{size}_over_edt_{size}": value for size, value in (("s", 3), ("b", 2), ("xl", 1))},
    }  # fmt: skip
    goals = bench.judged(results, bench.GOALS)
    assert goals["forward_mdtv2_s_over_edt_s"] == {"goal": ">= 2.2", "reached": True}
    assert goals["forward_dit_s_over_edt_s"] == {"goal": ">= 1.9", "reached": False}
    assert goals["train_mdtv2_s_over_edt_s"]["reached"] is False
    lines = bench.discussion(results)
    assert (
        "S, a training step, MDTv2 over EDT: paper 3.93, multiply-adds 3.00, time here 2.00, without the update 2.20, "
        "paper over here 1.97"
    ) in lines  # 3.93 / 2
    assert any("falls by a factor of 2.05" in line and "of a step by 3.00" in line for line in lines)  # 3.93 / 1.92
    assert bench.discussion({}) == []


def test_processor_time_is_of_one_thread(bench, capsys):
    assert bench.clock_of(bench.parse_arguments(["--clock", "cpu", "--threads", "1"]))._now is bench.time.process_time
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--clock", "cpu", "--threads", "2"])
    assert "--clock cpu is for" in capsys.readouterr().err
