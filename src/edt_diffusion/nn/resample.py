"""Rearrangement of tokens between grids: 2x2 merge and its inverse kind, the 2x2 split."""

from torch import Tensor


def merge_2x2(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Concatenate each 2x2 neighbourhood along channels.

    The order of the four cells, as (row, column) offsets, is (0,0), (1,0), (0,1), (1,1).

    Args:
        tokens: (B, h * w, C), row-major.
        grid: (h, w), both even.

    Returns:
        (B, h * w / 4, 4 C).
    """
    height, width = grid
    batch, _, channels = tokens.shape
    cells = tokens.reshape(batch, height // 2, 2, width // 2, 2, channels)
    cells = cells.permute(0, 1, 3, 4, 2, 5)  # B, h/2, w/2, column offset, row offset, C
    return cells.reshape(batch, height * width // 4, 4 * channels)


def split_2x2(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Spread each token over a 2x2 neighbourhood; channels are laid out (row offset, column offset, C).

    Args:
        tokens: (B, h * w, 4 C), row-major.
        grid: (h, w) of the *input*.

    Returns:
        (B, 4 h w, C) on the grid (2 h, 2 w).
    """
    height, width = grid
    batch, _, channels = tokens.shape
    cells = tokens.reshape(batch, height, width, 2, 2, channels // 4)
    cells = cells.permute(0, 1, 3, 2, 4, 5)  # B, h, row offset, w, column offset, C
    return cells.reshape(batch, 4 * height * width, channels // 4)
