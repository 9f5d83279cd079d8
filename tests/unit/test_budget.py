"""What a run is told about its memory, and how `--batch auto` cuts its batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import pictures, settings
from tiny_models import TINY, tiny_model

from edt_diffusion.assemble import budget, build_trainer
from edt_diffusion.util.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes there are."""

    def put(number: float) -> None:
        monkeypatch.setattr(budget, "available_memory", lambda _device: int(number))

    return put


def config_of(**train):
    return settings(model={name: TINY[name] for name in ("depths", "dims", "num_heads")}, train=train)


@pytest.mark.parametrize(
    ("asked", "device", "sharding", "joint"),
    [
        (None, CPU, "none", False),
        (None, GPU, "none", True),
        (None, CPU, "fsdp2", True),  # whole weights are gathered once instead of twice
        (False, GPU, "fsdp2", False),
        (True, CPU, "none", True),
    ],
)
def test_both_passes_are_one_batch_where_that_is_faster_or_asked_for(asked, device, sharding, joint):
    assert budget.joint_passes(config_of(joint_passes=asked, sharding=sharding), device) is joint


def job(processes: int, others: list[int]) -> Any:
    """Processes on a CPU, of which the others need so many micro-batches."""
    return SimpleNamespace(
        device=CPU, num_processes=processes, gather=lambda mine: torch.cat([mine, torch.tensor(others).long()])
    )


@pytest.mark.parametrize(("processes", "sizes"), [(1, [16, 8, 1]), (2, [8, 4, 1])])
def test_the_batch_is_cut_until_it_fits_and_no_further(free, processes, sizes):
    config, model = config_of(batch_size=16, micro_batches=2), tiny_model()
    needed = budget.estimate(config, model, CPU, processes, 1)
    assert needed.batch == 16 // processes
    for size in sizes:
        free(needed.at(size).total / 0.9 + 1)  # a tenth is left for what the estimate does not know
        fitted = budget.fitted(config, model, job(processes, [])).train
        assert (fitted.micro_batches * size * processes, fitted.batch_size) == (16, 16)
        assert size == 1 or needed.at(size // 2).total < needed.at(size).total
    free(2**40)
    assert budget.fitted(config, model, job(2, [4])).train.micro_batches == 4  # the fullest device decides


def test_what_the_settings_ask_for_is_counted():
    model = tiny_model()

    def needs(**changes):
        config = config_of(batch_size=4)
        for group, values in changes.items():
            whole = getattr(config, group)
            config = config.model_copy(update={group: whole.model_copy(update=values)})
        return budget.estimate(config, model, CPU, 1, 1)

    plain, size = needs(), 4 * sum(p.numel() for p in model.parameters())
    assert plain.gradients == size
    assert needs(ema={"power": (0.05, 0.1)}).ema == plain.ema + 2 * size
    assert (plain.optimizer, needs(optimizer={"name": "adamw"}).optimizer) == (4 * size, 2 * size)
    assert needs(train={"gradient_checkpointing": True}).per_sample < 0.8 * plain.per_sample
    assert needs(objective={"passes": "full"}).per_sample < 0.6 * plain.per_sample


def test_a_run_that_may_not_fit_is_told_before_it_starts(free):
    config, model = config_of(batch_size=8), tiny_model()
    needed = budget.estimate(config, model, CPU, 1, 1).total
    free(3 * 2**30)
    assert budget.memory_lines(config, model, CPU, 1) == ["memory: about 0.0 GiB of 3.0 GiB free"]
    free(needed - 1)
    first, *table, last = budget.memory_lines(config, model, CPU, 1)
    assert first.startswith("memory: about ")
    assert [line.split("  ")[0].strip() for line in table] == [
        "weights", "gradients", "optimizer", "averages", "activations of 8", "together",
    ]  # fmt: skip
    assert last.startswith("this may not fit: try --batch auto")


def test_a_sample_that_does_not_fit_is_one_line(free):
    free(1000)
    with pytest.raises(
        UserError, match=r"one sample at a time needs .* MiB.*train.gradient_checkpointing=true"
    ) as told:
        budget.fitted(config_of(batch_size=8), tiny_model(), job(1, []))
    assert "\n" not in str(told.value)


def test_a_batch_cut_to_fit_trains_the_same_weights(tmp_path, free):
    # A large eps: with the usual one, Adan makes whole steps out of rounding errors where the true gradient is zero.
    config = settings(optimizer={"eps": 1e-2}, train={"steps": 3, "batch_size": 4})
    whole = build_trainer(config, tmp_path / "whole", pictures(), quiet=True)
    assert whole.config.micro_batches == 1
    assert whole.fit()
    free(budget.estimate(config, whole.network, CPU, 1, 4).total / 0.9 + 1)
    cut = build_trainer(config, tmp_path / "cut", pictures(), quiet=True, batch_auto=True)
    assert cut.config.micro_batches == 4
    assert cut.fit()
    ours = whole.network.state_dict()
    for name, tensor in cut.network.state_dict().items():
        torch.testing.assert_close(tensor, ours[name], rtol=1e-5, atol=1e-6)


def test_a_batch_that_processes_cannot_share_is_told_in_the_loader_s_words(free):
    free(1000)  # and not what would fit
    words = r"global batch {} cannot be split evenly over 4 processes: expected a multiple of 4, such as {}"
    for batch, better in ((2, 4), (6, 8)):
        config = config_of(batch_size=batch)
        with pytest.raises(UserError, match=words.format(batch, better)):
            budget.fitted(config, tiny_model(), job(4, []))
        with pytest.raises(UserError, match=words.format(batch, better)):
            budget.memory_lines(config, tiny_model(), CPU, 4)


def test_sharded_gradients_stay_whole_between_micro_batches(free):
    config, model = config_of(batch_size=16, sharding="fsdp2"), tiny_model()
    size = 4 * sum(p.numel() for p in model.parameters())
    one, cut = (budget.estimate(config, model, CPU, 2, micro) for micro in (1, 2))
    assert (one.gradients, one.optimizer, one.weights < size) == (size // 2, 2 * size, True)
    assert (cut.gradients, cut.optimizer, cut.weights, cut.batch) == (size, 2 * size, one.weights, 4)
    assert cut.total < one.total
    for enough, micro in ((one.total, 1), (one.total - 1, 2), (cut.total, 2), (cut.total - 1, 4)):
        free(enough / 0.9 + 1)
        assert budget.fitted(config, model, job(2, [])).train.micro_batches == micro
