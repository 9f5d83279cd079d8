"""The benchmark of a forward pass: the naive pass is the same function, and every part runs."""

import json

import pytest
import torch
from benchmark_scripts import benchmark

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    with benchmark("forward") as module:
        yield module


def test_every_part_for_cpus_runs(bench, tmp_path):
    file = tmp_path / "forward.json"
    told = bench.main([
        "--size", "tiny", "--repeats", "2", "--pairs", "3", "--threads", "1", "--json", str(file),
        "--only", ",".join([*bench.SPEEDS, *bench.COSTS]),
    ])  # fmt: skip
    assert json.loads(file.read_text()) == told
    for name in (*bench.SPEEDS, *bench.COSTS):
        low, high = told["spread"][name]
        assert low <= told[name] <= high
    for name in bench.SPEEDS:
        assert told[name] > 0
        assert told["errors"][name] < bench.LARGEST_ERROR[bench.SPEEDS[name][3]]
    assert told["pairs"] == 3
    assert told["note"].startswith("amm_cost_*: of 3 pairs only")
    assert {"cpu", "cores", "load_average"} <= set(told["machine"])
    assert told["errors"]["bf16_256"] > 1e-4 > told["errors"]["fp32_256"]  # each in the precision it is named for


def test_pairs_enough_for_figures_are_the_default(bench, monkeypatch):
    assert bench.parse_arguments([]).pairs >= bench.FEWEST_PAIRS >= 50
    monkeypatch.setattr(bench, "COSTS", {"amm_cost_256": bench.COSTS["amm_cost_256"]})
    told = bench.main(["--size", "tiny", "--threads", "1", "--only", "amm_cost_256"])
    assert "note" not in told


@pytest.mark.parametrize(("rounds", "rounds_of_a_pass", "passes"), [(6, 1, 6), (7, 4, 2), (1, 4, 1)])
def test_shares_are_of_passes_under_the_same_load(bench, monkeypatch, rounds, rounds_of_a_pass, passes):
    """A machine on which all takes longer from one group of rounds to the next: the share is the same in each round.

    Modulation adds 0.5 and 1.5 of a second to two blocks, and a pass takes 8: a share of 1/4.
    """
    called: list[str] = []
    cost = {"whole": 8.0, "a with": 3.0, "a without": 2.5, "b with": 6.0, "b without": 4.5}
    calls = {name: lambda name=name: called.append(name) for name in cost}
    timed: list[str] = []

    def seconds_of(call, device):
        call()
        timed.append(called[-1])
        if timed[-1] == "whole":  # in the middle of its group
            return 2.0 ** (timed.count("whole") - 1) * cost["whole"]
        rounds_before = sum(name == timed[-1] for name in timed[:-1])
        return 2.0 ** (rounds_before // rounds_of_a_pass) * cost[timed[-1]]

    monkeypatch.setattr(bench, "seconds_of", seconds_of)
    attentions = [{True: calls[f"{block} with"], False: calls[f"{block} without"]} for block in "ab"]
    shares, seconds = bench.shares_of_modulation(attentions, calls["whole"], rounds, rounds_of_a_pass, CPU)
    assert shares == [0.25] * rounds
    assert seconds == [8.0 * 2**number for number in range(passes)]
    first = [name for name in timed if name.startswith("a")][::2]  # each is the first of the two every other time
    assert first == ["a with" if number % 2 == 0 else "a without" for number in range(rounds)]


@pytest.mark.parametrize("part", ["bias", "modulation"])
def test_passes_that_differ_are_not_timed(bench, monkeypatch, part):
    naive = bench.naive

    def wrong(model):
        model = naive(model)
        for attention, _ in model.attention_layers():
            if part == "bias":
                attention.position_bias.table.zero_()
            elif attention.modulation is not None:
                attention.modulation = attention.modulation.square()
        return model

    monkeypatch.setattr(bench, "naive", wrong)
    with pytest.raises(RuntimeError, match="fp32_512_amm: the passes differ by"):
        bench.main(["--size", "tiny", "--repeats", "1", "--threads", "1", "--only", "fp32_512_amm"])


def test_the_setting_of_512_px_is_the_published_one(bench):
    model = bench.build_network("S", 512, amm=True)
    assert model.attention_modulation == model.amm_presets["s-512"].modulation
    assert model.grids[0] == (32, 32)
    assert model.proj_out.weight.any()  # what starts as zero does not
    assert model.blocks[0].adaln.linear.weight.any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_part_for_gpus_runs_on_a_cpu(bench, monkeypatch):
    monkeypatch.setattr(bench, "GPU_BATCHES", {256: 2})
    with torch.inference_mode():
        told = dict(bench.passes_on_gpu("tiny", 256, False, 1, CPU))
    assert set(told) == {"no AMM", "automatic", "explicit", "in-place", "two-pass", "flex"}
    for name, figures in told.items():
        assert figures["images_per_second"] > 0, name
