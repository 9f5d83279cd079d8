"""What is random in one training step, in two halves.

`HostDraws` needs no state of the model or of the timestep sampler, so that loader workers can make it ahead of time.
`StepDraws` is it after the sampler, with its history of the moment, has turned uniforms into timesteps. Nothing here
consumes a shared random state: every draw is keyed by (seed, step, position in the global batch, pass).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..models.masking import MaskPlan, TokenMasks
from ..util.rng import Purpose, normals, uniforms

PassName = Literal["full", "masked"]

PASSES: dict[str, tuple[PassName, ...]] = {
    "full+masked": ("full", "masked"),
    "full": ("full",),
    "masked": ("masked",),
}
# The key of a pass's draws. A pass keeps its draws whichever other passes run beside it.
_PASS_INDEX: dict[PassName, int] = {"full": 0, "masked": 1}


@dataclass(frozen=True)
class PassDraws:
    """Random draws of one forward pass.

    Attributes:
        name: "full" or "masked".
        noise: standard normal float32 (B, C, H, W).
        labels: (B,) int64 after label dropping, or None for an unconditional model.
        masks: token masks, in the masked pass only.
    """

    name: PassName
    noise: Tensor
    labels: Tensor | None
    masks: TokenMasks | None

    def to(self, device: torch.device) -> "PassDraws":
        """Return the draws on another device."""
        move = _mover(device)
        return replace(
            self,
            noise=move(self.noise),
            labels=None if self.labels is None else move(self.labels),
            masks=_each(self.masks, move),
        )


@dataclass(frozen=True)
class StepDraws:
    """Random draws of one training step.

    Attributes:
        t: timesteps (B,), common to all passes: int64, or float32 on continuous time.
        weight: their importance weights (B,) float32.
        passes: draws of each forward pass, in the order they run.
    """

    t: Tensor
    weight: Tensor
    passes: list[PassDraws]

    def to(self, device: torch.device) -> "StepDraws":
        """Return the draws on another device."""
        move = _mover(device)
        return StepDraws(move(self.t), move(self.weight), [draws.to(device) for draws in self.passes])


@dataclass(frozen=True)
class HostPass:
    """The half of `PassDraws` that needs no labels.

    Attributes:
        name: "full" or "masked".
        noise: standard normal float32 (B, C, H, W).
        dropped: bool (B,), whose labels are dropped; None if there are no labels.
        masks: token masks, in the masked pass only.
    """

    name: PassName
    noise: Tensor
    dropped: Tensor | None
    masks: TokenMasks | None


@dataclass(frozen=True)
class HostDraws:
    """Everything random of one step that the model's and the sampler's state do not touch, on the CPU.

    It pickles, and `DataLoader(pin_memory=True)` pins it.

    Attributes:
        u: uniforms in [0, 1) that become timesteps, float64 (B,).
        passes: draws of each forward pass, in the order they run.
    """

    u: Tensor
    passes: tuple[HostPass, ...]

    def __len__(self) -> int:
        return len(self.u)

    def pin_memory(self, device: torch.device | str | None = None) -> "HostDraws":
        """Return the draws with what goes to a device in page-locked memory; u is used on the CPU and stays."""

        def pin(tensor: Tensor) -> Tensor:
            return tensor.pin_memory() if device is None else tensor.pin_memory(device)

        return HostDraws(
            self.u,
            tuple(
                replace(
                    draws,
                    noise=pin(draws.noise),
                    dropped=None if draws.dropped is None else pin(draws.dropped),
                    masks=_each(draws.masks, pin),
                )
                for draws in self.passes
            ),
        )


@dataclass(frozen=True)
class HostDrawer:
    """Makes the `HostDraws` of steps; small and picklable, for `data.training_loader(draw=...)`.

    Attributes:
        seed: the run's seed.
        shape: shape of one latent, (C, H, W).
        passes: names of the passes, in the order they run.
        label_dropout: probability that a label is dropped, in [0, 1].
        conditional: whether there are labels to drop.
        mask_plan: how many tokens to hide in the masked pass.
        mask_grids: (height, width) of the tokens at each down-sampling module's input; not used without masks.
    """

    seed: int
    shape: tuple[int, ...]
    passes: tuple[PassName, ...]
    label_dropout: float
    conditional: bool
    mask_plan: MaskPlan | None
    mask_grids: tuple[tuple[int, int], ...]

    def __call__(self, step: int, positions: Sequence[int]) -> HostDraws:
        """Draw for the samples at B positions of the global batch of a step."""
        places = [int(position) for position in positions]
        u = torch.from_numpy(uniforms(self.seed, Purpose.TIMESTEP, step, places))
        return HostDraws(u, tuple(self._pass(name, step, places) for name in self.passes))

    def _pass(self, name: PassName, step: int, places: list[int]) -> HostPass:
        index = _PASS_INDEX[name]
        dropped = masks = None
        if self.conditional and self.label_dropout == 0.0:
            dropped = torch.zeros(len(places), dtype=torch.bool)
        elif self.conditional:
            dropped = torch.from_numpy(
                uniforms(self.seed, Purpose.LABEL_DROP, step, places, index) < self.label_dropout
            )
        if name == "masked" and self.mask_plan is not None:
            masks = self.mask_plan.draw(self.seed, step, places, self.mask_grids)
        return HostPass(name, normals(self.seed, Purpose.NOISE, step, places, self.shape, index), dropped, masks)


def joined(passes: Sequence[PassDraws]) -> tuple[Tensor, Tensor | None, TokenMasks | None]:
    """Return noise, labels and masks of several passes as those of one larger batch; passes without masks hide none.

    Passes with tokens left out at the input have fewer tokens than others and cannot be joined (`can_be_joined`).
    """
    noise = torch.cat([draws.noise for draws in passes])
    given = [draws.labels for draws in passes if draws.labels is not None]
    labels = torch.cat(given) if given else None
    pattern = next((draws.masks for draws in passes if draws.masks is not None), None)
    if pattern is None:
        return noise, labels, None
    nothing_hidden = pattern.changed(torch.ones_like)
    own = [draws.masks or nothing_hidden for draws in passes]
    stage0 = [masks.stage0 for masks in own if masks.stage0 is not None]
    down = zip(*(masks.down for masks in own), strict=True)
    return noise, labels, TokenMasks(tuple(map(torch.cat, down)), torch.cat(stage0) if stage0 else None)


def can_be_joined(passes: Sequence[PassDraws]) -> bool:
    """Whether passes may run as one batch: there are several, and each has all tokens."""
    return len(passes) > 1 and all(draws.masks is None or draws.masks.input is None for draws in passes)


def _mover(device: torch.device) -> Callable[[Tensor], Tensor]:
    # To an accelerator without waiting for what it still computes; towards the CPU the values are needed at once.
    ahead = device.type != "cpu"
    return lambda tensor: tensor.to(device, non_blocking=ahead)


def _each(masks: TokenMasks | None, change: Callable[[Tensor], Tensor]) -> TokenMasks | None:
    return None if masks is None else masks.changed(change)
