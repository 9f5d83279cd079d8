import copy
import itertools

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tiny_models import randomise, tiny_inputs, tiny_model

from edt_diffusion.models import backbone
from edt_diffusion.nn.attention import GridAttention, RelativePositionBias, explicit_attention, relative_position_index
from edt_diffusion.nn.modulation import modulation_matrix

GRIDS = [(4, 4), (8, 8), (16, 16), (3, 7)]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (2, 2), (2, 5), (5, 3), (4, 4)])
def test_index_against_brute_force(height, width):
    cells = list(itertools.product(range(height), range(width)))
    expected = [[(r - s + height - 1) * (2 * width - 1) + (c - d + width - 1) for s, d in cells] for r, c in cells]
    index = relative_position_index(height, width)
    assert index.dtype == torch.int64
    assert index.tolist() == expected
    # Every relative position occurs, and each has one row of its own.
    assert sorted(set(index.flatten().tolist())) == list(range((2 * height - 1) * (2 * width - 1)))


def looked_up(bias: RelativePositionBias, height: int, width: int) -> torch.Tensor:
    """The bias by direct indexing: entry (0, h, i, j) is table[index(i, j), h]."""
    return bias.table.detach()[relative_position_index(height, width)].permute(2, 0, 1)[None]


@pytest.fixture
def bias() -> RelativePositionBias:
    module = RelativePositionBias(3, 4, heads=2)
    randomise(module)
    return module.eval()


def test_gathering_equals_indexing_in_training_and_evaluation(bias):
    expected = looked_up(bias, 3, 4)
    assert expected.shape == (1, 2, 12, 12)
    with torch.no_grad():
        assert torch.equal(bias(torch.float32), expected)
        assert torch.equal(bias(torch.bfloat16), expected.bfloat16())
    assert torch.equal(bias.train()(torch.float32), expected)


def test_gradient_counts_the_pairs_of_each_relative_position(bias):
    bias.train()(torch.float32).sum().backward()
    counts = torch.bincount(bias.index, minlength=bias.table.shape[0]).float()
    assert torch.equal(bias.table.grad, counts[:, None].expand(-1, 2))


def optimizer_step(bias):
    bias.table.grad = torch.ones_like(bias.table)
    torch.optim.SGD(bias.parameters(), lr=0.5).step()


def data_copy(bias):
    bias.table.data.copy_(torch.full_like(bias.table, 2.5))


def load_state(bias):
    bias.load_state_dict({"table": torch.full_like(bias.table, -1.5)})


def load_state_by_assignment(bias):
    bias.load_state_dict({"table": torch.full_like(bias.table, -1.5)}, assign=True)


def to_double(bias):
    bias.double()


def one_value(bias):
    bias.table.data[3, 1] += 1.0


@pytest.mark.parametrize(
    "change", [optimizer_step, data_copy, load_state, load_state_by_assignment, to_double, one_value]
)
def test_kept_bias_follows_every_change_of_the_table(bias, change):
    with torch.no_grad():
        first = bias(torch.float32)
        assert bias(torch.float32) is first
    before = bias.table.detach().clone()
    change(bias)
    assert change is to_double or not torch.equal(bias.table, before)
    with torch.no_grad():
        second = bias(torch.float32)
        assert torch.equal(second, looked_up(bias, 3, 4).float())
        assert bias(torch.float32) is second


def test_kept_bias_follows_the_dtype_asked_for(bias):
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            assert bias(dtype).dtype == dtype
            assert torch.equal(bias(dtype), looked_up(bias, 3, 4).to(dtype))


def test_nothing_is_kept_in_training_or_where_a_gradient_is_wanted(bias):
    with torch.no_grad():
        kept = bias(torch.float32)
    assert bias(torch.float32).requires_grad
    bias.train()
    assert bias._kept is None
    with torch.no_grad():
        assert bias(torch.float32) is not bias(torch.float32)
    bias.eval()
    with torch.no_grad():
        assert bias(torch.float32) is not kept


def test_keep_gathered_false():
    module = RelativePositionBias(3, 4, heads=2, keep_gathered=False).eval()
    with torch.no_grad():
        assert module(torch.float32) is not module(torch.float32)
        assert torch.equal(module(torch.float32), looked_up(module, 3, 4))
    assert module._kept is None


def test_copies_do_not_carry_the_kept_bias(bias):
    with torch.no_grad():
        bias(torch.float32)
    twin = copy.deepcopy(bias)
    assert twin._kept is None
    with torch.no_grad():
        assert torch.equal(twin(torch.float32), bias(torch.float32))


def test_a_bias_kept_under_inference_mode_allows_a_later_backward_to_the_input():
    model = tiny_model().requires_grad_(False)
    inputs = tiny_inputs(model)
    with torch.inference_mode():
        expected = model(**inputs, return_dict=False)[0].clone()
    inputs["hidden_states"].requires_grad_()
    out = model(**inputs, return_dict=False)[0]
    out.sum().backward()
    assert torch.equal(out.detach(), expected)
    assert inputs["hidden_states"].grad.abs().max() > 0


def test_the_model_keeps_biases_within_its_memory_budget(monkeypatch):
    # Bytes: 2 x (2 heads * 64^2 * 4), 1 x (3 heads * 16^2 * 4), 2 x (2 heads * 64^2 * 4).
    sizes = [4 * 2 * 64**2, 4 * 2 * 64**2, 4 * 3 * 16**2]
    monkeypatch.setattr(backbone, "KEPT_BIAS_BYTES", sum(sizes))
    kept = [attention.position_bias.keep_gathered for attention, _ in tiny_model().attention_layers()]
    assert kept == [True, True, True, False, False]


def qkv(height: int, width: int, dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(height * 100 + width)
    tokens, heads, channels = height * width, 2, 6
    q, k, v = (torch.randn(2, tokens, heads, channels, generator=generator) for _ in range(3))
    bias = torch.randn(1, heads, tokens, tokens, generator=generator)
    return tuple(x.to(dtype) for x in (q, k, v, bias))


def reference(query, key, value, bias, modulation):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(d) + B_ij) M_ij v_j, in float64."""
    query, key, value, bias = (x.double() for x in (query, key, value, bias))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5 + bias
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    if modulation is not None:
        weights = torch.einsum("bhij,ij->bhij", weights, modulation.double())
    return torch.einsum("bhij,bjhd->bihd", weights, value)


@pytest.mark.parametrize("grid", GRIDS)
def test_explicit_attention_without_modulation(grid):
    tensors = qkv(*grid)
    torch.testing.assert_close(
        explicit_attention(*tensors, None).double(), reference(*tensors, None), atol=2e-6, rtol=0
    )


@pytest.fixture
def attention() -> GridAttention:
    module = GridAttention(12, 3, (3, 4))
    randomise(module)
    return module.eval()


def written_out(attention: GridAttention, x: torch.Tensor) -> torch.Tensor:
    """The whole module, from its weights, in float64."""
    weights = {name: parameter.detach().double() for name, parameter in attention.named_parameters()}
    x = x.double()
    q, k, v = ((x @ weights[f"to_{part}.weight"].T + weights[f"to_{part}.bias"]).reshape(2, 12, 3, 4) for part in "qkv")
    out = reference(q, k, v, looked_up(attention.position_bias, 3, 4), attention.modulation)
    return out.flatten(2) @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_module_against_its_formula(attention, modulated, grad):
    x = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0))
    attention.modulation = modulation_matrix(3, 4) if modulated else None
    with torch.set_grad_enabled(grad):
        out = attention(x)
    torch.testing.assert_close(out.detach().double(), written_out(attention, x), atol=5e-6, rtol=0)


def test_ten_backwards_of_the_gathering_give_equal_bits():
    """With two threads: the backward of advanced indexing has been seen to sum in a varying order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bias = RelativePositionBias(16, 16, heads=6).train()
        upstream = torch.randn(1, 6, 256, 256, generator=torch.Generator().manual_seed(0))
        runs = [torch.autograd.grad((bias(torch.float32) * upstream).sum(), bias.table)[0] for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run, runs[0]) for run in runs)
    exact = torch.zeros(bias.table.shape, dtype=torch.float64)
    exact.index_add_(0, bias.index, upstream[0].double().permute(1, 2, 0).flatten(0, 1))
    torch.testing.assert_close(runs[0].double(), exact, atol=1e-4, rtol=0)


def test_ten_backwards_of_a_model_give_equal_bits():
    model = tiny_model().train()
    inputs, runs = tiny_inputs(model), []
    for _ in range(10):
        loss = model(**inputs, return_dict=False)[0].square().sum()
        runs.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.fixture
def restore_backend():
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("restore_backend")
def test_a_back_end_that_does_not_exist():
    with pytest.raises(ValueError, match="must be one of"):
        tiny_model().set_attention_backend("no-such-backend")


@pytest.mark.parametrize("amm", [None, [0, 3]])
@torch.no_grad()
def test_fused_projections_equal_separate_ones(amm):
    model = tiny_model()
    model.set_attention_modulation(amm)
    inputs = tiny_inputs(model)
    expected = model(**inputs, return_dict=False)[0]
    model.fuse_qkv_projections()
    assert all(hasattr(attention, "to_qkv") for attention, _ in model.attention_layers())
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], expected, atol=1e-5, rtol=0)
    model.unfuse_qkv_projections()
    assert torch.equal(model(**inputs, return_dict=False)[0], expected)
