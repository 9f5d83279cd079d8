"""Position, patch and label embeddings."""

import torch
from torch import Tensor, nn

from .cubic import cubic_weights


def sincos_position_table(dim: int, height: int, width: int) -> Tensor:
    """Two-dimensional sine-cosine position table (MAE / DiT convention).

    With q = dim / 4 and omega_k = 10000^(-k / q), the token at (row r, column c) is
    [sin(c omega), cos(c omega), sin(r omega), cos(r omega)]: the column fills the first half. Positions are raw cell
    indices at every resolution.

    Returns:
        float32 tensor of shape (1, height * width, dim), computed in float64.

    Raises:
        ValueError: if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"width {dim} cannot hold a 2-D sine-cosine table: it must be a multiple of 4")
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(positions: Tensor) -> Tensor:
        angle = positions[:, None] * omega[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (n, dim / 2)

    columns = axis(torch.arange(width, dtype=torch.float64)).repeat(height, 1)
    rows = axis(torch.arange(height, dtype=torch.float64)).repeat_interleave(width, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


def resample_position_table(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A learned position table for another grid, by bicubic interpolation between the middles of the cells.

    Cells correspond as fractions of the picture, as in `nn.attention.resample_bias_table`.

    Args:
        table: (1, h w, dim) of the source grid, row-major.
        source: (h, w).
        target: (h', w').

    Returns:
        (1, h' w', dim), of the table's dtype; for equal grids the table itself.
    """
    if source == target:
        return table
    middles = [(torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5 for n, m in zip(source, target, strict=True)]
    rows, columns = (cubic_weights(at, n).to(table.device) for at, n in zip(middles, source, strict=True))
    grid = table.double().unflatten(1, source)
    return torch.einsum("yr,brcd,xc->byxd", rows, grid, columns).flatten(1, 2).to(table.dtype)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, C, H, W) -> (B, (H / p) * (W / p), dim), row-major."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))
        nn.init.zeros_(self.proj.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, grid: tuple[int, int], channels: int) -> Tensor:
    """Tokens (B, N, p * p * channels), channel fastest within a patch, to an image (B, channels, h * p, w * p)."""
    height, width = grid
    patches = tokens.reshape(-1, height, width, patch_size, patch_size, channels)
    image = patches.permute(0, 5, 1, 3, 2, 4)  # B, channels, h, p, w, p
    return image.reshape(-1, channels, height * patch_size, width * patch_size)


def embed_classes(table: nn.Embedding, labels: Tensor) -> Tensor:
    """Rows of a class table for int64 labels (B,); or their mixtures by weights (B, rows): -> (B, D)."""
    return labels.to(table.weight.dtype) @ table.weight if labels.is_floating_point() else table(labels)
