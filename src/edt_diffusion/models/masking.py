"""Masks of token-relation-enhanced masked training, as data.

EDT (arXiv 2410.23788, section 3.3) hides tokens *inside* the down-sampling modules, after the shallow blocks have seen
every token: a hidden token's share of the merged 2x2 vector is zeroed. There is no mask token, no side decoder, and the
loss covers every position. XL additionally replaces tokens inside stage 0 by their bare position embedding.

The networks draw nothing. A `MaskPlan` says how much to hide, `MaskPlan.draw` makes a `TokenMasks` from keyed streams,
and a model acts on a `TokenMasks` whenever it is given one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..util.rng import Purpose, stream


@dataclass(frozen=True)
class TokenMasks:
    """Keep masks of one batch; 1 (or True) means the token is kept.

    Attributes:
        down: one tensor of shape (B, N_d) per down-sampling module, N_d = tokens at that module's *input*; bool, uint8
            or float.
        stage0: (B, N_0) on the first grid, or None. Acts before one block of stage 0 (the model's `stage0_mask_block`).
    """

    down: tuple[Tensor, ...]
    stage0: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "down", tuple(self.down))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TokenMasks":
        """Return a copy on another device and/or of another dtype."""
        return TokenMasks(
            tuple(m.to(device=device, dtype=dtype) for m in self.down),
            None if self.stage0 is None else self.stage0.to(device=device, dtype=dtype),
        )

    def check(self, batch: int, grids: Sequence[tuple[int, int]]) -> None:
        """Raise a ValueError if shapes do not fit a batch and the grids at the down-sampling modules' inputs."""
        if len(self.down) != len(grids):
            raise ValueError(
                f"token_masks.down holds {len(self.down)} masks, but the model has {len(grids)} down-sampling modules: "
                "give one mask per module, in order"
            )
        named = [(f"token_masks.down[{i}]", m, grid) for i, (m, grid) in enumerate(zip(self.down, grids, strict=True))]
        if self.stage0 is not None:
            named.append(("token_masks.stage0", self.stage0, grids[0]))
        for name, mask, (height, width) in named:
            if tuple(mask.shape) != (batch, height * width):
                raise ValueError(
                    f"{name} has shape {tuple(mask.shape)}, expected ({batch}, {height * width}): "
                    f"one value per image and per token of the {height}x{width} grid"
                )


@dataclass(frozen=True)
class MaskPlan:
    """How many tokens to hide, as uniform ranges of the hidden share.

    Attributes:
        down: one (low, high) per down-sampling module; the authors use (0.4, 0.5) and (0.1, 0.2).
        stage0: (low, high) for the extra mask inside stage 0 (the authors' XL: (0.15, 0.25)), or None.
    """

    down: tuple[tuple[float, float], ...] = ((0.4, 0.5), (0.1, 0.2))
    stage0: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        ranges = [(f"down[{i}]", r) for i, r in enumerate(self.down)]
        if self.stage0 is not None:
            ranges.append(("stage0", self.stage0))
        for name, (low, high) in ranges:
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"mask range {name} = ({low}, {high}): expected 0 <= low <= high <= 1")

    def draw(self, seed: int, step: int, positions: Sequence[int], grids: Sequence[tuple[int, int]]) -> TokenMasks:
        """Draw the masks of one batch.

        One ratio is drawn per mask and per *global* batch; then every token is hidden independently with that
        probability, from a stream of its sample's own.

        Args:
            seed: the run's seed.
            step: optimizer step.
            positions: index of each sample in the global batch.
            grids: (height, width) of the token grid at the input of each down-sampling module.

        Returns:
            Boolean `TokenMasks` on the CPU.
        """
        if len(self.down) != len(grids):
            raise ValueError(
                f"the mask plan has {len(self.down)} ranges for down-sampling modules, the model has {len(grids)} "
                "such modules: give one (low, high) per module"
            )
        ratios = stream(seed, Purpose.MASK_RATIO, step)
        shares = [float(ratios.uniform(low, high)) for low, high in self.down]
        stage0_share = None if self.stage0 is None else float(ratios.uniform(*self.stage0))
        generators = [stream(seed, Purpose.MASK, step, position) for position in positions]

        def keep(share: float, tokens: int) -> Tensor:
            return torch.stack([torch.from_numpy(g.random(tokens) >= share) for g in generators])

        down = tuple(keep(share, h * w) for share, (h, w) in zip(shares, grids, strict=True))
        stage0 = None if stage0_share is None else keep(stage0_share, grids[0][0] * grids[0][1])
        return TokenMasks(down, stage0)
