"""Speeds side by side: what is timed, in which direction ratios are, and that they are not measured twice."""

import pytest
import torch

from edt_diffusion.config import parse_config
from edt_diffusion.profiling.side_by_side import Timings
from edt_diffusion.studies.matrix import Budget
from edt_diffusion.studies.reproduce import Request, base, quality, speed
from edt_diffusion.studies.reproduce.base import Pictures, choose_base
from edt_diffusion.studies.reproduce.quality_tables import STUDIES

LAYOUTS = {
    "edt": {"name": "EDT", "depths": [1, 1, 1], "dims": [16, 24, 16], "num_heads": [2, 2, 2]},
    "dit": {"name": "DiT", "depth": 2, "hidden_size": 16, "num_heads": 2},
    "mdt": {"name": "MDTv2", "depth": 3, "decode_layers": 1, "hidden_size": 16, "num_heads": 2},
}


def config_of(name):
    shared = {"sample_size": 8, "patch_size": 1, "in_channels": 3, "num_classes": 4}
    return parse_config({"model": {**shared, **LAYOUTS[name]}, "data": {}, "train": {"batch_size": 4}})


@pytest.fixture
def slower_mdt(monkeypatch):
    """Every task is called once; MDTv2 is said to take two seconds, the others one."""
    called = []

    def in_turn(tasks, rounds, warmup=1, device=None, clock=None):
        for name, task in tasks.items():
            task()
            called.append(name)
        return Timings({name: [2.0 if name in ("mdt", "MDTv2") else 1.0] * rounds for name in tasks})

    monkeypatch.setattr(speed, "in_turn", in_turn)
    return called


def test_steps_train_and_passes_do_not():
    for name in LAYOUTS:
        contender = speed.Contender(config_of(name), 2, torch.device("cpu"))
        unused = set(contender.network.masked_only()) if contender.objective.mask_plan is None else set()
        before = {key: value.clone() for key, value in contender.network.named_parameters() if key not in unused}
        contender.forward()
        assert all(torch.equal(before[key], value) for key, value in contender.network.named_parameters()
                   if key in before)  # fmt: skip
        contender.step()
        moved = [key for key, value in contender.network.named_parameters() if key in before
                 and not torch.equal(before[key], value)]  # fmt: skip
        assert len(moved) > 0.9 * len(before), name
        assert contender.memory > 4 * 4 * sum(value.numel() for value in before.values())
    passes = {name: speed.Contender(config_of(name), 2, torch.device("cpu")).objective.passes for name in LAYOUTS}
    assert {name: len(found) for name, found in passes.items()} == {"edt": 2, "dit": 1, "mdt": 2}


def test_ratios_say_how_many_times_as_fast_as_the_reference(slower_mdt):
    speeds = speed.compare({name: config_of(name) for name in LAYOUTS}, "mdt", 2, torch.device("cpu"))
    assert [speeds.training[name].value for name in LAYOUTS] == [2.0, 2.0, 1.0]
    assert [speeds.sampling[name].value for name in LAYOUTS] == [2.0, 2.0, 1.0]
    assert slower_mdt == [*LAYOUTS, *LAYOUTS]
    again = speed.Speeds.of_facts(speeds.facts())
    assert again == speeds


def test_speeds_of_the_same_arms_are_kept(slower_mdt, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "look_at", lambda path: Pictures(path, False, 8, 3, 1, 4))
    path = tmp_path / "own.yaml"
    path.write_text(
        "model: {patch_size: 1, depths: [1, 1, 1], dims: [48, 48, 48], num_heads: [2, 2, 2]}\n"
        "data: {size: 8}\ntrain: {batch_size: 2}\n"
    )
    request = Request("table1", tmp_path, data="x", config=str(path), image_size=8, seeds=1)
    study, chosen = STUDIES["table1"], choose_base(request, None, 2)
    matrix = quality.build_matrix(study, chosen, request, Budget("steps", 2))
    first = quality.measured_speeds(study, chosen, matrix, request)
    assert first.training["edt"].value == 2.0
    count = len(slower_mdt)
    assert quality.measured_speeds(study, chosen, matrix, request) == first
    assert len(slower_mdt) == count
    other = choose_base(Request(**{**vars(request), "overrides": ("model.mlp_ratio=2.0",)}), None, 2)
    quality.measured_speeds(study, other, quality.build_matrix(study, other, request, Budget("steps", 2)), request)
    assert len(slower_mdt) == 2 * count
