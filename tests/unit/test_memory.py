import warnings

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch.autograd.graph import saved_tensors_hooks

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.models.masking import MaskPlan
from edt_diffusion.training.adan import Adan
from edt_diffusion.training.memory import (
    MemoryEstimate,
    available_memory,
    estimate_training_memory,
    fitting_micro_batches,
)
from edt_diffusion.util.errors import UserError

GIB = 2**30


def estimate(model, batch=3, passes=1, joint=False, precision="no", masks=False, **more):
    return estimate_training_memory(
        model, batch=batch, passes=passes, joint=joint, precision=precision, masks=masks, **more
    )


class Kept(saved_tensors_hooks):
    """Distinct storages that a real forward pass keeps, without those of the model."""

    def __init__(self, model):
        super().__init__(self.add, lambda tensor: tensor)
        self.own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self.tensors = []

    def add(self, tensor):
        self.tensors.append(tensor)
        return tensor

    @property
    def bytes(self):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(size for pointer, size in storages.items() if pointer not in self.own)


def measured(model, calls, precision="no"):
    model.train()
    kept = Kept(model)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), kept:
        outputs = [model(**call, return_dict=False) for call in calls]
    size = kept.bytes
    assert len(outputs) == len(calls)
    return size


def masked(model, batch):
    masks = MaskPlan(((0.4, 0.5),) * len(model.mask_grids)).draw(0, 0, list(range(batch)), model.mask_grids)
    return {**tiny_inputs(model, batch), "token_masks": masks}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("overrides", [{}, {"num_classes": None, "sample_size": (8, 12), "patch_size": 2}])
def test_activations_are_those_of_a_real_pass(precision, overrides):
    model = tiny_model(**overrides)
    found = estimate(model, precision=precision)
    assert found.activations == measured(model, [tiny_inputs(model, 3)], precision)
    assert found.at(5).activations == measured(model, [tiny_inputs(model, 5)], precision)
    assert found.fixed >= 0
    assert found.per_sample > 0


def test_two_passes_are_those_of_two_real_ones():
    model = tiny_model()
    calls = [tiny_inputs(model, 3), masked(model, 3)]
    assert estimate(model, passes=2, masks=True).activations == measured(model, calls)
    joint = estimate(model, passes=2, masks=True, joint=True)
    assert joint.activations == measured(model, [masked(model, 6)])
    assert estimate(model, passes=1, masks=True).activations == measured(model, [masked(model, 3)])


def test_bfloat16_needs_less_per_sample_and_copies_of_the_weights():
    model = tiny_model()
    full, half = estimate(model), estimate(model, precision="bf16")
    assert half.per_sample < full.per_sample
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "table" not in name)
    assert half.fixed - full.fixed > weights  # 2 bytes each, of nearly all


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    model = tiny_model()
    plain = estimate(model).activations
    blocks = [block for block in model.blocks if hasattr(block, "attn")]
    inside = []
    for block in blocks:  # what each real block keeps, beside its inputs and what earlier ones have kept
        forward = block.forward

        def counted(hidden_states, temb, skips, forward=forward):
            kept = Kept(model)
            kept.own |= {hidden_states.untyped_storage().data_ptr(), temb.untyped_storage().data_ptr()}
            with kept:
                output = forward(hidden_states, temb, skips)
            inside.append(kept.bytes)
            return output

        block.forward = counted
    measured(model, [tiny_inputs(model, 3)])
    for block in blocks:
        del block.forward
    model.enable_gradient_checkpointing()
    found = estimate(model).activations
    assert found == measured(model, [tiny_inputs(model, 3)]) + max(inside)
    assert found < plain / 2


def test_checkpointed_stages_are_respected():
    model = tiny_model()
    plain = estimate(model).activations
    model.set_checkpointed_stages([0])
    some = estimate(model).activations
    model.set_checkpointed_stages(True)
    everywhere = estimate(model).activations
    assert everywhere < some < plain
    assert estimate(model, checkpointing=False).activations == plain
    assert estimate(model, checkpointing=(0,)).activations == some
    assert model.gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert estimate(model, checkpointing=True).activations == everywhere
    assert not model.gradient_checkpointing


def test_what_is_counted():
    model = tiny_model()
    model.patch_embed.requires_grad_(False)
    frozen = sum(p.numel() for p in model.patch_embed.parameters())
    number = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    found = estimate(model, batch=1, optimizer_states=4, emas=3)
    assert found.weights == 4 * number + buffers
    assert found.gradients == found.update == 4 * (number - frozen)
    assert found.optimizer == 16 * (number - frozen)
    assert found.ema == 12 * (number - frozen)
    assert found.total == found.weights + 8 * found.gradients + max(found.activations, found.update)
    optimizer = Adan([p for p in model.parameters() if p.requires_grad])
    model.train()(**tiny_inputs(model), return_dict=False)[0].square().sum().backward()
    optimizer.step()
    kept = sum(t.numel() * 4 for state in optimizer.state.values() for t in state.values())
    assert found.optimizer == kept


def test_the_model_and_the_random_state_stay_as_they_are():
    model = tiny_model()
    model.enable_gradient_checkpointing()
    function = model._gradient_checkpointing_func
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    estimate(model, masks=True, precision="bf16")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.is_autocast_enabled("cpu")
    assert not model.training
    assert model._gradient_checkpointing_func is function
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_models_without_memory_of_their_own_have_an_estimate():
    with torch.device("meta"):
        model = EDTTransformer2DModel.from_size("S")
    found = estimate(model, batch=8, passes=2, masks=True)
    assert found.gradients == 4 * 38_329_146
    # The largest of its tensors alone, the hidden layer of the MLPs: before and after the activation, in 5 blocks at
    # 16x16, 5 at 8x8 and 2 at 4x4 tokens, twice.
    hidden = 4 * 4 * (5 * 256 * 312 + 5 * 64 * 416 + 2 * 16 * 520)
    assert 2 * 2 * hidden < found.per_sample < 10 * 2 * hidden


def fake(weights, per_sample):
    return MemoryEstimate(weights, 0, 0, 0, batch=1, fixed=0, per_sample=per_sample, update=0)


def test_the_smallest_number_of_micro_batches():
    curve = fake(weights=100, per_sample=10).at
    assert fitting_micro_batches(curve, 12, available=1000) == 1
    assert fitting_micro_batches(curve, 12, available=220, share=1.0) == 1  # 100 + 12 * 10
    assert fitting_micro_batches(curve, 12, available=219, share=1.0) == 2
    assert fitting_micro_batches(curve, 12, available=142, share=1.0) == 3  # 4 samples each
    assert fitting_micro_batches(curve, 12, available=139, share=1.0) == 4
    assert fitting_micro_batches(curve, 12, available=123) == 12  # 110.7 of it
    assert fitting_micro_batches(curve, 7, available=169, share=1.0) == 7  # no equal parts but single samples


def test_nothing_fits():
    with pytest.raises(UserError, match=r"one sample at a time needs 3\.0 GiB, 1\.8 GiB are .*gradient_checkpointing"):
        fitting_micro_batches(fake(2 * GIB, GIB).at, 8, 2 * GIB)


def test_lines_for_people():
    said = MemoryEstimate(GIB, 0, 4 * GIB, 3 * 2**20, batch=4, fixed=0, per_sample=GIB, update=0).lines()
    assert [line.split()[-2:] for line in said] == [
        ["1.0", "GiB"], ["0", "MiB"], ["4.0", "GiB"], ["3", "MiB"], ["4.0", "GiB"], ["9.0", "GiB"],
    ]  # fmt: skip
    assert said[4].startswith("activations of 4 ")


def test_a_container_leaves_less_than_the_machine(tmp_path):
    machine = available_memory("cpu", tmp_path)
    assert machine > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000\n")
    assert available_memory("cpu", tmp_path) == 350_000
    (tmp_path / "memory").mkdir()  # version 1 of control groups
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("500000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("400000\n")
    (tmp_path / "memory" / "memory.stat").write_text("total_inactive_file 1000\n")
    assert available_memory("cpu", tmp_path) == 101_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert available_memory("cpu", tmp_path) > 1_000_000


def test_whole_gradients_are_not_spread():
    parts = {"weights": 10, "gradients": 8, "optimizer": 32, "ema": 8, "update": 9}
    whole = MemoryEstimate(**parts, batch=2, fixed=3, per_sample=5)
    for kept in (False, True):
        share = whole.spread(4, kept)
        assert (share.weights, share.optimizer, share.ema, share.update) == (3, 8, 2, 3)
        assert (share.gradients, share.activations) == (8 if kept else 2, 13)


def test_compiled_blocks_may_have_their_graphs_where_torch_takes_no_limit(monkeypatch):
    settings = torch._dynamo.config
    monkeypatch.setattr(torch, "compile", lambda model=None, *, fullgraph=False: model)  # torch 2.8's has no limit
    for present, wanted in ((8, 64), (100, 100)):
        with settings.patch(recompile_limit=present):  # monkeypatch would leave it hidden
            tiny_model().compile_repeated_blocks(fullgraph=True)
            assert settings.recompile_limit == wanted
