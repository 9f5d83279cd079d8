"""The adaLN-Zero transformer block (DiT, arXiv 2212.09748) on a token grid, which all backbones are made of."""

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from .adaln import NORM_EPS, Modulation, modulate
from .attention import GridAttention
from .embeddings import sincos_position_table


class _LongSkip:
    """One long skip and the one left before it; the last one holds nothing and comes before itself.

    Linked, with no None at the end: a compiled block would be compiled anew for each length of a list, and for None.
    """

    def __init__(self, hidden_states: Tensor | None, before: "_LongSkip | None" = None) -> None:
        self.hidden_states = hidden_states
        self.before: _LongSkip = self if before is None else before


class Skips:
    """What blocks of one forward pass share beside the hidden states.

    A plain object rather than a list, because diffusers' group offloading copies lists it finds among arguments.

    Args:
        masks: the token masks of the pass, or None.
        modulate: whether AMM acts.
        kept: where the masks leave tokens out at the input, the numbers (B, K) of those that are there.

    Attributes:
        entry: tokens of the whole picture before the first block, (B, N, D).
    """

    entry: Tensor

    def __init__(self, masks: Any = None, modulate: bool = True, kept: Tensor | None = None) -> None:
        self.masks = masks
        self.modulate = modulate
        self.kept = kept
        self._newest = _LongSkip(None)

    def push(self, hidden_states: Tensor) -> None:
        """Leave hidden states for a later block: a long skip."""
        self._newest = _LongSkip(hidden_states, self._newest)

    def pop(self) -> Tensor:
        """The newest hidden states left (LIFO)."""
        newest = self._newest
        assert newest.hidden_states is not None
        self._newest = newest.before
        return newest.hidden_states


class AdaLNZeroBlock(nn.Module):
    """Self-attention and MLP, each after a modulated norm and before a gate that starts at zero.

    (B, N, C) -> (B, N, C).

    Args:
        dim: channels.
        heads: attention heads.
        cond_dim: channels of the condition `temb` (B, cond_dim).
        grid: (height, width) of the tokens.
        mlp_ratio: hidden over outer width of the MLP.
        partial: whether it stands where tokens may have been left out at the input (`Skips.kept`).
        attention: further arguments of `GridAttention`.
    """

    # Whether it leaves a long skip, takes one off, or neither; see `caching.spans`.
    pushes = pops = False

    def __init__(
        self,
        dim: int,
        heads: int,
        cond_dim: int,
        grid: tuple[int, int],
        mlp_ratio: float,
        partial: bool = False,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.partial = partial
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attn = GridAttention(dim, heads, grid, **attention)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu-approximate")
        for linear in cast(tuple[nn.Linear, nn.Linear], (self.ff.net[0].proj, self.ff.net[2])):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.adaln = Modulation(cond_dim, dim, 6, zero_init=True)

    def forward(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        return self.transform(hidden_states, temb, skips)

    def transform(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        """What is computed between taking and leaving long skips; may be computed a second time."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(temb)
        normed = modulate(self.norm1(hidden_states), shift1, scale1)
        attention = self.attn(normed, skips.modulate, skips.kept if self.partial else None)
        hidden_states = hidden_states + gate1.unsqueeze(1) * attention
        mlp = self.ff(modulate(self.norm2(hidden_states), shift2, scale2))
        return hidden_states + gate2.unsqueeze(1) * mlp

    def recomputed(
        self, checkpoint: Callable[..., Tensor], hidden_states: Tensor, temb: Tensor, skips: Skips
    ) -> Tensor:
        """`forward` with activations that `checkpoint(function, *arguments)` computes again in the backward pass."""
        return checkpoint(self, hidden_states, temb, skips)


class SideInterpolater(nn.Module):
    """Puts tokens that were left out at the input back in (MDTv2, arXiv 2303.14389): (B, K, C) -> (B, N, C).

    The tokens that are there keep their values; in the gaps stands what a transformer block makes of a learned mask
    token, the positions and the tokens around. Nothing is computed where no token was left out.

    Args:
        block: a transformer block on the whole grid.
        dim: channels.
        grid: (height, width) of the whole grid.
        learned_positions: the positions are learned, and added to every token whether any was left out or not (MDTv2);
            otherwise they are a fixed table that the block alone sees, and a whole picture passes unchanged.
    """

    pushes = pops = False
    pos_embed: Tensor

    def __init__(self, block: AdaLNZeroBlock, dim: int, grid: tuple[int, int], learned_positions: bool) -> None:
        super().__init__()
        self.block = block
        self.learned_positions = learned_positions
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        table = sincos_position_table(dim, *grid)
        if learned_positions:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)

    def forward(self, hidden_states: Tensor, temb: Tensor, skips: Skips) -> Tensor:
        if skips.kept is None:
            return hidden_states + self.pos_embed if self.learned_positions else hidden_states
        batch, tokens, dim = hidden_states.shape[0], self.pos_embed.shape[1], hidden_states.shape[2]
        places = skips.kept.unsqueeze(-1)  # (B, K, 1)
        whole = self.mask_token.to(hidden_states.dtype).expand(batch, tokens, dim)
        whole = whole.scatter(1, places.expand(-1, -1, dim), hidden_states)
        positioned = whole + self.pos_embed.to(whole.dtype)
        there = torch.zeros(batch, tokens, 1, dtype=torch.bool, device=whole.device).scatter(1, places, True)
        filled = self.block(positioned, temb, skips)
        return torch.where(there, positioned if self.learned_positions else whole, filled)
