"""What stays in float32 when the rest is computed in half precision, and how large the error is."""

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from edt_diffusion.nn.attention import explicit_attention, modulated_attention_in_place
from edt_diffusion.nn.modulation import modulation_matrix

# Unit roundoff of bfloat16: eight bits of significand. One rounding is at most this, relative to the value.
BF16 = 2.0**-8


def rounded_once(value: torch.Tensor, exact: torch.Tensor, slack: float = 1e-5) -> bool:
    """Whether `value` is within one bfloat16 rounding of `exact` (float64); `slack` is for float32's own error."""
    return bool(((value.double() - exact).abs() <= (BF16 + slack) * exact.abs() + 1e-30).all())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("autocast", [False, True])
def test_softmax_of_bfloat16_scores_sums_in_float32(autocast):
    """Summed in bfloat16, 4096 equal terms would stop growing at 256."""
    scores = torch.cat([noise(4, 4096) * 3, torch.zeros(1, 4096)]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        probabilities = scores.softmax(dim=-1)
    assert rounded_once(probabilities, scores.double().softmax(dim=-1))


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_of_bfloat16_takes_its_moments_in_float32(autocast):
    """Mean 100, deviation 0.1 to 3: moments in bfloat16, whose step at 100 is 0.5, would be wrong by more than 1."""
    x = (noise(4, 1024) * torch.tensor([[0.1], [0.5], [1.0], [3.0]]) + 100).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = torch.nn.functional.layer_norm(x, (1024,), eps=1e-6)
    exact = x.double() - x.double().mean(-1, keepdim=True)
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    # Float32 differences of numbers near 100 carry an absolute error of 1e-5, times 1 / deviation.
    assert ((out.double() - exact).abs() <= BF16 * exact.abs() + 2e-3).all()


@pytest.mark.parametrize("form", [explicit_attention, modulated_attention_in_place])
@torch.no_grad()
def test_attention_over_many_equal_keys(form):
    """Equal scores weigh 1024 values alike: (sum_j M_ij) / 1024. Sums kept in bfloat16 would lose most of them."""
    query = key = torch.zeros(1, 1024, 1, 4).bfloat16()
    bias = torch.zeros(1, 1, 1024, 1024).bfloat16()
    matrix = modulation_matrix(32, 32)
    out = form(query, key, torch.ones(1, 1024, 1, 4).bfloat16(), bias, matrix)
    exact = matrix.bfloat16().double().mean(dim=1)
    # 1/1024 times a bfloat16 entry is exact; what remains is the rounding of the result.
    assert rounded_once(out[0, :, 0, 0], exact)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_timestep_embedding_is_float32_under_autocast(half):
    model = tiny_model()
    inputs = tiny_inputs(model)
    seen: list[torch.Tensor] = []
    model.timestep_embedder.register_forward_hook(lambda _m, given, out: seen.extend([given[0], out]))
    model(**inputs)
    with torch.autocast("cpu", half):
        model(**inputs)
        model(**{**inputs, "hidden_states": inputs["hidden_states"].to(half)})
    assert all(torch.equal(tensor, seen[i % 2]) for i, tensor in enumerate(seen))
    assert len(seen) == 6


@torch.no_grad()
def test_autocast_tells_neighbouring_timesteps_apart():
    """In bfloat16 the timesteps 996 to 999 are one number, and embeddings of neighbours differ by rounding alone."""
    model = tiny_model()
    step = model.time_proj(torch.tensor([998.0, 999.0]))
    exact = model.timestep_embedder(step)
    with torch.autocast("cpu", torch.bfloat16):
        computed = model._embed_timestep(torch.tensor([998, 999]), torch.zeros(2))
    assert torch.equal(computed, exact)
    assert not torch.equal(computed[0], computed[1])


@pytest.mark.parametrize("training", [False, True])
def test_layer_norms_see_float32_under_autocast(training):
    """Position tables and gates keep the residual stream in float32, so norms of it are too."""
    model = tiny_model().train(training)
    dtypes = []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda _m, given, out: dtypes.extend([given[0].dtype, out.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        model(**tiny_inputs(model))
    assert len(dtypes) == 2 * 13  # two in each of five blocks, one in each of down, up, final layer
    assert set(dtypes) == {torch.float32}


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    square = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return (square / sum(float(y.double().square().sum()) for y in b)) ** 0.5


@pytest.mark.parametrize("blocks", [None, [0, 3]])
def test_error_of_bfloat16_autocast(blocks):
    """A rounding errs by 2^-8 / sqrt(3) at most, in the mean square.

    The longest chain of rounded products of full size has 18 of them: the patches, three in each of five blocks, the
    long skip's and the last. Uncorrelated, they add up to sqrt(18 / 3) = 2.45 times 2^-8, and twice as many in the
    gradient to sqrt(36 / 3) = 3.5.
    """
    model = tiny_model().train()
    model.set_attention_modulation(blocks)
    inputs = tiny_inputs(model, batch=4)

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        out = model(**inputs).sample.float()
        return [out.detach()], list(torch.autograd.grad(out.square().mean(), list(model.parameters())))

    exact, exact_gradients = run()
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = run()
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert BF16 / 10 < difference(out, exact) < 2.5 * BF16
    assert BF16 / 10 < difference(gradients, exact_gradients) < 3.5 * BF16


@pytest.mark.parametrize("blocks", [None, [0, 3]])
@torch.no_grad()
def test_a_wholly_bfloat16_model_runs_with_and_without_autocast(blocks):
    model = tiny_model()
    model.set_attention_modulation(blocks)
    inputs = tiny_inputs(model)
    exact = model(**inputs).sample
    model.to(torch.bfloat16)
    half = {**inputs, "hidden_states": inputs["hidden_states"].bfloat16()}
    out = model(**half).sample
    assert out.dtype == torch.bfloat16
    assert difference([out], [exact]) < 10 * BF16  # the residual stream is rounded too
    with torch.autocast("cpu", torch.bfloat16):
        assert difference([model(**half).sample], [exact]) < 10 * BF16


@pytest.mark.gpu
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_cuda_autocast(half):
    model = tiny_model().cuda().train()
    inputs = {name: value.cuda() for name, value in tiny_inputs(model).items()}
    seen: list[torch.Tensor] = []
    model.timestep_embedder.register_forward_hook(lambda _m, given, out: seen.extend([given[0], out]))
    exact = model(**inputs).sample
    with torch.autocast("cuda", half):
        out = model(**inputs).sample
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    assert torch.equal(seen[1], seen[3])
    assert difference([out.detach().cpu()], [exact.detach().cpu()]) < 3.5 * BF16
