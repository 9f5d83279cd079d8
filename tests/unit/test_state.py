import json
import logging

import pytest
import torch

from edt_diffusion.training import state as state_module
from edt_diffusion.training.optim import build_optimizer
from edt_diffusion.training.parts import load_weights, pack_optimizer, unpack_optimizer
from edt_diffusion.training.state import Checkpoint, CheckpointStore
from edt_diffusion.util.errors import UserError


def checkpoint(value: float = 1.0) -> Checkpoint:
    tensors = {"model": {"w": torch.full((3,), value)}, "ema": {"w": torch.full((3,), -value)}, "timesteps": {}}
    return Checkpoint(tensors, {"step": int(value), "nested": {"list": [1, 2.5, None]}})


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def test_what_is_saved_is_loaded_bit_for_bit(store):
    assert store.steps() == []
    assert store.newest() is None
    store.save(5, checkpoint(5.0))
    loaded = store.load(5)
    assert loaded.numbers == {"step": 5, "nested": {"list": [1, 2.5, None]}}
    assert set(loaded.tensors) == {"model", "ema", "timesteps"}
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((3,), 5.0))
    assert loaded.tensors["timesteps"] == {}


def test_only_the_newest_are_kept(store):
    for step in (1, 2, 30, 4):
        store.save(step, checkpoint(step))
    assert store.steps() == [4, 30]
    assert store.newest() == 30


def test_newer_damaged_folders_neither_displace_what_is_saved_nor_stay(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=9)
    for step in (2, 4, 6, 8):
        store.save(step, checkpoint(step))
    for step in (6, 8):
        (store.path(step) / "model.safetensors").unlink()
    resumed = CheckpointStore(tmp_path / "checkpoints", keep_last=3)
    newest = resumed.newest()
    assert newest == 4
    resumed.load(newest)
    assert resumed.steps() == [2, 4, 6, 8]  # until something has been saved
    resumed.save(7, checkpoint(7))
    assert resumed.steps() == [2, 4, 7]
    resumed.keep_last = 1
    resumed.save(9, checkpoint(9))
    assert resumed.steps() == [9]


def test_the_step_just_written_stays_whatever_else_is_there(store):
    store.keep_last = 1
    (store.folder / "step-00000009").mkdir(parents=True)
    store.save(3, checkpoint(3))
    assert 3 in store.steps()
    assert store.newest() == 3


def test_a_save_that_fails_removes_nothing(store, monkeypatch):
    for step in (1, 2):
        store.save(step, checkpoint(step))
    store.load(1)

    def full(*_arguments):
        raise OSError("no")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(OSError, match="no"):
        store.save(3, checkpoint(3))
    assert store.steps() == [1, 2]


def test_a_kill_in_the_middle_leaves_no_step_folder(store, monkeypatch):
    store.save(1, checkpoint(1))
    save_file, calls = state_module.save_file, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_file(*arguments)

    monkeypatch.setattr(state_module, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save(2, checkpoint(2))
    assert len(calls) == 2
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    calls.clear()
    monkeypatch.setattr(state_module, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save(1, checkpoint(7))  # replacing leaves the old one whole
    assert store.damage(1) is None
    assert store.load(1).numbers["step"] == 1


def test_temporary_folders_of_a_killed_process_are_not_steps(store):
    store.save(1, checkpoint(1))
    (store.folder / ".step-00000002.0123abcd.tmp").mkdir()
    (store.folder / "step-x").mkdir()
    assert store.steps() == [1]


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flip": (lambda folder: flip_a_byte(folder / "ema.safetensors"), "ema.safetensors", "has changed"),
    "truncation": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20]),
        "model.safetensors",
        "has 20 bytes",
    ),
    "missing": (lambda folder: (folder / "state.json").unlink(), "state.json", "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json", "missing or unreadable"),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:50]),
        "manifest.json",
        "missing or unreadable",
    ),
    "not a manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json", "unreadable"),
    "other entries": (
        lambda folder: (folder / "manifest.json").write_text(json.dumps({"state.json": {}})),
        "manifest.json",
        "unreadable",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_is_named_and_the_older_checkpoint_used(kind, store, caplog):
    damage, file, words = DAMAGES[kind]
    store.save(1, checkpoint(1))
    store.save(2, checkpoint(2))
    damage(store.path(2))
    problem = store.damage(2)
    assert problem is not None
    assert str(store.path(2) / file) in problem
    assert words in problem
    with caplog.at_level(logging.WARNING):
        assert store.newest() == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{problem}: going on from the checkpoint of step 1 instead"
    ]


def test_all_damaged_is_an_error_that_names_the_newest_and_the_remedy(store):
    for step in (1, 2):
        store.save(step, checkpoint(step))
        (store.path(step) / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        store.newest()
    message = str(caught.value)
    assert str(store.path(2) / "model.safetensors") in message
    assert "restore the folder from a copy, or delete it" in message
    assert "\n" not in message


def test_load_weights_says_how_another_architecture_differs():
    source = torch.nn.Linear(3, 2)
    target = torch.nn.Linear(3, 2)
    load_weights(target, source.state_dict(), "the file")
    assert torch.equal(target.weight, source.weight)
    with pytest.raises(UserError, match=r"weight is \(2, 4\) there and \(2, 3\) in this model"):
        load_weights(target, torch.nn.Linear(4, 2).state_dict(), "the file")
    with pytest.raises(
        UserError, match=r"the file is of another architecture: 1 tensors missing.*bias is missing there"
    ):
        load_weights(target, {"weight": source.weight}, "the file")
    with pytest.raises(UserError, match=r"1 unknown.*extra is not part of this model"):
        load_weights(target, {**source.state_dict(), "extra": source.bias}, "the file")
    assert torch.equal(target.weight, source.weight)


def trained(name: str, steps: int, **settings):
    """A small network after `steps` updates with gradients that depend on its weights."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.GELU(), torch.nn.Linear(5, 2))
    optimizer = build_optimizer(name, list(network.parameters()), 0.01, **settings)
    run(network, optimizer, range(steps))
    return network, optimizer


def run(network, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        network(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adan", "adamw"])
def test_an_optimizer_goes_on_bitwise_after_pack_store_and_unpack(name, store):
    whole, whole_optimizer = trained(name, 6, weight_decay=0.1)
    half, half_optimizer = trained(name, 3, weight_decay=0.1)
    tensors, numbers = pack_optimizer(half_optimizer)
    store.save(3, Checkpoint({"model": half.state_dict(), "optimizer": tensors}, {"optimizer": numbers}))
    loaded = store.load(3)
    resumed, resumed_optimizer = trained(name, 0, weight_decay=0.1)
    resumed.load_state_dict(loaded.tensors["model"])
    unpack_optimizer(resumed_optimizer, loaded.tensors["optimizer"], loaded.numbers["optimizer"])
    again, again_numbers = pack_optimizer(resumed_optimizer)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert again_numbers == numbers
    run(resumed, resumed_optimizer, range(3, 6))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    final, expected = pack_optimizer(resumed_optimizer), pack_optimizer(whole_optimizer)
    assert all(torch.equal(final[0][key], expected[0][key]) for key in expected[0])
    assert final[1] == expected[1]


def test_unpack_keeps_this_run_s_settings_and_the_saved_progress():
    _, old = trained("adan", 3, weight_decay=0.1, betas=(0.9, 0.8, 0.7))
    _, new = trained("adan", 0, weight_decay=0.2, betas=(0.5, 0.4, 0.3))
    unpack_optimizer(new, *pack_optimizer(old))
    group = new.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["step"]) == (0.2, (0.5, 0.4, 0.3), 3)


def test_unpack_refuses_another_optimizer():
    _, adan = trained("adan", 2)
    _, adamw = trained("adamw", 2)
    with pytest.raises(ValueError, match="Adan's, this run uses AdamW"):
        unpack_optimizer(adamw, *pack_optimizer(adan))
    with pytest.raises(ValueError, match="AdamW's, this run uses Adan"):
        unpack_optimizer(adan, *pack_optimizer(adamw))
    _, more = trained("adan", 0)
    more.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="1 parameter groups, this run's has 2"):
        unpack_optimizer(more, *pack_optimizer(adan))


@pytest.mark.parametrize("keep", range(1, 8))
@pytest.mark.parametrize("every", [0, 3])
def test_the_newest_checkpoints_stay_and_every_nth(tmp_path, keep, every):
    store = CheckpointStore(tmp_path, keep_last=keep, keep_every=every)
    for step in range(1, 11):
        store.save(step, Checkpoint({"model": {}}, {"step": step}))
        newest = set(range(max(1, step - keep + 1), step + 1))
        assert set(store.steps()) == newest | {s for s in range(1, step + 1) if every and s % every == 0}


def test_unpack_refuses_the_state_of_other_tensors():
    """As many tensors as this run trains, but others."""

    def of(*shapes):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(shape)) for shape in shapes])
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer

    packed = pack_optimizer(of((2, 3), (4,)))
    with pytest.raises(ValueError, match=r"shape \(4,\) where this run's has \(5,\): freeze the same parts"):
        unpack_optimizer(of((2, 3), (5,)), *packed)
    fitting = of((2, 3), (4,))
    unpack_optimizer(fitting, *packed)
    assert fitting.state_dict()["state"][1]["exp_avg"].shape == (4,)
