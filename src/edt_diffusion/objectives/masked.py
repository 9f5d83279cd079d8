"""EDT's training step: the full input and the masked input, each with noise and label drops of its own.

Both passes see the same latents and timesteps; their losses are added with equal weight and one backward pass follows
(EDT, arXiv 2410.23788, section 3.3). Any objective can be wrapped. Nothing here consumes a shared random state: every
draw is keyed by (seed, step, position in the global batch, pass).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from ..models.masking import MaskPlan, TokenMasks
from ..util.rng import Purpose, normals, uniforms
from .learned_variance import LossTerms
from .timesteps import TimestepSampler

PassName = Literal["full", "masked"]

_PASSES: dict[str, tuple[PassName, ...]] = {
    "full+masked": ("full", "masked"),
    "full": ("full",),
    "masked": ("masked",),
}
# The key of a pass's draws. A pass keeps its draws whichever other passes run beside it.
_PASS_INDEX: dict[PassName, int] = {"full": 0, "masked": 1}


class Objective(Protocol):
    """What can be wrapped: per-sample losses of one forward pass, on steps 0..num_train_timesteps-1."""

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps that may be drawn."""
        ...

    def terms(
        self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None, masks: TokenMasks | None = None
    ) -> LossTerms:
        """Return the losses of one forward pass, see `LearnedVarianceObjective.terms`."""
        ...


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
        return replace(
            self,
            noise=self.noise.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            masks=None if self.masks is None else self.masks.to(device),
        )


@dataclass(frozen=True)
class StepDraws:
    """Random draws of one training step.

    Attributes:
        t: timesteps (B,) int64, common to all passes.
        weight: their importance weights (B,) float32.
        passes: draws of each forward pass, in the order they run.
    """

    t: Tensor
    weight: Tensor
    passes: list[PassDraws]

    def to(self, device: torch.device) -> "StepDraws":
        """Return the draws on another device."""
        return StepDraws(self.t.to(device), self.weight.to(device), [draws.to(device) for draws in self.passes])


@dataclass(frozen=True)
class StepLoss:
    """Losses of one training step.

    Attributes:
        total: scalar to call `backward` on: sum over passes of mean(weight * loss).
        t: timesteps (B,) int64, for the timestep sampler's update.
        sampler_loss: detached (B,) float32, sum over passes of the loss *before* importance weighting: what the
            timestep sampler's update takes.
        metrics: detached scalars: "loss" (= total) and, for each pass, "loss_full", "mse_full", "mse_plain_full",
            "vb_full" (or "..._masked"). All are importance-weighted means, so that they estimate the value under
            uniform timesteps whichever sampler drew them.
    """

    total: Tensor
    t: Tensor
    sampler_loss: Tensor
    metrics: dict[str, Tensor]


class MaskedTraining:
    """Callable that turns a batch of latents into the loss of one training step.

    The unwrapped model supplies `null_label` (int, or None if it has no null class) and, for a masked pass,
    `mask_grids` (one (height, width) per down-sampling module). Its attention modulation, if it has any, is suspended
    during the forward passes, because it is meant for inference only.

    `timesteps.update` is left to the caller, who must first gather `StepLoss.t` and `StepLoss.sampler_loss` of all
    processes.

    Args:
        objective: gives the losses of one forward pass.
        timesteps: draws the timesteps; over as many as the objective has.
        mask_plan: how many tokens to hide; needed if there is a masked pass.
        label_dropout: probability that a label is replaced by the null label, in [0, 1]; independent per pass.
        passes: "full+masked" (EDT), "full" (EDT*, the paper's model without masked training), or "masked".
        train_with_amm: leave attention modulation as the model has it set.

    Raises:
        ValueError: if an argument is outside its range, a masked pass has no plan, or the numbers of timesteps differ.
    """

    def __init__(
        self,
        objective: Objective,
        timesteps: TimestepSampler,
        mask_plan: MaskPlan | None,
        label_dropout: float = 0.1,
        passes: Literal["full+masked", "full", "masked"] = "full+masked",
        train_with_amm: bool = False,
    ) -> None:
        if passes not in _PASSES:
            raise ValueError(f"passes = {passes!r}: expected one of {', '.join(map(repr, _PASSES))}")
        if "masked" in _PASSES[passes] and mask_plan is None:
            raise ValueError(f"passes = {passes!r} needs a mask_plan: give one, or train with passes='full'")
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout = {label_dropout}: expected a probability between 0 and 1")
        if timesteps.num_timesteps != objective.num_train_timesteps:
            raise ValueError(
                f"the timestep sampler draws from {timesteps.num_timesteps} timesteps, the objective has "
                f"{objective.num_train_timesteps}: build the sampler with objective.num_train_timesteps"
            )
        self.objective = objective
        self.timesteps = timesteps
        self.mask_plan = mask_plan
        self.label_dropout = label_dropout
        self.passes = _PASSES[passes]
        self.train_with_amm = train_with_amm

    def __call__(
        self, model: Any, x0: Tensor, labels: Tensor | None, *, seed: int, step: int, positions: Sequence[int]
    ) -> StepLoss:
        """Draw, run every pass and return the loss.

        Args:
            model: the network, possibly wrapped for parallel training or compiled.
            x0: clean latents (B, C, H, W).
            labels: (B,) int64, or None for an unconditional model.
            seed: the run's seed.
            step: optimizer step.
            positions: index of each sample in the global batch (over processes and micro-batches).

        Raises:
            ValueError: if positions or labels do not number B, or labels are to be dropped and the model has no null
                label.
        """
        if len(positions) != x0.shape[0]:
            raise ValueError(f"{len(positions)} positions for {x0.shape[0]} latents: give one position per latent")
        network = _unwrap(model)
        draws = self.draw(
            seed, step, positions, labels, network.null_label, tuple(x0.shape[1:]), getattr(network, "mask_grids", ())
        )
        return self.loss_of(model, x0, draws)

    def draw(
        self,
        seed: int,
        step: int,
        positions: Sequence[int],
        labels: Tensor | None,
        null_label: int | None,
        shape: tuple[int, ...],
        mask_grids: Sequence[tuple[int, int]],
    ) -> StepDraws:
        """Draw everything random of one step; a sample's draws depend on (seed, step, its position) only.

        Args:
            seed: the run's seed.
            step: optimizer step.
            positions: B indices into the global batch.
            labels: (B,) int64, or None.
            null_label: what a dropped label becomes; None if the model has no null class.
            shape: shape of one latent, (C, H, W).
            mask_grids: (height, width) of the tokens at each down-sampling module's input; not used without masks.

        Returns:
            Draws on the CPU; labels stay on their own device.

        Raises:
            ValueError: if labels do not number B, or are to be dropped and there is no null label.
        """
        places = [int(position) for position in positions]
        if labels is not None and tuple(labels.shape) != (len(places),):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, expected ({len(places)},): one per position")
        if labels is not None and self.label_dropout > 0.0 and null_label is None:
            raise ValueError(
                f"label_dropout = {self.label_dropout}, but the model has no null label: set label_dropout to 0, or "
                "build the model with a null class; for an unconditional model pass labels=None"
            )
        t, weight = self.timesteps.draw(uniforms(seed, Purpose.TIMESTEP, step, places))
        passes: list[PassDraws] = []
        for name in self.passes:
            index = _PASS_INDEX[name]
            kept = labels
            if labels is not None and null_label is not None:
                dropped = torch.from_numpy(uniforms(seed, Purpose.LABEL_DROP, step, places, index) < self.label_dropout)
                kept = labels.masked_fill(dropped.to(labels.device), null_label)
            masks = None
            if name == "masked" and self.mask_plan is not None:
                masks = self.mask_plan.draw(seed, step, places, mask_grids)
            passes.append(PassDraws(name, normals(seed, Purpose.NOISE, step, places, shape, index), kept, masks))
        return StepDraws(torch.from_numpy(t), torch.from_numpy(weight), passes)

    def loss_of(self, model: Any, x0: Tensor, draws: StepDraws) -> StepLoss:
        """Run every pass on given draws, which are moved to the device of x0 (B, C, H, W)."""
        draws = draws.to(x0.device)
        terms: dict[PassName, LossTerms] = {}
        with self._amm_suspended(model):
            for drawn in draws.passes:
                terms[drawn.name] = self.objective.terms(model, x0, draws.t, drawn.noise, drawn.labels, drawn.masks)
        total = torch.stack([(draws.weight * part.loss).mean() for part in terms.values()]).sum()
        metrics = {"loss": total.detach()}
        for name, part in terms.items():
            for key in ("loss", "mse", "mse_plain", "vb"):
                metrics[f"{key}_{name}"] = (draws.weight * getattr(part, key)).mean().detach()
        sampler_loss = torch.stack([part.loss.detach() for part in terms.values()]).sum(dim=0)
        return StepLoss(total, draws.t, sampler_loss, metrics)

    def _amm_suspended(self, model: Any) -> AbstractContextManager[Any]:
        suspend = getattr(_unwrap(model), "suspend_attention_modulation", None)
        return nullcontext() if self.train_with_amm or suspend is None else suspend()


def _unwrap(model: Any) -> Any:
    # keep_torch_compile=True (accelerate's default) would replace the module *inside* a compiled wrapper by the
    # unwrapped one, and so remove gradient synchronisation from a compiled DistributedDataParallel.
    return extract_model_from_parallel(model, keep_torch_compile=False)
