"""What modulation does, in numbers: to all pairs of a grid, and to the attention of a network's blocks."""

from typing import Any

import torch
from torch import Tensor

from ..nn.attention import GridAttention
from ..nn.modulation import AttentionModulation, default_radius_squared_or_given, modulation_matrix


def landmarks(height: int, width: int) -> dict[str, int]:
    """Numbers of three tokens of a grid: a corner, the middle of an edge, the centre."""
    return {"corner": 0, "edge": width // 2, "centre": height // 2 * width + width // 2}


def matrix_facts(height: int, width: int, formula: str, radius: float | str | None) -> dict[str, Any]:
    """What a modulation matrix does, in numbers.

    Returns:
        `grid`; `radius_cells`; `zeroed`, the share of the pairs whose entry is 0; `weights`, the least and largest of
        the others; `gain`, the row sums over the number of tokens, by which the output grows if attention is uniform:
        least, largest, and at the landmarks; `seen`, the share of the tokens that each landmark keeps.
    """
    matrix = modulation_matrix(height, width, formula, radius).double()
    kept, gain = matrix > 0, matrix.mean(dim=1)
    places = landmarks(height, width)
    return {
        "grid": [height, width],
        "radius_cells": default_radius_squared_or_given(height, width, radius) ** 0.5,
        "zeroed": 1 - float(kept.double().mean()),
        "weights": [float(matrix[kept].min()), float(matrix.max())],
        "gain": {
            "least": float(gain.min()), "largest": float(gain.max()),
            **{name: float(gain[token]) for name, token in places.items()},
        },
        "seen": {name: float(kept[token].double().mean()) for name, token in places.items()},
    }  # fmt: skip


@torch.no_grad()
def attention_maps(
    network: Any, inputs: dict[str, Any], setting: AttentionModulation
) -> dict[int, tuple[Tensor, Tensor]]:
    """Attention of the modulated blocks in a pass without modulation and in one with it.

    Queries, keys and biases are those of the blocks; the probabilities are written out in float32. Later blocks see
    what the earlier ones made of the input, with modulation something else than without.

    Args:
        network: a backbone.
        inputs: keyword arguments of one call, of one picture.
        setting: the modulation.

    Returns:
        By block number the weights without and with, each (heads, N, N), row = query. Rows of the first add up to 1,
        those of the second to the gain of their position.
    """
    layers = network.attention_layers()
    found: list[dict[int, Tensor]] = []
    for modulation in (None, setting):
        seen: dict[int, Tensor] = {}

        def keep(module: GridAttention, given: tuple[Any, ...], named: dict[str, Any], seen: Any = seen) -> None:
            block = next(number for number, (attention, _) in enumerate(layers) if attention is module)
            seen[block] = _weights(module, given[0] if given else named["hidden_states"])[0]

        handles = [
            layers[block][0].register_forward_pre_hook(keep, with_kwargs=True)  # pyright: ignore[reportArgumentType]
            for block in setting.blocks
        ]
        try:
            with network.use_attention_modulation(modulation):
                network(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        found.append(seen)
    without, on = found
    return {block: (without[block], on[block]) for block in setting.blocks}


def attention_facts(without: Tensor, modulated: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    """Numbers about one block's attention (heads, N, N), means over heads and queries.

    Returns:
        `distance` in cells that is looked over, without and with modulation (of the weights over their sum); `entropy`
        in nats, likewise; `row_sum`, their sum, without (1) and with; `gain`, the row sums with modulation by position:
        least, largest, and at the landmarks.
    """
    height, width = grid
    row = torch.arange(height).repeat_interleave(width)
    column = torch.arange(width).repeat(height)
    distance = ((row[:, None] - row) ** 2 + (column[:, None] - column) ** 2).float().sqrt()
    out: dict[str, Any] = {"distance": {}, "entropy": {}, "row_sum": {}}
    for name, weights in (("without", without), ("with", modulated)):
        sums = weights.sum(dim=-1, keepdim=True)
        shares = weights / sums
        out["row_sum"][name] = float(sums.mean())
        out["distance"][name] = float((shares * distance).sum(dim=-1).mean())
        out["entropy"][name] = float(-torch.special.xlogy(shares, shares).sum(dim=-1).mean())
    gains = modulated.sum(dim=-1).mean(dim=0)
    places = landmarks(height, width)
    out["gain"] = {
        "least": float(gains.min()), "largest": float(gains.max()),
        **{name: float(gains[token]) for name, token in places.items()},
    }  # fmt: skip
    return out


def _weights(attention: GridAttention, hidden_states: Tensor) -> Tensor:
    """Attention (B, heads, N, N) of tokens (B, N, C), by the module's projections, bias and modulation."""
    if attention.fused_projections:
        query, key, _ = attention.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key = attention.to_q(hidden_states), attention.to_k(hidden_states)
    query, key = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float() for x in (query, key))
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + attention.position_bias(torch.float32)
    weights = scores.softmax(dim=-1)
    return (weights if attention.modulation is None else weights * attention.modulation).cpu()
