"""Samplers by name. diffusers supplies them; what is ours is the authors' respaced DDIM and the right settings.

Every factory makes a scheduler for a linear-beta, epsilon-predicting process. `SCHEDULERS` is the table to extend.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..nn.noise_schedule import NoiseSchedule, respaced_timesteps
from ..util.lookup import lookup


class RespacedDDIMScheduler(SchedulerMixin, ConfigMixin):
    """DDIM (arXiv 2010.02502) on evenly respaced timesteps that include the first and the last one.

    The previous timestep is the next entry of the list. (diffusers' DDIM goes from t to t - T // N instead: 999 -> 899
    in ten steps, where this one goes 999 -> 888, as the EDT, DiT and MDT authors' sampler does.)

    Args:
        num_train_timesteps: length T of the training process.
        beta_start, beta_end: ends of its linear betas.
        eta: 0 is deterministic; 1 has the variance of ancestral sampling.
        clip_sample: clamp the predicted x_0 to [-1, 1], for models that work on pixels.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        eta: float = 0.0,
        clip_sample: bool = False,
    ) -> None:
        schedule = NoiseSchedule.linear(num_train_timesteps, beta_start, beta_end)
        self.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)  # float64
        self.timesteps = torch.arange(num_train_timesteps).flip(0)
        self.num_inference_steps: int | None = None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps round(i (T - 1) / (N - 1)), from high to low."""
        steps = respaced_timesteps(self.config["num_train_timesteps"], str(num_inference_steps))
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(steps[::-1], device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The input as it is; part of diffusers' scheduler interface."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step from `timestep` to the next one of the list.

        Args:
            model_output: predicted noise (B, C, H, W), without variance channels.
            timestep: a member of `timesteps`.
            sample: x_t.
            generator: one, or one per image; used if eta > 0.

        Returns:
            An output with `prev_sample`, or the tuple (prev_sample, predicted x_0).
        """
        position = int((self.timesteps == timestep).nonzero()[0])
        last = position + 1 == len(self.timesteps)
        now = float(self.alphas_cumprod[int(self.timesteps[position])])
        after = 1.0 if last else float(self.alphas_cumprod[int(self.timesteps[position + 1])])
        original = (sample - (1 - now) ** 0.5 * model_output) / now**0.5
        if self.config["clip_sample"]:
            original = original.clamp(-1, 1)
            model_output = (sample - now**0.5 * original) / (1 - now) ** 0.5
        sigma = self.config["eta"] * (((1 - after) / (1 - now)) * (1 - now / after)) ** 0.5
        previous = after**0.5 * original + max(1 - after - sigma**2, 0.0) ** 0.5 * model_output
        if sigma > 0 and not last:
            previous = previous + sigma * randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous, original)


def _ddpm(process: dict[str, Any], learned_variance: bool, clip: bool) -> DDPMScheduler:
    # These settings, and no others, are the authors' respaced ancestral sampler (which does not clip latents).
    variance = "learned_range" if learned_variance else "fixed_small"
    return DDPMScheduler(
        **process, beta_schedule="linear", variance_type=variance, clip_sample=clip, timestep_spacing="linspace"
    )


def _ddim(process: dict[str, Any], learned_variance: bool, clip: bool) -> RespacedDDIMScheduler:
    return RespacedDDIMScheduler(**process, clip_sample=clip)


def _dpm_solver(process: dict[str, Any], learned_variance: bool, clip: bool) -> DPMSolverMultistepScheduler:
    # Steps even in log-SNR: with even timesteps the last one jumps from t = 50 or more to 0, and at 20 steps the spread
    # of exact Gaussian data comes out 14 % too small (1.5 % this way). Dynamic thresholding with a largest value of 1
    # is clamping to [-1, 1].
    return DPMSolverMultistepScheduler(
        **process,
        beta_schedule="linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_lu_lambdas=True,
        thresholding=clip,
        sample_max_value=1.0,
    )


@dataclass(frozen=True)
class SchedulerChoice:
    """A factory `(process, learned_variance, clip) -> scheduler`, and the steps used when none are asked for."""

    make: Callable[[dict[str, Any], bool, bool], Any]
    default_steps: int


SCHEDULERS: dict[str, SchedulerChoice] = {
    "ddpm": SchedulerChoice(_ddpm, 250),
    "ddim": SchedulerChoice(_ddim, 50),
    "dpm++": SchedulerChoice(_dpm_solver, 20),
}


def make_scheduler(
    name: str,
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    learned_variance: bool = True,
    clip_sample: bool = False,
) -> Any:
    """Build the scheduler called `name`.

    Args:
        name: one of `SCHEDULERS`.
        num_train_timesteps, beta_start, beta_end: the noising process.
        learned_variance: whether the model predicts the variance, which only ancestral sampling uses.
        clip_sample: clamp each predicted x_0 to [-1, 1]: right for pixels, wrong for latents, which have no bounds.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    process = {"num_train_timesteps": num_train_timesteps, "beta_start": beta_start, "beta_end": beta_end}
    return lookup(SCHEDULERS, name, "scheduler").make(process, learned_variance, clip_sample)


def scheduler_like(name: str, other: Any, learned_variance: bool) -> Any:
    """The scheduler called `name` for the noising process of an existing scheduler, clipping if that one does."""
    process = {key: other.config[key] for key in ("num_train_timesteps", "beta_start", "beta_end")}
    clip = bool(other.config.get("clip_sample", False) or other.config.get("thresholding", False))
    return make_scheduler(name, **process, learned_variance=learned_variance, clip_sample=clip)


def default_steps(scheduler: Any) -> int:
    """Steps used when a caller names none, by the scheduler's kind."""
    kinds = {DDPMScheduler: "ddpm", RespacedDDIMScheduler: "ddim", DPMSolverMultistepScheduler: "dpm++"}
    for kind, name in kinds.items():
        if isinstance(scheduler, kind):
            return SCHEDULERS[name].default_steps
    return 50
