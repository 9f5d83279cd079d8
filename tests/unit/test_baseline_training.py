"""Runs of DiT, of MDTv2 and of EDT with a side interpolater: what is usual, exact resumes, what stays as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import assert_same_run, final_state, pictures, settings, trainer_in, weights

from edt_diffusion.assemble import build_trainer
from edt_diffusion.config import parse_config
from edt_diffusion.training.state import CheckpointStore
from edt_diffusion.util.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_STAGE = {"patch_size": 1, "hidden_size": 16, "num_heads": 2}
STAGED = {"patch_size": 1, "depths": [1] * 3, "dims": [16] * 3, "num_heads": [2] * 3}
MODELS: dict[str, dict[str, Any]] = {
    "DiT": {"name": "DiT", "depth": 2, **ONE_STAGE},
    "MDTv2": {"name": "MDTv2", "depth": 4, "decode_layers": 2, **ONE_STAGE},
    "EDT with MDT's masks": {"name": "EDT", "side_interpolater": True, **STAGED},
}
OPTIMIZERS = {"DiT": "adamw", "MDTv2": "adan", "EDT with MDT's masks": "adamw"}


def begun(folder: Path, kind: str, **changes: Any) -> Any:
    return trainer_in(folder, model=MODELS[kind], optimizer={"name": OPTIMIZERS[kind]}, **changes)


@pytest.mark.parametrize("kind", MODELS)
def test_half_a_run_and_a_new_trainer_equal_the_whole_run_bitwise(tmp_path, kind):
    whole = begun(tmp_path / "whole", kind)
    first = weights(whole)
    passes = tuple(whole.objective.passes)
    assert passes == (("full",) if kind == "DiT" else ("full", "masked"))
    assert whole.fit()
    assert begun(tmp_path / "half", kind, train={"steps": 3}).fit()
    assert begun(tmp_path / "half", kind).fit()
    assert_same_run(tmp_path / "half", tmp_path / "whole", 6)
    last = final_state(tmp_path / "whole", 6)[0]
    moved = {name for name, value in first.items() if not torch.equal(last[f"model/{name}"], value)}
    trained = {name for name, _ in whole.network.named_parameters()}
    assert moved == trained  # the side interpolater and learned positions too, and no table that is fixed
    assert {name.removeprefix("ema/") for name in last if name.startswith("ema/")} >= trained


@pytest.mark.parametrize("kind", ["MDTv2", "EDT with MDT's masks"])
@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_without_masked_passes_what_only_they_use_is_frozen(tmp_path, kind, optimizer):
    changes: dict[str, Any] = {"objective": {"passes": "full"}, "optimizer": {"name": optimizer, "weight_decay": 0.1}}
    trainer = trainer_in(tmp_path, model=MODELS[kind], **changes)
    network, start = trainer.network, weights(trainer)
    idle = set(network.masked_only())
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == idle
    assert any("mask_token" in name for name in idle)
    assert trainer.fit()
    groups = CheckpointStore(tmp_path / "checkpoints").load(6).tensors
    for name in idle:
        assert torch.equal(groups["model"][name], start[name])
        assert name not in groups["ema"]
        assert not any(key.startswith(f"{name}/") or key.endswith(f"/{name}") for key in groups["optimizer"])
    assert sum(not torch.equal(groups["model"][name], value) for name, value in start.items()) > 20
    resumed = trainer_in(tmp_path, model=MODELS[kind], train={"steps": 7}, **changes)
    assert {name for name, p in resumed.network.named_parameters() if not p.requires_grad} == idle
    assert resumed.fit()


@pytest.mark.parametrize("kind", ["MDTv2", "EDT with MDT's masks"])
def test_passes_that_train_other_parameters_are_refused_in_a_run_that_goes_on(tmp_path, kind):
    both, full = {"objective": {"passes": "full+masked"}}, {"objective": {"passes": "full"}}
    for folder, first, then in ((tmp_path / "both", both, full), (tmp_path / "full", full, both)):
        assert begun(folder, kind, train={"steps": 2}, **first).fit()
        with pytest.raises(UserError, match=r"begun with objective.passes=full.* is trained from the start or not at"):
            begun(folder, kind, **then)
        assert begun(folder, kind, train={"steps": 3}, **first).fit()


def test_passes_of_a_network_without_such_parameters_may_change_and_change_back(tmp_path):
    plain = {"name": "EDT", **STAGED}
    for step, passes in enumerate(("full+masked", "full", "full", "full+masked"), start=1):
        trainer = trainer_in(tmp_path, model=plain, train={"steps": step}, objective={"passes": passes})
        assert trainer.fit()
        assert trainer.step == step


@pytest.mark.parametrize(
    ("objective", "told"),
    [({"passes": "full", "masks": {"down": [[0.1, 0.2]]}}, True), ({"passes": "full"}, False),
     ({"passes": "full", "masks": {"down": [[0.4, 0.5]]}}, False),  # the usual ones, as in a run's config.yaml
     ({"passes": "full+masked", "masks": {"down": [[0.1, 0.2]]}}, False)],
)  # fmt: skip
def test_masks_without_a_masked_pass_are_told(tmp_path, capsys, objective, told):
    config = settings(model={"depths": [1] * 3, "dims": [16] * 3, "num_heads": [2] * 3}, objective=objective)
    build_trainer(config, tmp_path, pictures()).lock.release()
    assert ("objective.masks has no effect with objective.passes=full" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("kind", "objective", "message"),
    [
        ("DiT", {"passes": "full+masked"}, "DiT takes no token masks; use objective.passes=full"),
        ("DiT", {"passes": "masked"}, "DiT takes no token masks"),
        ("MDTv2", {"masks": {"down": [[0.4, 0.5]], "input": [0.3, 0.5]}}, r"0 down-samplings: .*objective.masks.down="),
        ("MDTv2", {"masks": {"down": []}}, "masks that hide nothing: use passes=full"),
        ("MDTv2", {"masks": {"down": [], "stage0": [0.1, 0.2]}}, "the model has no down-sampling: leave it out"),
        (
            "EDT with MDT's masks",
            {"masks": {"down": [], "stage0": [0.1, 0.2], "input": [0.3, 0.5]}},
            "are both given: give one of them",
        ),
    ],
)
def test_masks_that_a_backbone_does_not_take(tmp_path, kind, objective, message):
    with pytest.raises(UserError, match=message):
        begun(tmp_path, kind, objective=objective)


def test_masks_at_the_input_need_a_side_interpolater(tmp_path):
    with pytest.raises(UserError, match=r"objective.masks.input needs model.side_interpolater=true"):
        trainer_in(tmp_path, model={"name": "EDT", **STAGED}, objective={"masks": {"down": [], "input": [0.3, 0.5]}})


@pytest.mark.parametrize("kind", MODELS)
def test_micro_batches_and_joint_passes_make_the_same_step(tmp_path, kind):
    """Input masks are those of the sample, however the batch is cut; passes with fewer tokens are not joined."""

    def after(folder: str, **train: Any) -> dict[str, torch.Tensor]:
        trainer = begun(tmp_path / folder, kind, train={"steps": 1, "batch_size": 4, **train})
        seen: dict[str, torch.Tensor] = {}

        def keep(set_to_none: bool = True) -> None:
            seen.update({name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None})

        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # behind the initial zeros there are no gradients
            for parameter in trainer.network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer.optimizer.zero_grad = keep
        trainer.update(0, trainer.make_loader(0))
        trainer.lock.release()
        return seen

    one = after("one")
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert len(one) == len(list(begun(tmp_path / "new", kind).network.parameters()))
    for other in (after("cut", micro_batches=2), after("joint", joint_passes=True)):
        assert max(float((other[name] - one[name]).abs().max()) for name in one) <= 1e-6 * largest


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"name": "DiT", "depths": [1, 1, 1]}, "model.depths is a setting of EDT, not of DiT: leave it out"),
        ({"name": "EDT", "depth": 4}, "model.depth is a setting of DiT and MDTv2, not of EDT"),
        ({"name": "DiT", "decode_layers": 2}, "model='{name: DiT, size: S}'"),
        ({"name": "DiT", "dept": 2}, "unknown key 'model.dept' in the configuration .did you mean 'model.depth'"),
    ],
)
def test_settings_of_another_backbone(model, said):
    with pytest.raises(UserError, match=said):
        parse_config({"model": model})
