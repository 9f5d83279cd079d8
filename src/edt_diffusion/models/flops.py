"""Multiply-adds from first principles, counted for one image as the EDT authors count them.

Convolutions and matrix products only; the label look-up, norms, biases, softmax and AMM count as nothing.
"""


def patch_embedding(tokens: int, patch_size: int, in_channels: int, dim: int) -> int:
    """Patch convolution: N p^2 c D."""
    return tokens * patch_size**2 * in_channels * dim


def timestep_embedding(dim: int, frequencies: int = 256) -> int:
    """Two-layer MLP: F D + D^2."""
    return frequencies * dim + dim * dim


def transformer_block(tokens: int, dim: int, cond_dim: int, mlp_ratio: float = 4.0) -> dict[str, int]:
    """adaLN 6 D C, projections 4 N C^2, attention products 2 N^2 C, MLP 2 N C times its hidden width."""
    return {
        "adaln": 6 * cond_dim * dim,
        "projections": 4 * tokens * dim * dim,
        "attention": 2 * tokens * tokens * dim,
        "mlp": 2 * tokens * dim * int(dim * mlp_ratio),
    }


def down_sample(tokens_in: int, dim_in: int, dim_out: int, cond_dim: int) -> int:
    """adaLN 8 D C, reduction 4 C C' on a quarter of the tokens."""
    return 8 * cond_dim * dim_in + (tokens_in // 4) * 4 * dim_in * dim_out


def up_sample(tokens_in: int, dim_in: int, dim_out: int, dim_skip: int, cond_dim: int) -> int:
    """Expansion 4 N C C', then adaLN and the linear layer that fuses the long skip, on four times the tokens."""
    joint = dim_out + dim_skip
    return tokens_in * dim_in * 4 * dim_out + 2 * cond_dim * joint + 4 * tokens_in * joint * dim_out


def skip_fusion(tokens: int, dim: int) -> int:
    """Linear layer from hidden states and a long skip of equal width: 2 N C^2."""
    return 2 * tokens * dim * dim


def final_layer(tokens: int, dim: int, cond_dim: int, patch_size: int, out_channels: int) -> int:
    """adaLN 2 D C and the projection to pixels."""
    return 2 * cond_dim * dim + tokens * dim * patch_size**2 * out_channels
