"""Samplers by name. diffusers supplies them; what is ours is the authors' respaced DDIM and the right settings.

A model predicts one of three things, which its sampler must be told (`prediction_type`): "epsilon" (the noise) or
"v_prediction" on a process of linear betas, or "flow", the velocity of straight paths at continuous time. `SCHEDULERS`
is the table to extend.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..nn.noise_schedule import NoiseSchedule, respaced_timesteps
from ..util.errors import UserError
from ..util.lookup import lookup

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


class RespacedDDIMScheduler(SchedulerMixin, ConfigMixin):
    """DDIM (arXiv 2010.02502) on evenly respaced timesteps that include the first and the last one.

    The previous timestep is the next entry of the list. (diffusers' DDIM goes from t to t - T // N instead: 999 -> 899
    in ten steps, where this one goes 999 -> 888, as the EDT, DiT and MDT authors' sampler does.)

    Args:
        num_train_timesteps: length T of the training process.
        beta_start, beta_end: ends of its linear betas.
        eta: 0 is deterministic; 1 has the variance of ancestral sampling.
        clip_sample: clamp the predicted x_0 to [-1, 1], for models that work on pixels.
        prediction_type: "epsilon", or "v_prediction" (arXiv 2202.00512).

    Raises:
        ValueError: for another prediction_type.
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
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={prediction_type!r}: expected 'epsilon' or 'v_prediction'")
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
            model_output: predicted noise or v (B, C, H, W), without variance channels.
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
        if self.config["prediction_type"] == "v_prediction":
            original = now**0.5 * sample - (1 - now) ** 0.5 * model_output
            model_output = (1 - now) ** 0.5 * sample + now**0.5 * model_output
        else:
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


@dataclass(frozen=True)
class Process:
    """What a scheduler must know of a model and its training.

    Attributes:
        num_train_timesteps: length of the process; what the model is told at pure noise, on continuous time.
        beta_start, beta_end: ends of its linear betas; without meaning for "flow".
        learned_variance: whether the model predicts the variance, which only ancestral sampling uses.
        clip_sample: clamp each predicted x_0 to [-1, 1], where the scheduler offers it.
        prediction_type: one of `PREDICTION_TYPES`.
        shift: a of s' = a s / (1 + (a - 1) s) for the levels visited, "flow" only (arXiv 2403.03206, equation 23).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    learned_variance: bool = True
    clip_sample: bool = False
    prediction_type: str = "epsilon"
    shift: float = 1.0

    def betas(self) -> dict[str, Any]:
        """Arguments of schedulers of discrete processes."""
        names = ("num_train_timesteps", "beta_start", "beta_end", "prediction_type")
        return {name: getattr(self, name) for name in names}

    def straight_paths(self) -> dict[str, Any]:
        """Arguments of multistep solvers for "flow"."""
        return {
            "num_train_timesteps": self.num_train_timesteps,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": self.shift,
        }


def _ddpm(process: Process) -> DDPMScheduler:
    # These settings, and no others, are the authors' respaced ancestral sampler (which does not clip latents).
    return DDPMScheduler(
        **process.betas(),
        beta_schedule="linear",
        variance_type="learned_range" if process.learned_variance else "fixed_small",
        clip_sample=process.clip_sample,
        timestep_spacing="linspace",
    )


def _ddim(process: Process) -> RespacedDDIMScheduler:
    return RespacedDDIMScheduler(**process.betas(), clip_sample=process.clip_sample)


def _dpm_solver(
    process: Process, algorithm: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
) -> DPMSolverMultistepScheduler:
    # Steps even in log-SNR: with even timesteps the last one jumps from t = 50 or more to 0, and at 20 steps the spread
    # of exact Gaussian data comes out 14 % too small (1.5 % this way). Straight paths have no such end, and take even
    # steps. Dynamic thresholding with a largest value of 1 is clamping to [-1, 1].
    settings = {**process.betas(), "use_lu_lambdas": True}
    if process.prediction_type == "flow":
        settings = process.straight_paths()
    return DPMSolverMultistepScheduler(
        **settings,
        beta_schedule="linear",
        algorithm_type=algorithm,
        solver_order=2,
        thresholding=process.clip_sample,
        sample_max_value=1.0,
    )


def _unipc(process: Process) -> UniPCMultistepScheduler:
    # "Exponential" steps are even in log-SNR, like those above.
    settings: dict[str, Any] = {**process.betas(), "use_exponential_sigmas": True}
    if process.prediction_type == "flow":
        settings = process.straight_paths()
    return UniPCMultistepScheduler(
        **settings, beta_schedule="linear", solver_order=2, thresholding=process.clip_sample, sample_max_value=1.0
    )


def _euler(process: Process) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(process.num_train_timesteps, shift=process.shift)


def _heun(process: Process) -> FlowMatchHeunDiscreteScheduler:
    return FlowMatchHeunDiscreteScheduler(process.num_train_timesteps, shift=process.shift)


@dataclass(frozen=True)
class SchedulerChoice:
    """A sampler by name.

    Attributes:
        make: the factory.
        kind: the class that it makes.
        default_steps: steps used when none are asked for.
        predictions: what a model may predict to be sampled by it.
        config: entries that tell it from others of its class.
    """

    make: Callable[[Process], Any]
    kind: type
    default_steps: int
    predictions: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    def made(self, scheduler: Any) -> bool:
        """Whether a scheduler is of this kind."""
        return isinstance(scheduler, self.kind) and all(
            scheduler.config.get(name) == value for name, value in self.config.items()
        )


_STEPPED = ("epsilon", "v_prediction")
_SDE = "sde-dpmsolver++"
SCHEDULERS: dict[str, SchedulerChoice] = {
    "ddpm": SchedulerChoice(_ddpm, DDPMScheduler, 250, _STEPPED),
    "ddim": SchedulerChoice(_ddim, RespacedDDIMScheduler, 50, _STEPPED),
    "dpm++": SchedulerChoice(
        _dpm_solver, DPMSolverMultistepScheduler, 20, PREDICTION_TYPES, {"algorithm_type": "dpmsolver++"}
    ),
    "dpm++sde": SchedulerChoice(
        partial(_dpm_solver, algorithm=_SDE),
        DPMSolverMultistepScheduler,
        25,
        PREDICTION_TYPES,
        {"algorithm_type": _SDE},
    ),
    "unipc": SchedulerChoice(_unipc, UniPCMultistepScheduler, 20, PREDICTION_TYPES),
    "euler": SchedulerChoice(_euler, FlowMatchEulerDiscreteScheduler, 50, ("flow",)),
    "heun": SchedulerChoice(_heun, FlowMatchHeunDiscreteScheduler, 25, ("flow",)),
}


def scheduler_name(scheduler: Any) -> str:
    """The name in `SCHEDULERS` of a scheduler, or that of its class."""
    known = (name for name, choice in SCHEDULERS.items() if choice.made(scheduler))
    return next(known, type(scheduler).__name__)


def fitting_schedulers(prediction_type: str) -> list[str]:
    """Names of the schedulers for models that predict `prediction_type`."""
    return [name for name, choice in SCHEDULERS.items() if prediction_type in choice.predictions]


def default_scheduler(prediction_type: str) -> str:
    """Name of the scheduler to use when none is asked for: "euler" for "flow", else "ddim"."""
    return "euler" if prediction_type == "flow" else "ddim"


def make_scheduler(
    name: str,
    num_train_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    learned_variance: bool = True,
    clip_sample: bool = False,
    prediction_type: str = "epsilon",
    shift: float = 1.0,
) -> Any:
    """Build the scheduler called `name`.

    Args:
        name: one of `SCHEDULERS`.
        num_train_timesteps, beta_start, beta_end: the noising process; betas have no meaning for "flow".
        learned_variance: whether the model predicts the variance, which only ancestral sampling uses.
        clip_sample: clamp each predicted x_0 to [-1, 1]: right for pixels, wrong for latents, which have no bounds.
            "euler" and "heun" have no clamp (and need none: nothing in them is divided by the signal's scale).
        prediction_type: what the model predicts, "epsilon", "v_prediction" or "flow".
        shift: above 1 spends more steps on noisy levels; "flow" only.

    Raises:
        UserError: for an unknown name, listing the known ones, or one that does not fit the prediction type, listing
            those that do.
    """
    choice = lookup(SCHEDULERS, name, "scheduler")
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"prediction_type={prediction_type!r}: expected {' or '.join(map(repr, PREDICTION_TYPES))}")
    if prediction_type not in choice.predictions:
        raise UserError(
            f"scheduler {name!r} cannot sample a model that predicts {prediction_type!r}: choose "
            f"{' or '.join(fitting_schedulers(prediction_type))}"
        )
    return choice.make(
        Process(num_train_timesteps, beta_start, beta_end, learned_variance, clip_sample, prediction_type, shift)
    )


def prediction_type_of(scheduler: Any) -> str:
    """What a scheduler takes its model to predict, one of `PREDICTION_TYPES` (diffusers' own words for others)."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler):
        return "flow"
    told = scheduler.config.get("prediction_type", "epsilon")
    return "flow" if told == "flow_prediction" else told


def predicted_original(scheduler: Any, output: Tensor, sample: Tensor, timestep: Tensor | float) -> Tensor:
    """The estimate of x_0 behind a prediction (B, C, H, W) at x_t = `sample`, clamped where the scheduler clamps."""
    told = prediction_type_of(scheduler)
    if told == "flow":
        level = float(timestep) / scheduler.config["num_train_timesteps"]
        original = sample - level * output
    else:
        kept = float(scheduler.alphas_cumprod[int(timestep)])
        noise = (1 - kept) ** 0.5
        if told == "v_prediction":
            original = kept**0.5 * sample - noise * output
        else:
            original = (sample - noise * output) / kept**0.5
    clip = scheduler.config.get("clip_sample", False) or scheduler.config.get("thresholding", False)
    return original.clamp(-1, 1) if clip else original


def scheduler_like(name: str, other: Any, learned_variance: bool) -> Any:
    """The scheduler called `name` for the process and prediction of an existing one, with its clipping and shift.

    Raises:
        UserError: as `make_scheduler`.
    """
    config = other.config
    kept = {key: config[key] for key in ("num_train_timesteps", "beta_start", "beta_end") if key in config}
    return make_scheduler(
        name,
        **kept,
        learned_variance=learned_variance,
        clip_sample=bool(config.get("clip_sample", False) or config.get("thresholding", False)),
        prediction_type=prediction_type_of(other),
        shift=config.get("shift", config.get("flow_shift", 1.0)),
    )


def default_steps(scheduler: Any) -> int:
    """Steps used when a caller names none, by the scheduler's kind."""
    return next((choice.default_steps for choice in SCHEDULERS.values() if choice.made(scheduler)), 50)


def set_steps(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> None:
    """Choose `steps` levels, as `scheduler.set_timesteps` does, but on continuous time without its roundings."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Even steps from 1 to 0. Left to itself it ends at 1 / 1000 (shifted twice), and the last step does nothing.
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), device=device)
        return
    scheduler.set_timesteps(steps, device=device)
    if scheduler.config.get("use_flow_sigmas", False):
        # It rounds the time that the model is told down to an integer, as if there were steps.
        told = scheduler.sigmas[:-1] * scheduler.config["num_train_timesteps"]
        scheduler.timesteps = told.to(device)
    elif scheduler.config.get("use_exponential_sigmas", False):
        # Rounded down, not to the nearest, by a class that rounds other spacings rightly.
        levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().log().numpy()
        times = np.interp(scheduler.sigmas[:-1].log().numpy(), levels, np.arange(len(levels)))
        scheduler.timesteps = torch.from_numpy(times.round()).to(device, torch.int64)
