import json

import pytest
import torch

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.pipelines import ClassConditionalPipeline, make_scheduler
from edt_diffusion.pipelines.loading import load_pipeline
from edt_diffusion.training.ema import EMAConfig, EMASet, PowerEMA
from edt_diffusion.training.posthoc import SnapshotStore, reconstruct

TINY = {
    "sample_size": 8, "patch_size": 1, "in_channels": 1, "num_classes": 2,
    "depths": [1, 1, 1], "dims": [8, 8, 8], "num_heads": [2, 2, 2],
}  # fmt: skip


@pytest.fixture
def averaged(tmp_path):
    """A run of 32 steps at random with averages of two widths, and its average of width 0.15."""

    def make(name="run", widths=(0.05, 0.1)):
        folder = tmp_path / name
        model = EDTTransformer2DModel(**TINY)
        averages, direct = EMASet(model, EMAConfig(power=widths)), PowerEMA(model, 0.15)
        store = SnapshotStore(folder / "ema")
        draws = torch.Generator().manual_seed(0)
        for step in range(1, 33):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
            averages.update(model)
            direct.update(model)
            store.save(step, *averages.snapshot())
        pipeline = ClassConditionalPipeline(model, make_scheduler("ddpm"), class_names=["a", "b"])
        pipeline.save_pretrained(folder / "model")
        return folder, direct.state_dict()["parameters"]

    return make


def test_another_width_becomes_a_folder_to_sample_from(edt, averaged, tmp_path):
    run, direct = averaged()
    said = edt("ema", run, "--sigma-rel", "0.15", "--json")
    assert (said.code, said.err) == (0, [])
    facts = json.loads(said.out[-1])
    assert {key: facts[key] for key in ("folder", "sigma_rel", "step", "snapshots")} == {
        "folder": str(run / "ema-0.150"), "sigma_rel": 0.15, "step": 32, "snapshots": 32,
    }  # fmt: skip
    assert 0 < facts["fit_error"] < 0.01
    made = dict(load_pipeline(facts["folder"]).transformer.named_parameters())
    newest = dict(load_pipeline(run).transformer.named_parameters())
    for name, wanted in direct.items():
        spread = (newest[name] - wanted).norm()
        assert (made[name] - wanted).norm() < 0.02 * spread
    assert load_pipeline(facts["folder"]).class_names == ["a", "b"]
    said = edt("sample", facts["folder"], "-n", 1, "--steps", 2, "--out", tmp_path / "s", "--quiet")
    assert (said.code, said.err) == (0, [])


def test_an_earlier_step_in_a_folder_of_ones_own(edt, averaged, tmp_path):
    run, _ = averaged()
    said = edt("ema", run, "--sigma-rel", "0.1", "--step", 20)
    assert said.out == [f"wrote {run / 'ema-0.100-step-00000020'}: width 0.1 at step 20, fit error 0.0%"]
    out = tmp_path / "new" / "folder"
    assert edt("ema", run, "--sigma-rel", "0.1", "--step", 20, "--out", out).code == 0
    stored = reconstruct(run / "ema", 0.1, 20).parameters
    for name, parameter in load_pipeline(out).transformer.named_parameters():
        assert torch.equal(parameter, stored[name])


def test_the_listing(edt, averaged):
    run, _ = averaged()
    said = edt("ema", run)
    assert (said.code, said.err) == (0, [])
    assert said.out[:5] == [
        f"{run / 'ema'}: 32 snapshots",
        "steps      1, 2, 3, ..., 31, 32",
        "widths     0.05, 0.1",
        "possible   --sigma-rel between 0 and 0.28",
        "fit error  at step 32; 0 is exact",
    ]
    assert "  0.05     0.0%" in said.out
    facts = json.loads(edt("ema", run, "--step", 8, "--json").out[-1])
    assert facts["steps"] == list(range(1, 9))
    assert facts["range"] == [0.0, 0.28]
    assert facts["fit_errors"]["0.1"] < 1e-7
    assert facts["fit_errors"]["0.15"] == reconstruct(run / "ema", 0.15, 8).fit_error
    run, _ = averaged("single", (0.05,))
    said = edt("ema", run)
    assert "that width only" in said.out[3]
    assert said.out[5:] == ["  0.05     0.0%"]


def test_mistakes(edt, averaged, tmp_path):
    run, _ = averaged()
    single, _ = averaged("single", (0.05,))
    (tmp_path / "empty").mkdir()
    (run / "ema-0.200").mkdir()
    for arguments, said in [
        ((tmp_path / "rum", "--sigma-rel", "0.1"), f"did you mean '{run}'"),
        ((tmp_path / "empty", "--sigma-rel", "0.1"), "train with ema.power=[0.05,0.10]"),
        ((tmp_path / "empty",), "train with ema.power=[0.05,0.10]"),
        ((single, "--sigma-rel", "0.1"), "one width (0.05) only"),
        ((run, "--sigma-rel", "0.3"), "width 0.3: expected a number between 0 and 0.28"),
        ((run, "--sigma-rel", "nan"), "width nan: expected a number"),
        ((run, "--sigma-rel", "0.1", "--step", 33), "step 33 is not reached: the newest snapshot is of step 32"),
        ((run, "--sigma-rel", "0.2"), "exists already"),
        ((run, "--out", tmp_path / "x"), "--out needs --sigma-rel"),
    ]:
        outcome = edt("ema", *arguments)
        assert outcome.code == 2
        assert outcome.out == []
        assert len(outcome.err) == 1
        assert said in outcome.err[0]
    assert not (run / "ema-0.100").exists()


def test_averages_of_another_model_are_refused(edt, averaged):
    run, _ = averaged()
    other = EDTTransformer2DModel(**{**TINY, "num_classes": 3})
    ClassConditionalPipeline(other, make_scheduler("ddpm")).save_pretrained(run / "model")
    outcome = edt("ema", run, "--sigma-rel", "0.1")
    assert outcome.code == 2
    assert "1 parameters differ, such as class_embedder.weight" in outcome.err[0]
    assert not (run / "ema-0.100").exists()


def test_help_fits_a_screen_and_ends_with_an_example(edt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = edt("ema", "--help")
    assert (said.code, said.err) == (0, [])
    assert len(said.out) <= 40
    assert max(map(len, said.out)) <= 80
    assert said.out[-1].strip() == "Example: edt ema runs/a --sigma-rel 0.1"
