"""Masks of token-relation-enhanced masked training, as data.

EDT (arXiv 2410.23788, section 3.3) hides tokens *inside* the down-sampling modules, after the shallow blocks have seen
every token: a hidden token's share of the merged 2x2 vector is zeroed. There is no mask token, no side decoder, and the
loss covers every position. XL additionally replaces tokens inside stage 0 by their bare position embedding.

MDTv2 (arXiv 2303.14389) leaves tokens out at the input, before any block has seen them, and puts guesses in their place
later on (`nn.transformer_block.SideInterpolater`). Its own network has no other masks; EDT can be trained with it for
comparison.

The networks draw nothing. A `MaskPlan` says how much to hide, `MaskPlan.draw` makes a `TokenMasks` from keyed streams,
and a model acts on a `TokenMasks` whenever it is given one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..util.rng import Purpose, stream

# Shares of tokens that MDTv2-S leaves out at the input: 0.3 + 0.2 u with u uniform. Those of its larger sizes are not
# known to this project.
INPUT_MASKS = (0.3, 0.5)


@dataclass(frozen=True)
class TokenMasks:
    """Keep masks of one batch; 1 (or True) means the token is kept.

    Attributes:
        down: one tensor of shape (B, N_d) per down-sampling module, N_d = tokens at that module's *input*; bool, uint8
            or float.
            Empty: none of them hides anything.
        stage0: (B, N_0) on the first grid, or None. Acts before one block of stage 0 (the model's `stage0_mask_block`).
        input: (B, N_0), or None: tokens that are left out at the input; as many in each image.
        kept_tokens: how many of an image `input` keeps, if the maker knows: to count them waits for an accelerator.
    """

    down: tuple[Tensor, ...] = ()
    stage0: Tensor | None = None
    input: Tensor | None = None
    kept_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "down", tuple(self.down))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TokenMasks":
        """Return a copy on another device and/or of another dtype."""
        return self.changed(lambda mask: mask.to(device=device, dtype=dtype))

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TokenMasks":
        """Return what `change` makes of each mask."""
        stage0, entry = (None if mask is None else change(mask) for mask in (self.stage0, self.input))
        return TokenMasks(tuple(map(change, self.down)), stage0, entry, self.kept_tokens)

    def kept_at_input(self) -> Tensor | None:
        """Numbers (B, K) of the tokens that are there, ascending, or None where none is left out."""
        if self.input is None:
            return None
        if self.kept_tokens is not None:
            return self.input.bool().to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.kept_tokens]
        return self.input.bool().nonzero()[:, 1].view(self.input.shape[0], -1)

    def check(self, batch: int, grid: tuple[int, int], down_grids: Sequence[tuple[int, int]]) -> None:
        """Raise a ValueError if shapes do not fit a batch, the first grid and those at the down-sampling modules."""
        if len(self.down) not in (0, len(down_grids)):
            raise ValueError(
                f"token_masks.down holds {len(self.down)} masks, but the model has {len(down_grids)} down-sampling "
                "modules: give one mask per module, in order, or none"
            )
        if self.stage0 is not None and not down_grids:
            raise ValueError("token_masks.stage0 is for models with stages, which this one has not: leave it out")
        given = zip(self.down, down_grids, strict=False)
        named = [(f"token_masks.down[{i}]", mask, of) for i, (mask, of) in enumerate(given)]
        named += [("token_masks.stage0", self.stage0, grid)] if self.stage0 is not None else []
        named += [("token_masks.input", self.input, grid)] if self.input is not None else []
        for name, mask, (height, width) in named:
            if tuple(mask.shape) != (batch, height * width):
                raise ValueError(
                    f"{name} has shape {tuple(mask.shape)}, expected ({batch}, {height * width}): "
                    f"one value per image and per token of the {height}x{width} grid"
                )
        # On an accelerator the look would wait for the device in every forward.
        if self.input is not None and self.input.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = self.input.bool().sum(dim=1)
            if batch and (int(counts.min()) != int(counts.max()) or not int(counts.min())):
                raise ValueError(
                    f"token_masks.input keeps {int(counts.min())} to {int(counts.max())} tokens of an image: expected "
                    "as many in each, and one at least"
                )
            if batch and self.kept_tokens not in (None, int(counts.min())):
                raise ValueError(
                    f"token_masks.kept_tokens={self.kept_tokens}, but token_masks.input keeps {int(counts.min())} of "
                    "an image: give that number, or leave it out"
                )


@dataclass(frozen=True)
class MaskPlan:
    """How many tokens to hide, as uniform ranges of the hidden share.

    Attributes:
        down: one (low, high) per down-sampling module; the authors use (0.4, 0.5) and (0.1, 0.2).
            Empty: none of them hides anything.
        stage0: (low, high) for the extra mask inside stage 0 (the authors' XL: (0.15, 0.25)), or None.
        input: (low, high) for tokens left out at the input (MDTv2-S: (0.3, 0.5)), or None.
    """

    down: tuple[tuple[float, float], ...] = ((0.4, 0.5), (0.1, 0.2))
    stage0: tuple[float, float] | None = None
    input: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        ranges = [(f"down[{i}]", r) for i, r in enumerate(self.down)]
        ranges += [(name, r) for name in ("stage0", "input") if (r := getattr(self, name)) is not None]
        for name, (low, high) in ranges:
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"mask range {name} = ({low}, {high}): expected 0 <= low <= high <= 1")

    def draw(self, seed: int, step: int, positions: Sequence[int], grids: Sequence[tuple[int, int]]) -> TokenMasks:
        """Draw the masks of one batch.

        One ratio is drawn per mask and per *global* batch; then every token is hidden independently with that
        probability, from a stream of its sample's own. At the input the share is of tokens, not of probability: N (1 -
        ratio) tokens, rounded down and one at least, are kept in each sample.

        Args:
            seed: the run's seed.
            step: optimizer step.
            positions: index of each sample in the global batch.
            grids: (height, width) of the token grid at the input of each down-sampling module; the first is that of
                the input.

        Returns:
            Boolean `TokenMasks` on the CPU.
        """
        if self.down and len(self.down) != len(grids):
            raise ValueError(
                f"the mask plan has {len(self.down)} ranges for down-sampling modules, the model has {len(grids)} "
                "such modules: give one (low, high) per module"
            )
        ratios = stream(seed, Purpose.MASK_RATIO, step)
        shares = [float(ratios.uniform(low, high)) for low, high in self.down]
        stage0_share = None if self.stage0 is None else float(ratios.uniform(*self.stage0))
        input_share = None if self.input is None else float(ratios.uniform(*self.input))
        generators = [stream(seed, Purpose.MASK, step, position) for position in positions]

        def keep(share: float, tokens: int) -> Tensor:
            return torch.stack([torch.from_numpy(g.random(tokens) >= share) for g in generators])

        def keep_exactly(count: int, tokens: int) -> Tensor:
            ranks = torch.stack([torch.from_numpy(g.random(tokens).argsort().argsort()) for g in generators])
            return ranks < count

        down = tuple(keep(share, h * w) for share, (h, w) in zip(shares, grids, strict=False))
        tokens = grids[0][0] * grids[0][1] if grids else 0
        stage0 = None if stage0_share is None else keep(stage0_share, tokens)
        if input_share is None:
            return TokenMasks(down, stage0)
        count = max(int(tokens * (1 - input_share)), 1)
        return TokenMasks(down, stage0, keep_exactly(count, tokens), count)
