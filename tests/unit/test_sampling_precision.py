"""What networks compute in when they sample, against roundings done by hand; compiled and offloaded networks."""

import copy
import importlib.util
import re
import sys

import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from edt_diffusion.pipelines.precision import (
    PRECISIONS,
    compile_network,
    in_precision,
    offload_network,
    precision_of,
    weight_bytes,
)
from edt_diffusion.util.errors import UserError

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason='torchao is absent: pip install "edt-diffusion[int8]"'
)
eight_bits = ["fp8", pytest.param("int8", marks=needs_torchao), pytest.param("int8-weights", marks=needs_torchao)]
# In eight bits: what is a matrix of the blocks and of the condition, and no norm, patch embedding or last projection.
SMALL = re.compile(
    r"timestep_embedder\.linear_[12]$"
    r"|blocks\.\d+\.(attn\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|adaln\.linear|reduction|expand|fuse)$"
)


def small_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and SMALL.search(name)}


@torch.no_grad()
def call(model, seed: int = 1) -> torch.Tensor:
    inputs = tiny_inputs(model, batch=4, seed=seed)
    return model(**{**inputs, "hidden_states": inputs["hidden_states"].to(model.dtype)}, return_dict=False)[0]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@torch.no_grad()
def test_a_network_that_is_in_the_precision_already_is_returned_and_others_are_copied():
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert in_precision(model, "fp32") is model
    half = in_precision(model, "bf16")
    assert half is not model
    assert in_precision(half, "bf16") is half
    assert [precision_of(each) for each in (model, half, copy.deepcopy(model).double())] == ["fp32", "bf16", None]
    expected = nn.Module.to(copy.deepcopy(model), torch.bfloat16)
    assert torch.equal(call(half), call(expected))
    for name in ("fp8", "int8"):
        if name == "fp8" or importlib.util.find_spec("torchao"):
            small = in_precision(model, name)
            assert in_precision(small, name) is small
            assert precision_of(small) == name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float32


@torch.no_grad()
def test_float8_is_the_network_with_rounded_weights_bit_for_bit():
    model = tiny_model()
    rounded = nn.Module.to(tiny_model(), torch.bfloat16)
    originals = {**dict(model.named_modules())}
    eighth = [*small_layers(model), "class_embedder"]
    for name in eighth:
        for key, parameter in rounded.get_submodule(name).named_parameters():
            parameter.copy_(getattr(originals[name], key).to(torch.float8_e4m3fn).bfloat16())
    made = in_precision(model, "fp8")
    assert torch.equal(call(made), call(rounded))
    assert made.dtype == torch.bfloat16
    stored = {name for name, parameter in made.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert stored == {f"{name}.{key}" for name in eighth for key, _ in originals[name].named_parameters()}
    # Three bits of mantissa: each weight is off by at most 1/16, at random, and so is each sum of products.
    assert 0.005 < relative(call(made), call(model)) < 0.0625
    assert weight_bytes(made) == sum(
        tensor.numel() * (1 if name in stored else 2 if tensor.is_floating_point() else 8)
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]
    )


def codes(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers from -128 to 127 and the step of each row; the largest magnitude lies half a step beyond 127."""
    step = np.abs(weight).max(axis=1, keepdims=True) / 127.5
    return np.clip(np.rint(weight / step), -128, 127), step


@needs_torchao
@torch.no_grad()
def test_int8_weights_are_rounded_per_row():
    model = tiny_model()
    made = in_precision(model, "int8-weights")
    quantised = small_layers(made)
    assert quantised.keys() == small_layers(model).keys()
    assert len(quantised) == 5 * 7 + 3 + 2  # seven of each block; down-sampling, split, fusion; the timestep's MLP
    expected = nn.Module.to(tiny_model(), torch.bfloat16)
    for name, layer in small_layers(model).items():
        exact = layer.weight.double().numpy()
        found = quantised[name].weight.dequantize().double().numpy()
        row = np.abs(exact).max(axis=1, keepdims=True)
        integers, step = codes(exact)
        # The product is rounded to bfloat16. At half a step, as the largest of a row is, either integer will do.
        close = np.abs(found - integers * step) <= 2.0**-8 * np.abs(integers * step) + 0.01 * step
        assert (close | (np.abs(np.abs(exact / step) % 1 - 0.5) < 0.01)).all()
        assert (np.abs(found - exact) <= row / 254 + 2.0**-8 * np.abs(exact)).all()
        assert np.abs(integers * step - exact).max() > 0.4 * step.max()  # it is rounded
        expected.get_submodule(name).weight.copy_(torch.from_numpy(integers * step))
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear) and name not in quantised:
            assert layer.weight.dtype == torch.bfloat16
            assert type(layer.weight.data) is torch.Tensor, name
    noise = relative(call(nn.Module.to(tiny_model(), torch.bfloat16)), call(model))
    assert relative(call(made), call(expected)) < 1.5 * noise
    assert noise < relative(call(made), call(model)) < 0.03


@needs_torchao
@torch.no_grad()
def test_int8_rounds_what_it_multiplies_too():
    """A token of one 63.5 and else 0.2: the step of its integers is 1/2, so all but the one become zero."""
    model = tiny_model()
    made, name = in_precision(model, "int8"), "blocks.0.ff.net.2"  # 64 inputs; torchao leaves 16 and less alone
    layer = model.get_submodule(name)
    tokens = torch.full((64, 64), 0.2) + torch.eye(64) * 63.3
    integers, step = codes(layer.weight.double().numpy())
    exact = tokens.double().numpy() @ layer.weight.double().numpy().T
    expected = 63.5 * (integers * step).T
    bias = layer.bias.double().numpy()
    found = made.get_submodule(name)(tokens.bfloat16()[None])[0].double().numpy() - bias
    # Three roundings to bfloat16 (token scale, row scale, product), one of the sum with the bias.
    bound = 3 * 2.0**-8 * np.abs(expected) + 2.0**-8 * np.abs(bias) + 63.5 * 0.02 * step.T
    assert (np.abs(found - expected) <= bound).mean() > 0.98
    assert (np.abs(found - exact) <= bound).mean() < 0.5
    errors = [relative(call(in_precision(model, each)), call(model)) for each in ("int8-weights", "int8")]
    assert errors[0] < errors[1] < 0.04


@pytest.mark.parametrize(("name", "words"), [
    ("bf61", r"unknown precision 'bf61': .*did you mean 'bf16'"),
    ("fp16", r"a CPU computes it a hundred times slower: use fp32 or bf16"),
])  # fmt: skip
def test_precisions_that_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        in_precision(tiny_model(), name)


@pytest.mark.parametrize("name", eight_bits)
def test_eight_bits_are_a_last_step(name):
    small = in_precision(tiny_model(), name)
    with pytest.raises(UserError, match=f"stored as {name} already: load the model again"):
        in_precision(small, "bf16")
    with pytest.raises(UserError, match=f"offloading a network in {name} is not possible"):
        offload_network(small, "cpu")
    with torch.device("meta"):
        nowhere = tiny_model.__globals__["EDTTransformer2DModel"](depths=(1,), dims=(16,), num_heads=(2,))
    with pytest.raises(UserError, match="expected a device of type cpu or cuda, not meta"):
        in_precision(nowhere, name)


@pytest.mark.parametrize("name", ["int8", "int8-weights"])
def test_int8_without_torchao(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.quantization", raising=False)
    with pytest.raises(UserError, match=r'torchao is missing: pip install "edt-diffusion\[int8\]"'):
        in_precision(tiny_model(), name)


def test_the_table_says_what_each_one_is():
    assert list(PRECISIONS) == ["fp32", "bf16", "fp16", "fp8", "int8", "int8-weights"]
    assert weight_bytes(tiny_model()) == sum(
        tensor.numel() * (8 if tensor.dtype == torch.int64 else 4)
        for tensor in [*tiny_model().parameters(), *tiny_model().buffers()]
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_blocks_compute_the_same():
    model = tiny_model(depths=(2,), dims=(16,), num_heads=(2,))
    compiled = compile_network(copy.deepcopy(model))
    expected = call(model)
    torch.testing.assert_close(call(compiled), expected, atol=1e-5, rtol=1e-5)
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)


def test_compiling_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler \(no-such-compiler is not found\)"):
        compile_network(tiny_model())


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_offloading_is_exact(tmp_path, name, on_disk):
    model = in_precision(tiny_model(), name)
    model.set_attention_modulation([0, 3])
    expected = [call(model, seed) for seed in (1, 2)]
    folder = tmp_path / "weights" if on_disk else None
    if folder is not None:
        folder.mkdir()
    offloaded = offload_network(copy.deepcopy(model), "cpu", folder=folder)
    for seed in (1, 2, 1):
        assert torch.equal(call(offloaded, seed), expected[seed - 1])
    assert any("group_offloading" in module._diffusers_hook.hooks for module in offloaded.modules()
               if hasattr(module, "_diffusers_hook"))  # fmt: skip
    if folder is not None:
        assert len(list(folder.iterdir())) >= len(small_layers(model))


def test_offloading_to_a_device_that_is_not_there():
    with pytest.raises(UserError, match="offloading to compute on cuda:63: the device cannot be used"):
        offload_network(tiny_model(), "cuda:63")
