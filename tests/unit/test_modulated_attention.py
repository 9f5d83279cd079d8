"""Every form of attention with AMM is the same function, to rounding; which is used where; what is kept."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from tiny_models import randomise, tiny_inputs, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from edt_diffusion.nn import modulated_attention as forms
from edt_diffusion.nn.attention import GridAttention
from edt_diffusion.nn.modulated_attention import FORMS, modulated_attention
from edt_diffusion.nn.modulation import modulation_matrix

# The square grids that EDT has at 64 ... 512 px, and a rectangle.
GRIDS = [(4, 4), (8, 8), (16, 16), (32, 32), (8, 12)]
BF16 = 2.0**-8  # unit roundoff: one rounding is at most this, relative to the value
HEADS, WIDTH = 2, 52

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tensors(grid: tuple[int, int], dtype=torch.float32, batch: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    tokens = grid[0] * grid[1]
    q, k, v = (torch.randn(batch, tokens, HEADS, WIDTH, generator=generator) for _ in range(3))
    bias = torch.randn(1, HEADS, tokens, tokens, generator=generator)
    return tuple(x.to(dtype) for x in (q, k, v, bias))


def parts_of_reference(query, key, value, bias, modulation) -> tuple[Tensor, Tensor, Tensor]:
    """Scores before the bias, softmax of scores and bias, and the result, in float64."""
    query, key, value, bias = (x.double() for x in (query, key, value, bias))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5
    powers = (scores + bias).exp()
    weights = powers / powers.sum(dim=-1, keepdim=True)
    return scores, weights, torch.einsum("bhij,bjhd->bihd", weights * modulation.double(), value)


def reference(*arguments) -> Tensor:
    return parts_of_reference(*arguments)[2]


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("formula", ["exp", "cos"])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_forms_in_float32_against_float64(grid, formula):
    """Largest errors seen: 1.5e-6 explicit and in place, 1.9e-6 two passes, 2.2e-6 FlexAttention."""
    given, modulation = tensors(grid), modulation_matrix(*grid, formula)
    expected = reference(*given, modulation)
    assert rms(expected - reference(*given, torch.ones_like(modulation))) > 0.01  # AMM matters far more
    for name, form in FORMS.items():
        out = form(*given, modulation)
        assert out.shape == expected.shape
        assert out.dtype == torch.float32
        assert (out - expected).abs().max() < 3e-6, name


def bound_of_bfloat16(query, key, value, bias, modulation) -> Tensor:
    """What roundings to bfloat16 can do at most to each element, to first order.

    Scores are rounded as a product, after scaling and after the bias (or the bias is, with log M in it); an error e_ij
    of a score makes a relative one of e_ij + sum_k p_ik e_ik in p_ij. Then p, M and their product are rounded, and at
    the end the result, twice at most.
    """
    scores, weights, result = parts_of_reference(query, key, value, bias, modulation)
    modulation = modulation.double()
    logarithm = modulation.log().clamp(min=-10).abs()
    score_error = BF16 * (2 * scores.abs() + (scores + bias).abs() + bias.abs() + logarithm)
    relative = score_error + (weights * score_error).sum(-1, keepdim=True) + 3 * BF16
    return torch.einsum("bhij,bjhd->bihd", weights * modulation * relative, value.double().abs()) + (
        2 * BF16 * result.abs()
    )


@pytest.mark.parametrize("formula", ["exp", "cos"])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_forms_in_bfloat16_against_float64(grid, formula):
    """Errors are within what rounding can do, and no form is worse than the plain one in bfloat16.

    Relative root mean squares seen: explicit 4.6e-3 to 8.9e-3, in place to 7.3e-3, two passes to 4.7e-3, flex 2.9e-3.
    """
    given, modulation = tensors(grid, torch.bfloat16), modulation_matrix(*grid, formula)
    expected, bound = reference(*given, modulation), bound_of_bfloat16(*given, modulation)
    plain = rms(FORMS["explicit"](*given, modulation) - expected)
    for name, form in FORMS.items():
        out = form(*given, modulation)
        assert out.dtype == torch.bfloat16
        assert ((out - expected).abs() <= bound * 1.05).all(), name
        assert rms(out - expected) < 0.01 * rms(expected), name
        assert rms(out - expected) < 1.2 * plain, name  # the smallest grid has 3328 elements: its own spread is 10 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formula", ["exp", "cos"])
@pytest.mark.parametrize("grid", [(4, 4), (16, 16), (8, 12)])
def test_gradients_of_the_differentiable_form_against_float64(grid, formula, dtype):
    given, modulation = tensors(grid, dtype), modulation_matrix(*grid, formula)
    upstream = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    leaves = [x.requires_grad_() for x in given]
    found = torch.autograd.grad(modulated_attention(*leaves, modulation), leaves, upstream)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = torch.autograd.grad(reference(*exact, modulation), exact, upstream.double())
    for name, gradient, exact_gradient in zip(("q", "k", "v", "bias"), found, expected, strict=True):
        error = rms(gradient - exact_gradient) / rms(exact_gradient)
        assert error < (1e-6 if dtype == torch.float32 else 4 * BF16), name


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_token_that_sees_itself_alone(form):
    """M = 1 on the diagonal and 0 elsewhere leaves p_ii v_i, and most stretches of a row have no weight at all."""
    given = tensors((16, 16))
    own = parts_of_reference(*given, torch.eye(256))[1].diagonal(dim1=-2, dim2=-1)  # (B, heads, N)
    expected = own.transpose(1, 2).unsqueeze(-1) * given[2].double()
    torch.testing.assert_close(FORMS[form](*given, torch.eye(256)).double(), expected, atol=1e-6, rtol=1e-5)


def test_the_matrices_have_no_empty_row():
    """What the two-pass form cannot do without."""
    for grid in [*GRIDS, (3, 3), (3, 30)]:
        for formula in ("exp", "cos"):
            for radius in (None, 0.5):
                assert (modulation_matrix(*grid, formula, radius).diagonal() > 1).all()


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor of scores that is made: not views of what was there, nor (..., d)."""

    def __init__(self, *there: Tensor) -> None:
        super().__init__()
        self.there = {x.untyped_storage().data_ptr() for x in there}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            fresh = isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.there
            if fresh and x.shape[-1] != WIDTH:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("budget", [2**30, 2 * HEADS * 96 * 96 * 4 + 10, HEADS * 96 * 7 * 4, 1])
@torch.no_grad()
def test_cut_as_it_may_be_the_in_place_form_is_the_same(monkeypatch, budget, modulated, dtype):
    """All five images at once, two or four, seven rows (fourteen in bfloat16) of the 96, one row."""
    given = tensors((8, 12), dtype, batch=5)
    matrix = modulation_matrix(8, 12) if modulated else None
    expected = FORMS["explicit"](*given, matrix)
    copies = [x.clone() for x in given]
    monkeypatch.setitem(forms.IMAGE_BYTES, "cpu", budget)
    monkeypatch.setitem(forms.ROW_BYTES, "cpu", budget)
    with Largest(*given, *([] if matrix is None else [matrix])) as largest:
        out = forms.modulated_attention_in_place(*given, matrix)
    assert rms(out - expected) < (5e-7 if dtype == torch.float32 else 0.01) * rms(expected)
    one_row = HEADS * 96 * given[0].element_size()
    cast_matrix = 0 if matrix is None or dtype == torch.float32 else 96 * 96 * 2
    assert largest.bytes <= max(budget, one_row, cast_matrix)
    assert all(torch.equal(x, y) for x, y in zip(given, copies, strict=True))


@torch.no_grad()
def test_the_in_place_form_never_holds_all_scores_of_a_large_grid():
    given = tensors((32, 32), batch=1)
    assert given[3].nbytes == 8 * 2**20
    matrix = modulation_matrix(32, 32)
    with Largest(*given, matrix) as largest:
        forms.modulated_attention_in_place(*given, matrix)
    assert largest.bytes == 4 * 2**20


# ---- which form is used ----


def somewhere(device: str, dtype: torch.dtype, tokens: int) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype, shape=(2, tokens, HEADS, WIDTH))


def bias_of(wants_grad: bool) -> Any:
    return SimpleNamespace(requires_grad=wants_grad)


F32, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "plain", "with_amm"),
    [
        ("cpu", F32, 16, "sdpa", "in-place"),
        ("cpu", F32, 1024, "sdpa", "in-place"),
        ("cpu", HALF, 16, "in-place", "in-place"),
        ("cpu", HALF, 1024, "in-place", "in-place"),
        ("cpu", torch.float16, 256, "sdpa", "in-place"),
        ("cuda", F32, 256, "sdpa", "in-place"),
        ("cuda", HALF, 256, "sdpa", "in-place"),
        ("cuda", HALF, 1023, "sdpa", "in-place"),
        ("cuda", HALF, 1024, "sdpa", "two-pass"),
        ("cuda", F32, 4096, "sdpa", "two-pass"),
        ("mps", F32, 4096, "sdpa", "in-place"),
    ],
)
def test_which_form_is_used_where(monkeypatch, device, dtype, tokens, plain, with_amm):
    query = somewhere(device, dtype, tokens)
    with torch.no_grad():
        assert forms.form_for(query, bias_of(False), modulated=False) == plain
        assert forms.form_for(query, bias_of(False), modulated=True) == with_amm
    for wants_grad in (False, True):
        in_training = "explicit" if device == "cpu" and (wants_grad or dtype is HALF) else "sdpa"
        assert forms.form_for(query, bias_of(wants_grad), modulated=False) == in_training
        assert forms.form_for(query, bias_of(wants_grad), modulated=True) == "explicit"
    for module in (torch.compiler, torch.jit):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(module, "is_compiling" if module is torch.compiler else "is_tracing", lambda: True)
            assert forms.form_for(query, bias_of(False), modulated=False) == "sdpa"
            assert forms.form_for(query, bias_of(False), modulated=True) == "explicit"


@torch.no_grad()
def test_an_unavailable_kernel_falls_back_and_is_not_tried_again(monkeypatch):
    given, modulation = tensors((8, 8)), modulation_matrix(8, 8)
    calls = []

    def absent(*_arguments):
        calls.append(1)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(forms, "form_for", lambda *_args, **_kwargs: "two-pass")
    monkeypatch.setattr(forms, "_unavailable", set())
    monkeypatch.setitem(forms._WITH_LOG_SUM, "cpu", absent)
    expected = FORMS["in-place"](*given, modulation)
    for _ in range(3):
        assert torch.equal(modulated_attention(*given, modulation), expected)
    assert len(calls) == 1
    assert modulated_attention(*(x.bfloat16() for x in given), modulation).dtype == HALF
    assert len(calls) == 2  # another dtype is another matter
    with pytest.raises(RuntimeError, match="no such kernel"):  # asked for by name
        modulated_attention(*given, modulation, form="two-pass")
    monkeypatch.delitem(forms._WITH_LOG_SUM, "cpu")
    with pytest.raises(NotImplementedError, match="no attention kernel returns its log-sum-exp on cpu"):
        modulated_attention(*given, modulation, form="two-pass")
    with pytest.raises(ValueError, match="unknown form of modulated attention 'fast': expected one of explicit"):
        modulated_attention(*given, modulation, form="fast")

    def full(*_arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(forms, "_unavailable", set())
    monkeypatch.setitem(forms._WITH_LOG_SUM, "cpu", full)
    with pytest.raises(torch.OutOfMemoryError):
        modulated_attention(*given, modulation)
    assert not forms._unavailable


def test_heads_are_padded_to_16_bytes_on_cuda_alone():
    assert [x.shape[-1] for x in forms.padded_to_alignment(*tensors((4, 4), HALF)[:3])] == [52] * 3
    with FakeTensorMode():
        for width, dtype, expected in [(52, HALF, 56), (52, F32, 52), (64, HALF, 64), (50, F32, 52), (1, HALF, 8)]:
            query, key = (torch.empty(1, 4, 2, width, dtype=dtype, device="cuda") for _ in range(2))
            assert [x.shape[-1] for x in forms.padded_to_alignment(query, key)] == [expected] * 2


# ---- on modules and models ----


def grid_attention(grid: tuple[int, int] = (3, 4)) -> GridAttention:
    module = GridAttention(12, 3, grid).eval()
    randomise(module)
    module.modulation = modulation_matrix(*grid)
    return module


def states(tokens: int = 12, dtype=torch.float32) -> Tensor:
    return torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_modulation_matrix_survives_casts():
    """A float32 matrix that had been bfloat16 in between would be off by up to 2^-8."""
    exact = modulation_matrix(3, 4)
    attention = grid_attention()
    for cast in (
        lambda: attention.to(HALF).float(),
        lambda: attention.half(),
        lambda: attention.double(),
        lambda: attention.to(HALF),
        lambda: attention.to("cpu"),
    ):
        cast()
        assert attention.modulation is not None
        assert attention.modulation.dtype == torch.float32
        assert torch.equal(attention.modulation, exact)
    model = tiny_model()
    model.set_attention_modulation([0, 3])
    inputs = tiny_inputs(model)
    with torch.no_grad():
        weights = {name: parameter.clone() for name, parameter in model.state_dict().items()}
        expected = model(**inputs).sample
        model.to(HALF).float()
        model.load_state_dict(weights)
        assert torch.equal(model(**inputs).sample, expected)


@torch.no_grad()
def test_the_cast_matrix_is_kept_and_follows_every_change():
    attention = grid_attention()
    for dtype in (HALF, torch.float64, HALF):
        assert torch.equal(attention.modulation_in(dtype), modulation_matrix(3, 4).to(dtype))
    assert attention.modulation_in(HALF) is attention.modulation_in(HALF)
    assert attention.modulation_in(torch.float32) is attention.modulation
    attention.modulation.mul_(2)
    assert torch.equal(attention.modulation_in(HALF), (2 * modulation_matrix(3, 4)).to(HALF))
    attention.modulation = modulation_matrix(3, 4, "cos")
    assert torch.equal(attention.modulation_in(HALF), modulation_matrix(3, 4, "cos").to(HALF))
    for twin in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert twin._kept_modulation is None
        assert torch.equal(twin.modulation_in(HALF), attention.modulation_in(HALF))


def test_what_sampling_under_inference_mode_kept_can_be_trained_with():
    model = tiny_model().to(HALF)
    inputs = {name: x.to(HALF) if x.is_floating_point() else x for name, x in tiny_inputs(model).items()}
    with torch.inference_mode():
        model.set_attention_modulation([0, 3])
        model(**inputs)
    model(**inputs).sample.sum().backward()
    assert model.blocks[0].attn.to_q.weight.grad.abs().max() > 0


@pytest.fixture
def restore_backend():
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """Names of the back ends that compute, in turn."""
    names: list[str] = []
    for backend in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH, AttentionBackendName.FLEX):
        function = _AttentionBackendRegistry._backends[backend]

        def noted(*args, function=function, name=backend.value, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, noted)
    return names


BACKENDS = ["native", "_native_math", "flex"]  # those of diffusers that run on a CPU and take a bias


@pytest.mark.usefixtures("restore_backend")
@pytest.mark.parametrize("dtype", [F32, HALF])
@pytest.mark.parametrize("how", ["set", "context"])
@pytest.mark.parametrize("amm", [None, [0, 3]])
@torch.no_grad()
def test_a_chosen_back_end_computes_the_plain_blocks(dispatched, amm, how, dtype):
    plain_blocks = 5 if amm is None else 3
    for name in BACKENDS:
        model = tiny_model()
        model.set_attention_modulation(amm)
        inputs = tiny_inputs(model)
        exact = model(**inputs).sample
        model.to(dtype)
        inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
        dispatched.clear()
        if how == "set":
            model.set_attention_backend(name)
            # diffusers makes it the back end of the process too; what the model was told holds without that.
            _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
            out = model(**inputs).sample
        else:
            with attention_backend(name):
                out = model(**inputs).sample
        # In bfloat16 the context's "native" is what stands without it, and so means the in-place form.
        ours = dtype == HALF and how == "context" and name == "native"
        assert dispatched == ([] if ours else [name] * plain_blocks)
        torch.testing.assert_close(out.float(), exact, atol=1e-5 if dtype == F32 else 0.05 * exact.abs().max(), rtol=0)


@pytest.mark.usefixtures("restore_backend")
@pytest.mark.parametrize("name", ["flash", "sage", "xformers", "_flash_3"])
def test_a_back_end_that_is_not_installed_says_so(name):
    model = tiny_model()
    with pytest.raises(RuntimeError, match="not usable because of missing package"):
        model.set_attention_backend(name)
    assert all(attention.processor._attention_backend is None for attention, _ in model.attention_layers())


@torch.no_grad()
def test_a_model_without_a_choice_takes_the_forms_of_the_table(dispatched, monkeypatch):
    made: list[tuple[str, bool]] = []
    in_place = forms.modulated_attention_in_place

    def noted(*args):
        made.append(("in-place", args[4] is not None))
        return in_place(*args)

    monkeypatch.setitem(FORMS, "in-place", noted)
    monkeypatch.setattr("edt_diffusion.nn.attention.modulated_attention_in_place", noted)
    model = tiny_model()
    model.set_attention_modulation([0, 3])
    inputs = tiny_inputs(model)
    model(**inputs)
    assert dispatched == ["native"] * 3
    assert made == [("in-place", True)] * 2
    dispatched.clear(), made.clear()
    model.to(HALF)(**{**inputs, "hidden_states": inputs["hidden_states"].to(HALF)})
    assert dispatched == []
    assert [modulated for _, modulated in made] == [True, False, False, True, False]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_processor_takes_a_form_by_name(form):
    model = tiny_model()
    model.set_attention_modulation([0, 2, 3])
    inputs = tiny_inputs(model)
    expected = model(**inputs).sample
    for attention, _ in model.attention_layers():
        attention.processor.form = form
    torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-5, rtol=0)
    model.attention_layers()[0][0].processor.form = "none of these"
    with pytest.raises(ValueError, match="unknown form"):
        model(**inputs)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, HALF, torch.float16])
@pytest.mark.parametrize("grid", [(4, 4), (8, 12), (32, 32), (33, 33)])
@torch.no_grad()
def test_forms_on_cuda_against_float64(grid, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.compiler.reset()  # two graphs of FlexAttention a case: of all cases they are more than torch's limit
    given, modulation = tensors(grid, dtype), modulation_matrix(*grid)
    expected = reference(*given, modulation)
    limit = {F32: 2e-5, HALF: 0.01, torch.float16: 0.002}[dtype] * rms(expected)
    for name, form in FORMS.items():
        out = form(*(x.cuda() for x in given), modulation.cuda())
        assert out.dtype == dtype
        assert rms(out.cpu() - expected) < limit, name
    assert rms(modulated_attention(*(x.cuda() for x in given), modulation.cuda()).cpu() - expected) < limit
    assert not forms._unavailable


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_plain_blocks_reach_a_fused_kernel_on_cuda(dtype):
    """With a head width of 52 and a bias the memory-efficient kernel is refused unless the heads are padded."""
    attention = GridAttention(312, 6, (16, 16)).cuda().to(dtype)
    x = torch.randn(2, 256, 312, device="cuda", dtype=dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = attention(x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        out = attention(x)
        out.sum().backward()
        with torch.no_grad():
            assert rms(attention.eval()(x) - expected) < 0.02 * rms(expected)
    assert attention.position_bias.table.grad.abs().max() > 0
