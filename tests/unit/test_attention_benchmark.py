"""The benchmark of a forward pass: the naive pass is the same function, and every part runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "forward.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("forward_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    del sys.modules[spec.name]


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
    assert told["errors"]["bf16_256"] > 1e-4 > told["errors"]["fp32_256"]  # each in the precision it is named for


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
