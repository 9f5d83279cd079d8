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
    written: list[tuple[str, int]] = []
    write = suite.write

    def noted(told, out):
        part = list(told["parts"])[-1]
        written.append((part, len(told["parts"][part].get("rows", ()))))
        write(told, out)

    monkeypatch.setattr(suite, "write", noted)
    told = suite.main([
        "--device", "cpu", "--tiny", "--rounds", "2", "--out", str(tmp_path), "--parts", "training,throughput,sampling",
    ])  # fmt: skip
    items = [("throughput", rows) for rows in (3, 7, 10, 14, 14)]  # networks or recipes of each item, then the end
    assert written == [("training", 0), *items, *(("sampling", rows) for rows in (1, 2, 3, 4, 5, 6, 6))]
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
        assert row["standing_mib"] > 0
        assert row["rounds"] == 2
        assert sum(row["forms"].values()) >= 2
        if row["forms"] == {"sdpa": 2}:
            assert row["kernels"] == {"flash_attention_for_cpu": 2}
    assert {row["network"] for row in rows if row["kernels"]} >= {"dit"}
    assert told["parts"]["throughput"]["kernels_allowed"]
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
    assert off["kernels"] == {"flash_attention_for_cpu": 4}

    from edt_diffusion.nn import modulated_attention

    def forgets_modulation(query, key, value, bias, modulation):
        return forms["explicit"](query, key, value, bias, None)

    monkeypatch.setitem(modulated_attention.FORMS, "two-pass", forgets_modulation)
    (wrong,) = [row for row in suite.errors_of("mdtv2", "tiny", 128, True, CPU) if row["amm"] == "two-pass"][:1]
    assert not wrong["within"]


def test_the_kernel_without_fusion_has_a_name_in_inference_mode_only(suite):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    given = torch.randn(1, 2, 8, 16)
    seen = []
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode(), sdpa_kernel(SDPBackend.MATH), suite.Kernels() as kernels:
            torch.nn.functional.scaled_dot_product_attention(given, given, given)
        seen.append(kernels.seen)
    assert seen == [{"attention_math": 1}, {}]


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
    given = options(suite, "--data", "pictures", "--extractor", "pixels", "--work", str(tmp_path / "work"))
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
    facts = {"edt": {"work": 10**12, "peak_mib": 1.0}, "mdtv2": {"work": None, "peak_mib": 2.0}}
    edt, mdt = suite.rows_of(timings, {"edt": 4, "mdtv2": 2}, 8, facts)
    assert edt["images_per_second"] == pytest.approx(32 / 3)  # 4 calls of 8 in the median of 3 seconds
    assert edt["tflops"] == pytest.approx(32 / 3)
    assert mdt["tflops"] is None
    assert mdt["seconds_over_edt"] == pytest.approx(3.0)  # 3/16 over 2/32
    assert "seconds_over_edt" not in edt
    assert (edt["peak_mib"], mdt["peak_mib"]) == (1.0, 2.0)
    assert mdt["seconds_over_edt_quartiles"] is not None
    apart = Timings({"edt": [2.0, 2.0, 8.0], "mdtv2": [6.0, 3.0, 3.0]})  # not in turn: medians, 3 over 2
    (_, mdt) = suite.rows_of(apart, {"edt": 1, "mdtv2": 1}, 8, facts, in_turn=False)
    assert mdt["seconds_over_edt"] == pytest.approx(1.5)
    assert mdt["seconds_over_edt_quartiles"] is None


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


def test_the_usual_folder_of_a_training_is_of_one_file(suite, tmp_path, monkeypatch):
    given = options(suite, "--data", "train.npz", "--extractor", "pixels")
    folders = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("train.npz").write_bytes(b"as long")
        folders.append(suite.usual_work(given))
        assert suite.usual_work(given) == folders[-1]
    given.data = "../other/train.npz"
    assert suite.usual_work(given) == folders[-1]
    Path("train.npz").write_bytes(b"longer than that")
    folders.append(suite.usual_work(given))
    suite.os.utime("train.npz", (1, 1))
    folders.append(suite.usual_work(given))
    assert len(set(folders)) == 4


def test_the_training_gives_each_network_the_same(suite, tmp_path, monkeypatch):
    from edt_diffusion.studies import matrix as engine

    asked = []

    def run(matrix: Any, folder: Path, processes: int) -> Any:
        asked.append((matrix, folder))
        scores = {"edt": 3.0, "dit": 5.0, "mdtv2": 4.0}
        return SimpleNamespace(
            ceiling={"metrics": {"fid": {"value": 1.0}}}, stopped=True, missing=["dit-seed0-1-plain"],
            failed={"dit-seed0-score": "no such thing"},
            done={f"{name}-seed0": {"parameters": 7} for name in scores},
            spent=lambda arm: {"step": 11.0, "images": 22.0},
            mean=lambda arm, metric: engine.results.Estimate(scores[arm], None, None, {0: scores[arm]})
            if metric == "fid" else None,
        )  # fmt: skip

    monkeypatch.setattr(engine, "run_matrix", run)
    words = ["--data", "pictures", "--test-data", "held-out", "--extractor", "pixels", "--seconds", "9"]
    given = options(suite, *words, "--work", str(tmp_path / "training"), "--images", "8")
    log = tmp_path / "training" / "runs" / "runs" / "dit-seed0" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "loss": 1.0, "data_wait_share": 0.2}\n{"step": 2, "data_wait_share": 0.4}\n')
    told = suite.training(given, CPU, suite.Deadline(100))
    ((matrix, folder),) = asked
    assert folder == tmp_path / "training" / "runs"
    assert str(matrix.budget) == "9s"
    assert matrix.ceiling == "held-out"
    assert matrix.metrics == ("fid", "kid")  # pixels have no classes
    assert matrix.save_every >= 600
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
    assert "| share of waiting for data | Fréchet distance |" in page
    assert "| DiT-S | 7 | 11 | 22 | 0.3 | 5 |" in page
    assert "| EDT-S, its masks | 7 | 11 | 22 |  | 3 |" in page
    assert "| held-out real pictures |  |  |  |  | 1 |" in page
    for line in (
        "Extractor: pixels.",
        "Stopped before",
        "Missing: dit-seed0-1-plain",
        "dit-seed0-score: no such thing",
    ):
        assert line in page
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


def test_a_stop_that_comes_when_the_work_is_just_done_loses_nothing(suite, tmp_path, monkeypatch):
    from edt_diffusion.studies import matrix as engine

    read = SimpleNamespace(
        ceiling=None, stopped=False, missing=["all"], failed={}, done={}, spent=lambda arm: {}, mean=lambda *_: None
    )
    monkeypatch.setattr(engine, "run_matrix", lambda *_, **__: time.sleep(20))
    monkeypatch.setattr(engine, "Results", SimpleNamespace(read=lambda folder, matrix: read))
    given = options(suite, "--data", "pictures", "--extractor", "pixels", "--work", str(tmp_path))
    timer = suite.stopped_after
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(suite, "stopped_after", lambda _left: timer(0.05))
        told = suite.training(given, CPU, suite.Deadline(100))
        assert told["stopped"]
        assert told["missing"] == ["all"]
        monkeypatch.setattr(suite, "stopped_after", lambda _left: timer(50))
        monkeypatch.setattr(engine, "run_matrix", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # that of a person
            suite.training(given, CPU, suite.Deadline(100))
    finally:
        signal.signal(signal.SIGINT, before)


def of_parts(suite: Any, monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    monkeypatch.setattr(suite, "PART_FUNCTIONS", {**suite.PART_FUNCTIONS, **functions})


def found_in(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("gpu_*.json")
    return json.loads(file.read_text())


TESTS = {"counts": {"passed": 1}, "failures": []}
SAMPLED = {"guidance": 2.0, "precision": "bf16", "size": "S", "pixels": 256, "left_out": []}


def sampled(item: str, rate: float) -> dict[str, Any]:
    row = {"item": item, "network": item, "scheduler": "ddim", "steps": 5, "cache": "none", "batch": 2}
    return {**row, "pictures_per_second": rate}


def test_what_was_measured_stays_when_a_part_breaks_off(suite, tmp_path, monkeypatch):
    on_disk: list[Any] = []

    def breaks(_options, _device, _deadline, note):
        note({**SAMPLED, "rows": [sampled("edt", 3.0)]})
        on_disk.append(found_in(tmp_path)["parts"]["sampling"])
        raise RuntimeError("a kernel failed")

    of_parts(suite, monkeypatch, sampling=breaks, tests=lambda *_: TESTS)
    told = suite.main(["--device", "cpu", "--out", str(tmp_path), "--parts", "sampling,tests"])
    assert on_disk[0]["unfinished"]
    assert on_disk[0]["rows"][0]["pictures_per_second"] == 3.0
    part = found_in(tmp_path)["parts"]["sampling"]
    assert part["error"] == "RuntimeError: a kernel failed"
    assert part["rows"][0]["pictures_per_second"] == 3.0
    assert "unfinished" not in part
    assert told["parts"]["tests"]["counts"] == {"passed": 1}
    page = next(tmp_path.glob("gpu_*.md")).read_text()
    assert "Failed: RuntimeError: a kernel failed" in page
    assert "| edt | ddim | 5 | none | 2 | 3 |" in page


@pytest.mark.parametrize("where", ["between", "within", "interrupted"])
def test_a_device_that_is_lost_ends_the_call_and_says_so(suite, tmp_path, monkeypatch, where):
    def lost(_device):
        raise suite.DeviceLost("AcceleratorError: an illegal memory access")

    def part(_options, device, _deadline, note):
        note({**SAMPLED, "rows": [sampled("edt", 3.0)]})
        if where == "within":
            suite.release(device)
        if where == "interrupted":
            raise KeyboardInterrupt
        return {**SAMPLED, "rows": [sampled("edt", 3.0)]}

    of_parts(suite, monkeypatch, sampling=part, tests=lambda *_: TESTS)
    if where != "interrupted":
        monkeypatch.setattr(suite, "release", lost)
    suite.main(["--device", "cpu", "--out", str(tmp_path), "--parts", "sampling,tests"])
    told = found_in(tmp_path)
    assert list(told["parts"]) == ["sampling"]
    assert told["parts"]["sampling"]["rows"]
    assert told["ended_early"].startswith("in sampling")
    assert told["ended_early"].endswith("not begun: tests")
    assert "Ended early: in sampling" in next(tmp_path.glob("gpu_*.md")).read_text()


def test_releasing_a_broken_device_is_told_as_such(suite, monkeypatch):
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.compiler, "reset", broken)
    with pytest.raises(suite.DeviceLost, match=r"illegal memory access was encountered$"):
        suite.release(CPU)


def test_a_later_call_of_the_day_adds_to_what_is_there(suite, tmp_path, monkeypatch):
    words = ["--device", "cpu", "--out", str(tmp_path), "--parts"]
    first = {**SAMPLED, "rows": [sampled("edt", 3.0), sampled("dit", 2.0)], "left_out": ["mdtv2", "more"]}
    second = {**SAMPLED, "rows": [sampled("dit", 2.5), sampled("mdtv2", 1.0)], "left_out": []}
    of_parts(suite, monkeypatch, sampling=lambda *_: first, tests=lambda *_: TESTS)
    suite.main([*words, "tests,sampling"])
    of_parts(suite, monkeypatch, sampling=lambda *_: second)
    suite.main([*words, "sampling"])

    def fails(*_):
        raise RuntimeError("at once")

    of_parts(suite, monkeypatch, sampling=fails)
    suite.main([*words, "sampling"])
    parts = found_in(tmp_path)["parts"]
    assert parts["tests"]["counts"] == {"passed": 1}
    assert {row["item"]: row["pictures_per_second"] for row in parts["sampling"]["rows"]} == {
        "edt": 3.0, "dit": 2.5, "mdtv2": 1.0,
    }  # fmt: skip
    assert parts["sampling"]["left_out"] == ["more"]
    assert parts["sampling"]["failed_later"] == "RuntimeError: at once"
    assert "A later call failed: RuntimeError: at once" in next(tmp_path.glob("gpu_*.md")).read_text()
    next(tmp_path.glob("gpu_*.json")).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        suite.main([*words, "sampling"])


def test_a_training_with_more_missing_does_not_replace_another(suite):
    def trained(seconds: float, *missing: str) -> dict[str, Any]:
        networks = [] if missing else [{"title": "DiT-S", "parameters": 1, "scores": {}}]
        return {"seconds": seconds, "networks": networks, "missing": list(missing), "stopped": bool(missing)}

    done = trained(100.0)
    told = suite.joined(done, trained(50.0, "dit-seed0", "edt-seed0"))
    assert told == {**done, "not_kept": "50 seconds of training each; missing: dit-seed0, edt-seed0"}
    assert suite.joined(trained(100.0, "dit-seed0"), trained(50.0))["seconds"] == 50.0
    assert suite.joined(told, trained(50.0)) == trained(50.0)  # nor is what was told of the one before
    assert suite.joined(trained(100.0, "dit-seed0"), trained(50.0, "edt-seed0"))["seconds"] == 50.0


def test_rows_say_what_they_were_made_with(suite, tmp_path, monkeypatch):
    words = ["--device", "cpu", "--out", str(tmp_path), "--parts", "sampling"]
    rows = [sampled("edt", 3.0), sampled("dit", 2.0)]
    of_parts(suite, monkeypatch, sampling=lambda *_: {**SAMPLED, "rows": rows})
    monkeypatch.setattr(suite.torch, "__version__", "1.0")
    suite.main(words)
    assert "Rows of torch" not in next(tmp_path.glob("gpu_*.md")).read_text()
    of_parts(suite, monkeypatch, sampling=lambda *_: {**SAMPLED, "rows": rows[:1]})
    monkeypatch.setattr(suite.torch, "__version__", "2.0")
    suite.main(words)
    found = found_in(tmp_path)["parts"]["sampling"]["rows"]
    assert {row["item"]: row["torch"] for row in found} == {"edt": "2.0", "dit": "1.0"}
    assert "Rows of torch 1.0: 1." in next(tmp_path.glob("gpu_*.md")).read_text()
    assert suite.mixture([{"rounds": 5}, {"rounds": 5}, {}], "2.0") == []
    (_, line) = suite.mixture([{"rounds": 5}, {"rounds": 2}, {"rounds": 5}], "2.0")
    assert line == "Not all rows are of as many rounds: 1 of 2 rounds, 2 of 5 rounds."


def test_a_part_that_failed_is_told_by_the_exit_status(suite):
    parts = {"tests": {"error": "late"}, "parity": {"rows": []}, "sampling": {"rows": [], "failed_later": "at once"}}
    asked = {"parity": 0, "tests": 1, "sampling": 1, "throughput": 0}
    assert {part: suite.exit_status({"parts": parts}, [part]) for part in asked} == asked
    assert suite.exit_status({"parts": parts}, suite.PARTS) == 1
    assert suite.exit_status({"parts": parts, "ended_early": "in parity"}, ["parity"]) == 1
    assert suite.exit_status({}, suite.PARTS) == 0  # of --pack


def test_parity_of_two_calls_is_judged_as_a_whole(suite):
    def part(item: str, error: float | None) -> dict[str, Any]:
        within = error is not None and error < 0.03
        row = {"item": item, "network": "edt", "pixels": 256, "dtype": "bf16", "amm": "off", "error": error}
        rows = [{**row, "within": within}]
        return {"bounds": suite.BOUNDS, **suite.verdict(rows), "rows": rows, "left_out": []}

    told = suite.joined(part("one", None), part("two", 0.01))  # None is what JSON has for infinity
    assert told["within"] is False
    assert told["largest"]["bf16"] == float("inf")
    assert suite.joined(part("one", 0.02), part("two", 0.01))["largest"]["bf16"] == 0.02


def test_one_network_that_fails_does_not_take_the_others_along(suite, monkeypatch):
    monkeypatch.setattr(suite, "WINDOW_SECONDS", 0.001)
    build = suite.compare.build_network

    def built(network: str, *rest: Any) -> Any:
        model = build(network, *rest)
        if network == "dit":
            model.forward = lambda *_, **__: 1 / 0
        return model

    monkeypatch.setattr(suite, "network_of", built)
    wanted = ((suite.forward_rates, {"edt", "mdtv2"}), (suite.training_rates, {"edt", "edt_star", "mdtv2"}))
    for measured, others in wanted:
        rows = {row["network"]: row for row in measured("tiny", "fp32", False, 1, options(suite), CPU)}
        assert rows.pop("dit")["unavailable"].startswith("ZeroDivisionError")
        assert set(rows) == others
        assert all(row["images_per_second"] > 0 for row in rows.values())


def test_all_steps_are_watched_before_any_is_compiled(suite, monkeypatch):
    """EDT's two recipes have one network: what is compiled is not called where calls are counted."""
    monkeypatch.setattr(suite, "WINDOW_SECONDS", 0.001)
    happened: list[str] = []
    watching, build = suite.watching, suite.compare.build_network

    def watched(*given: Any) -> Any:
        happened.append("watched")
        return watching(*given)

    def built(network: str, *rest: Any) -> Any:
        model = build(network, *rest)
        model.compile_repeated_blocks = lambda **_: happened.append(f"compiled {network}")
        return model

    monkeypatch.setattr(suite, "watching", watched)
    monkeypatch.setattr(suite, "network_of", built)
    rows = suite.training_rates("tiny", "fp32", True, 1, options(suite), CPU)
    assert happened == ["watched"] * 4 + ["compiled edt", "compiled dit", "compiled mdtv2"]
    assert {row["network"] for row in rows if row["forms"]} == {"edt", "edt_star", "dit", "mdtv2"}
    happened.clear()
    monkeypatch.setattr(suite, "TOGETHER", ())  # one by one: each is compiled
    suite.training_rates("tiny", "fp32", True, 1, options(suite), CPU)
    assert sorted(happened[1::2]) == ["compiled dit", "compiled edt", "compiled edt", "compiled mdtv2"]


def test_an_item_of_parity_that_fails_does_not_take_the_others_along(suite, monkeypatch):
    def errors(network, _size, pixels, _amm, _device):
        yield {"network": network, "pixels": pixels, "dtype": "fp32", "amm": "off", "error": 0.0, "within": True}
        if network == "dit":
            raise RuntimeError("no kernel")

    monkeypatch.setattr(suite, "errors_of", errors)
    noted: list[int] = []
    found = suite.parity(options(suite), CPU, suite.Deadline(1000), lambda told: noted.append(len(told["rows"])))
    assert noted == list(range(1, 9))
    assert [row["item"] for row in found["rows"] if "unavailable" in row] == ["dit 128 plain", "dit 128 AMM"]
    assert found["within"]


def test_precision_is_set_back_when_an_item_fails(suite, monkeypatch):
    monkeypatch.setattr(suite.compare, "pass_of", lambda *_: 1 / 0)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        suite.set_tf32(True)
        with pytest.raises(ZeroDivisionError):
            list(suite.errors_of("dit", "tiny", 128, False, CPU))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_networks_are_made_once_and_are_the_same(suite, monkeypatch):
    suite.built.cache_clear()
    made: list[str] = []
    build = suite.compare.build_network
    monkeypatch.setattr(suite.compare, "build_network", lambda name, *rest: (made.append(name), build(name, *rest))[1])
    one, other = (suite.network_of("dit", "tiny", 128) for _ in range(2))
    assert made == ["dit"]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert bool(next(other.parameters()).any())  # no copy sees what another is given
    suite.built.cache_clear()


def test_flex_attention_is_tried_once(suite, monkeypatch):
    monkeypatch.setattr(suite, "FORMS", {name: suite.FORMS[name] for name in ("explicit", "flex")})
    monkeypatch.setattr(suite, "DTYPES", {"fp32": torch.float32, "bf16": torch.bfloat16})
    monkeypatch.setattr(suite, "FLEX_WITH", ("edt", 128, "bf16"))
    monkeypatch.setattr(suite, "set_form", lambda *_: None)  # without a compiler it warns

    def tried(network: str) -> list[str]:
        return [row["dtype"] for row in suite.errors_of(network, "tiny", 128, True, CPU) if row["amm"] == "flex"]

    assert tried("edt") == ["bf16"]
    assert tried("dit") == []


def test_flex_attention_runs_outside_of_dispatch_modes(suite, monkeypatch):
    """Within one, Dynamo does not compile it and it cannot run."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as modes

    from edt_diffusion.nn import modulated_attention

    within: dict[str, set[int]] = {"explicit": set(), "flex": set()}

    def noted(name: str) -> Any:
        def form(*args: Any) -> Any:
            within[name].add(len(modes()))
            return explicit(*args)

        return form

    explicit = modulated_attention.FORMS["explicit"]
    monkeypatch.setattr(suite, "FORMS", {"explicit": None, "flex": None})
    monkeypatch.setattr(suite, "DTYPES", {"bf16": torch.bfloat16})
    monkeypatch.setattr(suite, "FLEX_WITH", ("edt", 128, "bf16"))
    for name in within:
        monkeypatch.setitem(modulated_attention.FORMS, name, noted(name))
    rows = {row["amm"]: row for row in suite.errors_of("edt", "tiny", 128, True, CPU)}
    assert within == {"explicit": {0, 1}, "flex": {0}}  # 0 is the pass in float64
    assert rows["flex"]["within"]
    assert rows["flex"]["forms"]["modulated"] > 0
    assert "kernels" in rows["explicit"]
    assert "kernels" not in rows["flex"]


def test_the_tests_for_a_gpu_are_found_and_bounded(suite, monkeypatch):
    files = suite.files_of_tests()
    assert "tests/unit/test_modulated_attention.py" in files
    assert all("mark.gpu" in (suite.ROOT / file).read_text() for file in files)
    asked: list[Any] = []

    def late(words, **others):
        asked.append((words, others))
        raise suite.subprocess.TimeoutExpired(words, others["timeout"], output=b"tests/a.py::b PASSED\n")

    monkeypatch.setattr(suite.subprocess, "run", late)
    told = suite.run_tests(options(suite), CPU, suite.Deadline(1000))
    ((words, others),) = asked
    assert words[-len(files) :] == files
    assert others["timeout"] == 150
    package = others["env"]["PYTHONPATH"].split(suite.os.pathsep)[0]
    assert (Path(package) / "edt_diffusion" / "__init__.py").is_file()
    assert told["error"].splitlines()[1:] == ["tests/a.py::b PASSED"]
    assert "error" in suite.run_tests(options(suite), CPU, suite.Deadline(5))
    assert len(asked) == 1


def test_tests_for_a_gpu_are_found_however_they_are_marked(suite, tmp_path, monkeypatch):
    texts = {
        "test_each": "@pytest.mark.gpu\n", "test_file": "pytestmark = [pytest.mark.slow, pytest.mark.gpu]\n",
        "test_case": "pytest.param(1, marks=pytest.mark.gpu)\n", "test_none": "gpu = 1\n",
    }  # fmt: skip
    (tmp_path / "tests").mkdir()
    for name, text in texts.items():
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    assert suite.files_of_tests() == [f"tests/test_{name}.py" for name in ("case", "each", "file")]


def test_what_compiles_comes_last_and_needs_time_left(suite, monkeypatch):
    for name, stand_in in {"measured_matmul_peak": 1e12, "release": None, "set_tf32": None}.items():
        monkeypatch.setattr(suite, name, lambda *_, stand_in=stand_in: stand_in)
    begun: list[bool] = []

    def rates(_size, _kind, compiled, *_):
        begun.append(compiled)
        return []

    monkeypatch.setattr(suite, "forward_rates", rates)
    monkeypatch.setattr(suite, "training_rates", rates)
    given = suite.parse_arguments(["--sizes", "S"])
    for left, expected in ((480, {False, True}), (200, {False}), (50, set())):
        begun.clear()
        found = suite.throughput(given, torch.device("cuda"), SimpleNamespace(left=lambda left=left: left))
        assert set(begun) == expected
        assert begun == sorted(begun)
        if left == 200:
            assert found["left_out"] == ["forward S bf16 compiled 256", "train S bf16 compiled 256"]


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
    with pytest.raises(UserError, match="different devices: h, other; name files of one device"):
        suite.merged([first, {**second, "name": "other"}])
