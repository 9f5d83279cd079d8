"""EDT's training step: the full input and the masked input, each with noise and label drops of its own.

Both passes see the same latents and timesteps; their losses are added with equal weight and one backward pass follows
(EDT, arXiv 2410.23788, section 3.3). Any objective can be wrapped. What is drawn is in `draws`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from ..models.masking import MaskPlan
from .draws import PASSES, HostDrawer, HostDraws, PassDraws, PassName, StepDraws, can_be_joined, joined
from .terms import LossTerms, Objective, StepLoss, is_continuous
from .timesteps import TimestepSampler


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
        joint: run both passes as one batch of twice the size, whose full half has masks that hide nothing. Same losses
            and gradients up to rounding; which is faster depends on the device and the batch. May be set later. Without
            effect where tokens are left out at the input.

    Raises:
        ValueError: if an argument is outside its range, a masked pass has no plan, or the timesteps are not the
            objective's.
    """

    def __init__(
        self,
        objective: Objective,
        timesteps: TimestepSampler,
        mask_plan: MaskPlan | None,
        label_dropout: float = 0.1,
        passes: Literal["full+masked", "full", "masked"] = "full+masked",
        train_with_amm: bool = False,
        joint: bool = False,
    ) -> None:
        if passes not in PASSES:
            raise ValueError(f"passes = {passes!r}: expected one of {', '.join(map(repr, PASSES))}")
        if "masked" in PASSES[passes] and mask_plan is None:
            raise ValueError(f"passes = {passes!r} needs a mask_plan: give one, or train with passes='full'")
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout = {label_dropout}: expected a probability between 0 and 1")
        if timesteps.num_timesteps != objective.num_train_timesteps:
            raise ValueError(
                f"the timestep sampler draws from {timesteps.num_timesteps} timesteps, the objective has "
                f"{objective.num_train_timesteps}: build the sampler with objective.num_train_timesteps"
            )
        if is_continuous(timesteps) != is_continuous(objective):
            kinds = {True: "continuous", False: "discrete"}
            raise ValueError(
                f"the timestep sampler is for {kinds[is_continuous(timesteps)]} time, the objective for "
                f"{kinds[is_continuous(objective)]} time: build the sampler with the objective's"
            )
        self.objective = objective
        self.timesteps = timesteps
        self.mask_plan = mask_plan
        self.label_dropout = label_dropout
        self.passes = PASSES[passes]
        self.train_with_amm = train_with_amm
        self.joint = joint

    def __call__(
        self,
        model: Any,
        x0: Tensor,
        labels: Tensor | None,
        *,
        seed: int,
        step: int,
        positions: Sequence[int],
        draws: HostDraws | None = None,
    ) -> StepLoss:
        """Draw, run every pass and return the loss.

        Args:
            model: the network, possibly wrapped for parallel training or compiled.
            x0: clean latents (B, C, H, W).
            labels: (B,) int64, or None for an unconditional model.
            seed: the run's seed.
            step: optimizer step.
            positions: index of each sample in the global batch (over processes and micro-batches).
            draws: what `host_draws` gives for these arguments, if it is at hand already; else it is made here.

        Raises:
            ValueError: if positions, labels or draws do not number B, or labels are to be dropped and the model has no
                null label.
        """
        if len(positions) != x0.shape[0]:
            raise ValueError(f"{len(positions)} positions for {x0.shape[0]} latents: give one position per latent")
        network = _unwrap(model)
        if draws is None:
            draws = self._host(
                seed, step, positions, labels, network.null_label, x0.shape[1:], getattr(network, "mask_grids", ())
            )
        for drawn in draws.passes:
            if drawn.noise.shape != x0.shape:
                raise ValueError(
                    f"the draws are for latents of shape {tuple(drawn.noise.shape)}, not {tuple(x0.shape)}: "
                    "give host_draws the shape of the latents and their positions"
                )
        return self.loss_of(model, x0, self.finish(draws, labels, network.null_label))

    def drawer(
        self, seed: int, shape: Sequence[int], mask_grids: Sequence[tuple[int, int]], conditional: bool
    ) -> HostDrawer:
        """Return the callable (step, positions) -> `HostDraws` of a run, which loader workers can hold.

        Args:
            seed: the run's seed.
            shape: shape of one latent, (C, H, W).
            mask_grids: (height, width) of the tokens at each down-sampling module's input (`model.mask_grids`).
            conditional: whether there are labels, and a null label for those dropped.
        """
        grids = tuple((int(height), int(width)) for height, width in mask_grids)
        return HostDrawer(seed, tuple(shape), self.passes, self.label_dropout, conditional, self.mask_plan, grids)

    def host_draws(
        self,
        seed: int,
        step: int,
        positions: Sequence[int],
        shape: Sequence[int],
        mask_grids: Sequence[tuple[int, int]],
        conditional: bool,
    ) -> HostDraws:
        """Draw everything random of one step that needs no state; see `drawer` for the arguments.

        A sample's draws depend on (seed, step, its position) only. `positions` are B indices into the global batch.
        """
        return self.drawer(seed, shape, mask_grids, conditional)(step, positions)

    def finish(self, host: HostDraws, labels: Tensor | None, null_label: int | None) -> StepDraws:
        """Choose the timesteps, by the sampler's present history, and drop labels.

        Args:
            host: draws of B samples.
            labels: (B,) int64, or None.
            null_label: what a dropped label becomes; None if the model has no null class.

        Returns:
            Draws on the CPU; labels stay on their own device.

        Raises:
            ValueError: if labels do not number B, or are to be dropped and there is no null label.
        """
        self._check_labels(len(host), labels, null_label)
        t, weight = self.timesteps.draw(host.u.numpy())
        passes: list[PassDraws] = []
        for drawn in host.passes:
            kept = labels
            if labels is not None and null_label is not None:
                if drawn.dropped is None:
                    raise ValueError("the draws are for an unconditional model: draw them with conditional=True")
                dropped = drawn.dropped.to(labels.device, non_blocking=labels.device.type != "cpu")
                kept = labels.masked_fill(dropped, null_label)
            passes.append(PassDraws(drawn.name, drawn.noise, kept, drawn.masks))
        return StepDraws(torch.from_numpy(t), torch.from_numpy(weight), passes)

    def draw(
        self,
        seed: int,
        step: int,
        positions: Sequence[int],
        labels: Tensor | None,
        null_label: int | None,
        shape: Sequence[int],
        mask_grids: Sequence[tuple[int, int]],
    ) -> StepDraws:
        """Draw everything random of one step: `host_draws`, then `finish`.

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
        host = self._host(seed, step, positions, labels, null_label, shape, mask_grids)
        return self.finish(host, labels, null_label)

    def loss_of(self, model: Any, x0: Tensor, draws: StepDraws) -> StepLoss:
        """Run every pass on given draws, which are moved to the device of x0 (B, C, H, W)."""
        draws = draws.to(x0.device)
        with self._amm_suspended(model):
            terms = self._terms(model, x0, draws)
        total = torch.stack([(draws.weight * part.loss).mean() for part in terms.values()]).sum()
        metrics = {"loss": total.detach()}
        for name, part in terms.items():
            for key in ("loss", "mse", "mse_plain", "vb"):
                metrics[f"{key}_{name}"] = (draws.weight * getattr(part, key)).mean().detach()
        losses: dict[str, Tensor] = {name: part.loss.detach() for name, part in terms.items()}
        sampler_loss = torch.stack(list(losses.values())).sum(dim=0)
        return StepLoss(total, draws.t, sampler_loss, metrics, losses, draws.t / self.objective.num_train_timesteps)

    def _terms(self, model: Any, x0: Tensor, draws: StepDraws) -> dict[PassName, LossTerms]:
        count = len(draws.passes)
        if not self.joint or not can_be_joined(draws.passes):
            return {
                drawn.name: self.objective.terms(model, x0, draws.t, drawn.noise, drawn.labels, drawn.masks)
                for drawn in draws.passes
            }
        noise, labels, masks = joined(draws.passes)
        both = self.objective.terms(model, torch.cat([x0] * count), draws.t.repeat(count), noise, labels, masks)
        return {drawn.name: part for drawn, part in zip(draws.passes, both.split(count), strict=True)}

    def _host(
        self,
        seed: int,
        step: int,
        positions: Sequence[int],
        labels: Tensor | None,
        null_label: int | None,
        shape: Sequence[int],
        mask_grids: Sequence[tuple[int, int]],
    ) -> HostDraws:
        # Before the noise, which takes most of the time, is drawn in vain.
        self._check_labels(len(positions), labels, null_label)
        conditional = labels is not None and null_label is not None
        return self.host_draws(seed, step, positions, shape, mask_grids, conditional)

    def _check_labels(self, count: int, labels: Tensor | None, null_label: int | None) -> None:
        if labels is not None and tuple(labels.shape) != (count,):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, expected ({count},): one per position")
        if labels is not None and self.label_dropout > 0.0 and null_label is None:
            raise ValueError(
                f"label_dropout = {self.label_dropout}, but the model has no null label: set label_dropout to 0, or "
                "build the model with a null class; for an unconditional model pass labels=None"
            )

    def _amm_suspended(self, model: Any) -> AbstractContextManager[Any]:
        suspend = getattr(_unwrap(model), "suspend_attention_modulation", None)
        return nullcontext() if self.train_with_amm or suspend is None else suspend()


def _unwrap(model: Any) -> Any:
    # keep_torch_compile=True (accelerate's default) would replace the module *inside* a compiled wrapper by the
    # unwrapped one, and so remove gradient synchronisation from a compiled DistributedDataParallel.
    return extract_model_from_parallel(model, keep_torch_compile=False)
