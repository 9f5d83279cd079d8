"""DiT and MDTv2 written out a second time, image by image in float64, from the published descriptions.

They take the names of our weights and nothing else of our code but the AMM matrix, which has tests of its own.
"""

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def relative_bias(table: Tensor, grid: tuple[int, int], places: list[int]) -> Tensor:
    """(heads, K, K) between the tokens at `places`: the row of the table for query minus key, rows outermost."""
    height, width = grid
    cells = [divmod(place, width) for place in places]
    pairs = [(y - v + height - 1) * (2 * width - 1) + x - u + width - 1 for y, x in cells for v, u in cells]
    return table[pairs].view(len(places), len(places), -1).permute(2, 0, 1)


def block(
    weights: Weights, name: str, x: Tensor, temb: Tensor, heads: int, bias: Tensor | None, amm: Tensor | None = None
) -> Tensor:
    """adaLN-Zero block on the tokens (K, D) of one image; temb (D,), bias (heads, K, K), amm (K, K)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = linear(weights, f"{name}.adaln.linear", silu(temb)).chunk(6)
    y = normed(x) * (1 + scale1) + shift1
    query, key, value = (linear(weights, f"{name}.attn.to_{part}", y).unflatten(1, (heads, -1)) for part in "qkv")
    scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1])
    scores = scores if bias is None else scores + bias
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    share = powers / powers.sum(-1, keepdim=True)
    share = share if amm is None else share * amm
    mixed = torch.einsum("hij,jhd->ihd", share, value).flatten(1)
    x = x + gate1 * linear(weights, f"{name}.attn.to_out.0", mixed)
    y = normed(x) * (1 + scale2) + shift2
    return x + gate2 * linear(weights, f"{name}.ff.net.2", gelu(linear(weights, f"{name}.ff.net.0.proj", y)))


def condition(model: Any, weights: Weights, timestep: int, label: int | None) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = timestep * frequencies
    temb = torch.cat([angles.cos(), angles.sin()])
    temb = linear(weights, "timestep_embedder.linear_1", temb)
    temb = linear(weights, "timestep_embedder.linear_2", silu(temb))
    return temb if label is None else temb + weights["class_embedder.weight"][label]


def entry(model: Any, weights: Weights, image: Tensor) -> Tensor:
    """Patches of (C, H, W) row by row, embedded, with positions: (N, D)."""
    patch, (rows, columns) = model.config.patch_size, model.grids[0]
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    tokens = []
    for row in range(rows):
        for column in range(columns):
            cut = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].flatten()
            tokens.append(kernel @ cut + weights["patch_embed.proj.bias"])
    return torch.stack(tokens) + weights["pos_embed"][0]


def leave(model: Any, weights: Weights, x: Tensor, temb: Tensor) -> Tensor:
    shift, scale = linear(weights, "norm_out.modulation.linear", silu(temb)).chunk(2)
    out = linear(weights, "proj_out", normed(x) * (1 + scale) + shift)
    patch, (rows, columns), channels = model.config.patch_size, model.grids[-1], model.out_channels
    image = torch.empty(channels, rows * patch, columns * patch, dtype=x.dtype)
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        cut = out[token].view(patch, patch, channels).permute(2, 0, 1)
        image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = cut
    return image


def dit(model: Any, weights: Weights, image: Tensor, temb: Tensor, amm: dict[int, Tensor]) -> Tensor:
    x = entry(model, weights, image)
    for number in range(model.config.depth):
        x = block(weights, f"blocks.{number}", x, temb, model.config.num_heads, None, amm.get(number))
    return leave(model, weights, x, temb)


def mdt(
    model: Any, weights: Weights, image: Tensor, temb: Tensor, amm: dict[int, Tensor], kept: list[int] | None
) -> Tensor:
    config, grid = model.config, model.grids[0]
    half = (config.depth - config.decode_layers) // 2
    whole = entry(model, weights, image)
    everywhere = list(range(len(whole)))
    places = everywhere if kept is None else kept

    def run(name: str, x: Tensor, at: list[int], number: int | None) -> Tensor:
        bias = relative_bias(weights[f"{name}.attn.position_bias.table"], grid, at)
        matrix = None if number is None or number not in amm else amm[number][at][:, at]
        return block(weights, name, x, temb, config.num_heads, bias, matrix)

    x, left = whole[places], []
    for number in range(half):
        x = run(f"blocks.{number}", x, places, number)
        left.append(x)
    for number in range(half, 2 * half):  # the first takes what the last in-block left, and so on
        fused = torch.cat([x, left[2 * half - 1 - number]], dim=1)
        x = run(f"blocks.{number}", linear(weights, f"blocks.{number}.skip_linear", fused), places, number)
    side = f"blocks.{2 * half}"
    positions = weights[f"{side}.pos_embed"][0]
    if kept is None:
        x = x + positions
    else:
        filled = weights[f"{side}.mask_token"][0, 0].repeat(len(whole), 1)
        filled[places] = x
        filled = filled + positions
        guessed = run(f"{side}.block", filled, everywhere, None)
        x = torch.stack([filled[i] if i in places else guessed[i] for i in everywhere])
    for number in range(2 * half, config.depth):
        name = f"blocks.{number + 1}"  # the side interpolater stands before
        fused = linear(weights, f"{name}.skip_linear", torch.cat([x, whole], dim=1))
        x = run(name, fused, everywhere, number)
    return leave(model, weights, x, temb)


def reference(
    model: Any, inputs: dict[str, Any], kept: Tensor | None = None, amm: dict[int, Tensor] | None = None
) -> Tensor:
    """The prediction of a `DiT2DModel` or an `MDT2DModel` in float64; `kept` (B, K), `amm` (N, N) by block."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    matrices = {number: matrix.double() for number, matrix in (amm or {}).items()}
    out = []
    for i, image in enumerate(inputs["hidden_states"].double()):
        label = int(inputs["class_labels"][i]) if "class_labels" in inputs else None
        temb = condition(model, weights, int(inputs["timestep"][i]), label)
        if model.family == "DiT":
            out.append(dit(model, weights, image, temb, matrices))
        else:
            out.append(mdt(model, weights, image, temb, matrices, None if kept is None else kept[i].tolist()))
    return torch.stack(out)
