"""Adaptive layer norm: LN without affine, then scale and shift predicted from the condition (DiT, arXiv 2212.09748)."""

from torch import Tensor, nn

NORM_EPS = 1e-6


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """hidden_states (B, N, C) * (1 + scale) + shift, with shift and scale of shape (B, C)."""
    return hidden_states * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Modulation(nn.Module):
    """Chunks of Linear(SiLU(temb)): (B, cond_dim) -> `chunks` tensors of shape (B, dim)."""

    def __init__(self, cond_dim: int, dim: int, chunks: int, zero_init: bool) -> None:
        super().__init__()
        self.chunks = chunks
        self.act = nn.SiLU()
        self.linear = nn.Linear(cond_dim, chunks * dim)
        if zero_init:
            nn.init.zeros_(self.linear.weight)
        else:
            nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.act(temb)).chunk(self.chunks, dim=1)


class AdaLayerNorm(nn.Module):
    """Modulated layer norm (B, N, dim) -> (B, N, dim); the chunks are (shift, scale)."""

    def __init__(self, cond_dim: int, dim: int, zero_init: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.modulation = Modulation(cond_dim, dim, 2, zero_init)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.modulation(temb)
        return modulate(self.norm(hidden_states), shift, scale)
