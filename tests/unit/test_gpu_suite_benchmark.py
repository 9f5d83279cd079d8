"""The script for a GPU, tried on a CPU: every part runs, what fails is told, and its figures are what they say."""

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_scripts import benchmark

from edt_diffusion.data import open_images
from edt_diffusion.profiling.side_by_side import Timings
from edt_diffusion.util.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def suite():
    with benchmark("gpu_suite") as module:
        yield module


def options(suite: Any, *words: str) -> Any:
    return suite.parse_arguments(["--device", "cpu", "--tiny", "--rounds", "2", *words])


@pytest.mark.slow
def test_parts_stand_for_themselves_and_are_written_one_by_one(suite, tmp_path, monkeypatch):
    """One that fails, and those for a CPU: results are there after each part, and the page has them."""
    monkeypatch.setattr(suite, "WINDOW_SECONDS", 0.01)
    monkeypatch.setattr(suite, "SAMPLINGS", (("ddim", 50, "none"), ("ddim", 50, "no such cache")))
    monkeypatch.setattr(suite, "FORWARD_BATCHES", {"tiny": (1,)})
    monkeypatch.setattr(suite, "measured_matmul_peak", lambda *_: 1e12)
    written: list[list[str]] = []
    write = suite.write
    monkeypatch.setattr(suite, "write", lambda told, out: (written.append(list(told["parts"])), write(told, out)))
    told = suite.main([
        "--device", "cpu", "--tiny", "--rounds", "2", "--out", str(tmp_path), "--parts", "training,throughput,sampling",
    ])  # fmt: skip
    assert written == [["training"], ["training", "throughput"], ["training", "throughput", "sampling"]]
    (file,) = tmp_path.glob("gpu_cpu-tiny_*.json")
    assert json.loads(file.read_text()) == json.loads(json.dumps(told))
    assert told["parts"]["training"]["error"].startswith("UserError: the training needs --data")

    rows = told["parts"]["throughput"]["rows"]
    assert {(row["what"], row["dtype"]) for row in rows} == {
        (a, b) for a in ("forward", "train") for b in ("bf16", "fp32")
    }
    assert {row["network"] for row in rows if row["what"] == "train"} == {"edt", "edt_star", "dit", "mdtv2"}
    for row in rows:
        assert row["images_per_second"] > 0
        assert ("seconds_over_edt" in row) == (row["network"] != "edt")
    samplings = told["parts"]["sampling"]["rows"]
    assert [row["pictures_per_second"] > 0 for row in samplings[::2]] == [True] * 3
    assert all("no such cache" in row["unavailable"] for row in samplings[1::2])
    page = file.with_suffix(".md").read_text()
    assert "Failed: UserError: the training needs" in page
    assert f"{rows[0]['images_per_second']:.4g}" in page


def test_parity_finds_precisions_and_what_is_wrong(suite, monkeypatch):
    forms = {name: suite.FORMS[name] for name in ("explicit", "two-pass")}
    monkeypatch.setattr(suite, "FORMS", forms)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    monkeypatch.setattr(suite, "DTYPES", kinds)
    rows = list(suite.errors_of("mdtv2", "tiny", 128, True, CPU))
    assert [(row["dtype"], row["amm"]) for row in rows] == [
        (kind, form) for kind in kinds for form in ("automatic", "explicit", "two-pass")
    ]
    for row in rows:
        assert row["within"]
        assert (1e-8 < row["error"] < 1e-5) if row["dtype"] == "fp32" else (1e-4 < row["error"] < 0.03)
        assert row["forms"]["modulated"] == 1  # the one block that is suggested
    (off, _) = suite.errors_of("mdtv2", "tiny", 128, False, CPU)
    assert off["amm"] == "off"
    assert off["forms"] == {"sdpa": 4}

    from edt_diffusion.nn import modulated_attention

    def forgets_modulation(query, key, value, bias, modulation):
        return forms["explicit"](query, key, value, bias, None)

    monkeypatch.setitem(modulated_attention.FORMS, "two-pass", forgets_modulation)
    (wrong,) = [row for row in suite.errors_of("mdtv2", "tiny", 128, True, CPU) if row["amm"] == "two-pass"][:1]
    assert not wrong["within"]


def test_every_precision_is_that_of_the_same_weights(suite, monkeypatch):
    """Weights that bfloat16 has rounded would show in the error of float16, whichever comes first."""
    found = []
    for order in (("fp16", "bf16"), ("bf16", "fp16")):
        monkeypatch.setattr(suite, "DTYPES", {kind: getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[kind])
                                              for kind in order})  # fmt: skip
        found.append({row["dtype"]: row["error"] for row in suite.errors_of("dit", "tiny", 128, False, CPU)})
    assert found[0] == found[1]


def test_what_is_not_finite_is_written_and_does_not_end_the_call(suite, tmp_path):
    row = {"network": "edt", "pixels": 256, "dtype": "fp16", "amm": "off", "error": float("inf"), "within": False}
    parity = {"bounds": suite.BOUNDS, "within": False, "largest": {"fp16": float("inf")}, "rows": [row]}
    machine = {"torch": "", "cpu": "", "cores": 2, "device": "cpu"}
    suite.write({"name": "h", "date": "1", "machine": machine, "parts": {"parity": parity}}, tmp_path)
    told = json.loads((tmp_path / "gpu_h_1.json").read_text())["parts"]["parity"]
    assert (told["rows"][0]["error"], told["largest"]["fp16"]) == (None, None)
    assert "| edt | 256 | fp16 | off | inf | beyond the bound |" in (tmp_path / "gpu_h_1.md").read_text()


def test_no_training_is_begun_that_could_not_be_stopped_in_order(suite, tmp_path):
    given = options(suite, "--data", "pictures", "--extractor", "net.ts", "--out", str(tmp_path))
    with pytest.raises(UserError, match="0 s of --budget are left"):
        suite.training(given, CPU, suite.Deadline(1))


def test_the_budget_leaves_out_what_it_names(suite):
    deadline = suite.Deadline(5.0, now=iter([0.0, *[1.0] * 100]).__next__)
    found = suite.parity(options(suite), CPU, deadline)
    assert found["rows"] == []
    assert found["within"] is None
    assert found["left_out"] == [f"{name} 128 {amm}" for name in ("edt", "dit", "mdtv2") for amm in ("plain", "AMM")]
    assert "Left out for want of time: edt 128 plain" in suite.page({
        "machine": {"torch": "", "cpu": "", "cores": 2, "device": "cpu"}, "date": "", "parts": {"parity": found},
    })  # fmt: skip


def test_relative_error_is_that_of_the_root_mean_square(suite):
    exact = torch.tensor([3.0, 4.0])
    assert suite.relative_rms(exact + torch.tensor([0.3, 0.4]), exact) == pytest.approx(0.1, rel=1e-6)
    assert suite.relative_rms(torch.tensor([3.0, float("nan")]), exact) == float("inf")


def test_rates_are_of_images_whatever_the_windows(suite):
    timings = Timings({"edt": [2.0, 4.0], "mdtv2": [3.0, 6.0]})
    edt, mdt = suite.rows_of(timings, {"edt": 4, "mdtv2": 2}, 8, {"edt": 1.0, "mdtv2": 2.0}, {"edt": 10**12})
    assert edt["images_per_second"] == pytest.approx(32 / 3)  # 4 calls of 8 in the median of 3 seconds
    assert edt["tflops"] == pytest.approx(32 / 3)
    assert mdt["tflops"] is None
    assert mdt["seconds_over_edt"] == pytest.approx(3.0)  # 3/16 over 2/32
    assert "seconds_over_edt" not in edt


def test_windows_hold_as_many_calls_as_fill_them(suite, monkeypatch):
    monkeypatch.setattr(suite, "WINDOW_SECONDS", 0.06)
    import time

    timings, counts = suite.windows({"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}, 1, CPU)
    assert 1 <= counts["slow"] <= 2
    assert counts["fast"] <= 6
    assert timings.seconds["fast"][0] >= counts["fast"] * 0.01


def test_counts_and_failures_of_tests(suite):
    told = suite.summary_of_tests(
        "F.\nFAILED tests/a.py::b - assert 0\n1 failed, 12 passed, 3 skipped in 61.20s (0:01:01)\n"
    )
    assert told == {
        "counts": {"failed": 1, "passed": 12, "skipped": 3}, "failures": ["FAILED tests/a.py::b - assert 0"],
    }  # fmt: skip


def test_pictures_of_an_npz_are_what_is_trained_on(suite, tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(12) % 3
    np.savez(tmp_path / "given.npz", images=images, labels=labels)
    path = suite.readable(str(tmp_path / "given.npz"), tmp_path / "made.zip")
    found = open_images(path, size=32)
    assert len(found.class_names or []) == 3
    order = np.argsort(labels, kind="stable")  # by class, then by number
    assert np.array_equal(found.images(range(12)), images[order])
    assert np.array_equal(found.labels, labels[order])

    suite.main(["--pack", str(tmp_path / "packed.npz"), "--data", path, "--limit", "6"])
    with np.load(tmp_path / "packed.npz") as packed:
        rows = np.linspace(0, 11, 6).round().astype(int)
        assert np.array_equal(packed["images"], images[order][rows])
        assert np.array_equal(packed["labels"], labels[order][rows])
    assert suite.readable("folder/of/pictures", tmp_path / "none.zip") == "folder/of/pictures"
    np.savez(tmp_path / "bad.npz", images=images[0], labels=labels)
    with pytest.raises(UserError, match="expected uint8"):
        suite.readable(str(tmp_path / "bad.npz"), tmp_path / "other.zip")


def test_the_training_gives_each_network_the_same(suite, tmp_path, monkeypatch):
    from edt_diffusion.studies import matrix as engine

    asked = []

    def run(matrix: Any, folder: Path, processes: int) -> Any:
        asked.append((matrix, folder))
        scores = {"edt": 3.0, "dit": 5.0, "mdtv2": 4.0}
        return SimpleNamespace(
            ceiling={"metrics": {"fid": {"value": 1.0}}}, stopped=False, missing=[], failed={},
            done={f"{name}-seed0": {"parameters": 7} for name in scores},
            spent=lambda arm: {"step": 11.0, "images": 22.0},
            mean=lambda arm, metric: engine.results.Estimate(scores[arm], None, None, {0: scores[arm]})
            if metric == "fid" else None,
        )  # fmt: skip

    monkeypatch.setattr(engine, "run_matrix", run)
    words = ["--data", "pictures", "--test-data", "held-out", "--extractor", "net.ts", "--seconds", "9"]
    given = options(suite, *words, "--out", str(tmp_path), "--images", "8")
    told = suite.training(given, CPU, suite.Deadline(100))
    ((matrix, folder),) = asked
    assert folder == tmp_path / "training" / "runs"
    assert str(matrix.budget) == "9s"
    assert matrix.ceiling == "held-out"
    configs = {arm.name: matrix.config(arm, 0) for arm in matrix.arms}
    assert {name: config.model["name"] for name, config in configs.items()} == {
        "edt": "EDT", "dit": "DiT", "mdtv2": "MDTv2",
    }  # fmt: skip
    assert {name: config.objective.passes for name, config in configs.items()} == {
        "edt": "full+masked", "dit": "full", "mdtv2": "full+masked",
    }  # fmt: skip
    assert len({config.optimizer.model_dump_json() for config in configs.values()}) == 1
    assert len({config.train.model_dump_json() for config in configs.values()}) == 1
    assert all(config.model["patch_size"] == 2 for config in configs.values())
    assert [each["scores"]["fid"]["mean"] for each in told["networks"]] == [3.0, 5.0, 4.0]
    assert told["ceiling"] == {"fid": 1.0}
    page = "\n".join(suite.page_of_training(told))
    assert "| DiT-S | 7 | 11 | 22 | 5 |" in page
    assert "| held-out real pictures |  |  |  | 1 |" in page
    full = {arm.name: dict(arm.settings["model"]) for arm in suite.arms(tiny=False)}
    assert full["dit"] == {"name": "DiT", "size": "S", "patch_size": 2}


def test_a_training_is_asked_to_stop_in_time(suite):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background, it is ignored
    try:
        with pytest.raises(KeyboardInterrupt), suite.stopped_after(0.05):
            time.sleep(20)
        with suite.stopped_after(0.2):
            pass
        time.sleep(0.4)  # over: nothing comes any more
    finally:
        signal.signal(signal.SIGINT, before)


def test_results_of_several_calls_are_joined(suite, tmp_path):
    one = {"name": "h", "date": "1", "machine": {"torch": "2", "cpu": "c", "cores": 4, "device": "cuda", "gpu": "G"}}
    first = {**one, "parts": {"tests": {"counts": {"passed": 1}, "failures": []}, "parity": {"error": "none"}}}
    second = {**one, "date": "2", "parts": {"tests": {"counts": {"passed": 2}, "failures": []}}}
    for number, each in enumerate((first, second)):
        (tmp_path / f"{number}.json").write_text(json.dumps(each))
    suite.main(["--out", str(tmp_path / "out"), "--merge", f"{tmp_path / '0.json'},{tmp_path / '1.json'}"])
    told = json.loads((tmp_path / "out" / "gpu_h_2.json").read_text())
    assert told["parts"]["tests"]["counts"] == {"passed": 2}
    assert told["parts"]["parity"] == {"error": "none"}
    assert "# G, 2" in (tmp_path / "out" / "gpu_h_2.md").read_text()
    with pytest.raises(UserError, match="different devices: h, other"):
        suite.merged([first, {**second, "name": "other"}])
