"""Held-out loss at fixed timesteps, noise and masks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import pictures, read_log, settings, trainer_in

from edt_diffusion.assemble import build_trainer, during
from edt_diffusion.training.validation import ValidationLoss
from edt_diffusion.util.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def loss_in(trainer, dataset, **options) -> ValidationLoss:
    return ValidationLoss(dataset, trainer.objective, trainer.accelerator, trainer.network, seed=3, **options)


@pytest.mark.parametrize("name", ["learned_variance", "v_prediction", "flow"])
def test_an_untrained_model_has_the_loss_of_a_zero_prediction(tmp_path, name):
    weighting = {"name": name, "loss_weighting": "none"} | ({} if name == "flow" else {"vb_weight": 0.0})
    trainer = trainer_in(tmp_path, objective=weighting)
    data = pictures(40)
    values = loss_in(trainer, data, batch_size=7)(0)
    assert values.keys() == {"val_loss", "val_loss_full", "val_loss_masked"}
    assert values["val_loss"] == pytest.approx(values["val_loss_full"] + values["val_loss_masked"])
    # The last layer is zero: the loss is the mean square of the target. Computed here from its definition.
    call = loss_in(trainer, data)
    x0 = data.batch(call.rows, np.zeros(40, dtype=np.int64), call.seed, False)
    for index, pass_name in enumerate(("full", "masked")):
        draws = call._draws(np.arange(40), torch.from_numpy(data.labels), tuple(x0.shape[1:]))
        noise, t = draws.passes[index].noise, draws.t
        if name == "learned_variance":
            target = noise
        elif name == "v_prediction":
            betas = np.linspace(1e-4, 0.02, 1000)
            a = torch.from_numpy(np.cumprod(1 - betas))[t].view(-1, 1, 1, 1)
            target = a.sqrt() * noise - (1 - a).sqrt() * x0
        else:
            target = noise - x0
        assert values[f"val_loss_{pass_name}"] == pytest.approx(float((target**2).mean()), rel=1e-5)


def test_timesteps_cover_the_range_evenly_and_never_change(tmp_path):
    trainer = trainer_in(tmp_path)
    call, again = loss_in(trainer, pictures(20)), loss_in(trainer, pictures(20))
    draws = call._draws(np.arange(20), None, (1, 8, 8))
    assert sorted(draws.t.tolist()) == [25 + 50 * i for i in range(20)]
    assert draws.t.tolist() != sorted(draws.t.tolist())
    assert draws.t.dtype == torch.int64
    other = again._draws(np.arange(20), None, (1, 8, 8))
    assert torch.equal(draws.passes[1].noise, other.passes[1].noise)
    assert torch.equal(draws.passes[1].masks.down[0], other.passes[1].masks.down[0])
    assert not torch.equal(draws.passes[0].noise, draws.passes[1].noise)


def test_it_depends_on_the_weights_and_not_on_batches_or_the_step(tmp_path):
    trainer = trainer_in(tmp_path)
    one = loss_in(trainer, pictures(20), batch_size=20)(0)
    for size in (1, 6):
        assert loss_in(trainer, pictures(20), batch_size=size)(77) == pytest.approx(one, rel=1e-5)
    with torch.no_grad():
        trainer.network.proj_out.bias.add_(1.0)
    assert loss_in(trainer, pictures(20))(0)["val_loss"] > one["val_loss"] * 1.1
    assert len(loss_in(trainer, pictures(20), pictures=8).rows) == 8


def test_a_share_is_held_out_judged_and_its_best_weights_are_kept(tmp_path):
    trainer = trainer_in(
        tmp_path,
        dataset=pictures(30),
        validation={"share": 0.2, "every": 2},
        optimizer={"schedule": "constant"},
        train={"steps": 6},
    )
    seen = set()
    batch = trainer.make_loader

    def watched(step):
        for made in batch(step):
            seen.update(float(picture.sum()) for picture in made["inputs"])
            yield made

    trainer.make_loader = watched
    assert trainer.fit()
    lines = {line["step"]: line["val_loss"] for line in read_log(tmp_path) if "val_loss" in line}
    assert sorted(lines) == [2, 4, 6]
    best = min(lines, key=lambda step: lines[step])
    assert (trainer.saving.best.value, trainer.saving.best.step) == (lines[best], best)
    assert (tmp_path / "best" / "model_index.json").is_file()
    whole = {float(p.sum()) for p in pictures(30).batch(np.arange(30), np.zeros(30, np.int64), 3, False)}
    assert len(seen & whole) <= 24 < len(whole)


def test_pictures_of_another_kind_are_refused(tmp_path: Path):
    from PIL import Image

    for name in ("church", "tench"):
        (tmp_path / "held" / name).mkdir(parents=True)
        for index in range(2):
            Image.new("L", (8, 8), index).save(tmp_path / "held" / name / f"{index}.png")
    config = settings(validation={"path": str(tmp_path / "held")})
    with pytest.raises(
        UserError, match=r"validation.path=.* has other class names \(\['church', 'tench'\]\) than test"
    ):
        build_trainer(config, tmp_path / "run", pictures(), quiet=True)
    with pytest.raises(UserError, match="were both given"):
        settings(validation={"path": "x", "share": 0.1})


def test_it_needs_no_float64_on_the_device(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path)
    call, reduced = loss_in(trainer, pictures(20), batch_size=7), []
    batches = [call._losses(places) for places in call._batches()]
    expected = torch.stack(batches).double().sum(0)
    expected = expected[:-1] / expected[-1]

    def reduce(totals, reduction):
        reduced.append(totals.dtype)
        return totals

    monkeypatch.setattr(call.accelerator, "reduce", reduce)
    values = call(0)
    assert {sums.dtype for sums in batches} == {torch.float32}
    assert reduced == [torch.float32]
    assert [values["val_loss_full"], values["val_loss_masked"]] == pytest.approx(expected.tolist(), rel=1e-6)


def test_nothing_to_hold_out_is_told_with_the_number_of_pictures(tmp_path, monkeypatch):
    config = settings(validation={"share": 0.1})
    with pytest.raises(UserError, match=r"validation.share=0.1 can hold out none of the 3 pictures of test"):
        build_trainer(config, tmp_path / "run", pictures(3), quiet=True)
    assert during.split_for_validation(config, pictures(4))[1] is not None
    monkeypatch.setattr(during, "open_dataset", lambda *_: [])
    with pytest.raises(UserError, match=r"validation.path=held has 0 pictures"):
        during.split_for_validation(settings(validation={"path": "held"}), pictures())
