"""The discrete noising process of DDPM, as float64 tables, and how to walk it in fewer steps.

Ho et al. 2020, "Denoising diffusion probabilistic models" (arXiv 2006.11239): equation 4 for `q(x_t | x_0)`, equations
6 and 7 for the posterior `q(x_{t-1} | x_t, x_0)`. Respacing: Nichol and Dhariwal 2021, "Improved denoising diffusion
probabilistic models" (arXiv 2102.09672), section 4.

Training losses and samplers read the same tables; this module therefore knows neither.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


class NoiseSchedule:
    """Tables of the process `q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)`, `t in {0..num_steps-1}`.

    Every table is a read-only float64 array of shape (num_steps,), indexed by `t`. Index 0 is the first (smallest)
    noise level, not clean data; "the step before index 0" is clean data, with alphas_cumprod 1.

    Args:
        betas: variances of the steps, shape (num_steps,), each strictly between 0 and 1.
        timestep_map: index in the original process of each step, shape (num_steps,); what a network trained on the
            original process must be told. `0..num_steps-1` if not given.

    Attributes:
        betas: beta_t.
        log_betas: ln beta_t, the upper end of a learned log-variance.
        alphas_cumprod: the cumulative product of 1 - beta up to and including t.
        alphas_cumprod_prev: the same up to t - 1; 1 at t = 0.
        sqrt_alphas_cumprod: signal scale of x_t.
        sqrt_one_minus_alphas_cumprod: noise scale of x_t.
        sqrt_recip_alphas_cumprod: factor of x_t when x_0 is solved for, sqrt(1 / alphas_cumprod).
        sqrt_recipm1_alphas_cumprod: factor of the noise there, sqrt(1 / alphas_cumprod - 1).
        snr: signal-to-noise ratio, alphas_cumprod / (1 - alphas_cumprod).
        posterior_variance: variance of q(x_{t-1} | x_t, x_0); 0 at t = 0.
        posterior_log_variance_clipped: its logarithm, with entry 0 (minus infinity) replaced by entry 1; a process of
            one step has no entry 1 and takes ln beta_0.
        posterior_mean_coef1: factor of x_0 in the posterior's mean.
        posterior_mean_coef2: factor of x_t in the posterior's mean.
        timestep_map: int64 array, see above.

    Raises:
        ValueError: if betas is not a non-empty vector of values in (0, 1), or timestep_map is not one index per step.
    """

    def __init__(self, betas: ArrayLike, timestep_map: ArrayLike | None = None) -> None:
        beta: Float64 = np.array(betas, dtype=np.float64)
        if beta.ndim != 1 or beta.size == 0:
            raise ValueError(f"betas has shape {beta.shape}: expected a vector with one variance per step")
        if not np.all((beta > 0.0) & (beta < 1.0)):
            raise ValueError(
                f"betas range from {beta.min()} to {beta.max()}: expected every value strictly between 0 and 1 "
                "(at 1 nothing of x_0 is left, and the noise prediction cannot be turned back into x_0)"
            )
        origin: Int64 = np.array(range(beta.size) if timestep_map is None else timestep_map, dtype=np.int64)
        if origin.shape != beta.shape:
            raise ValueError(f"timestep_map has shape {origin.shape}, expected {beta.shape}: one index per step")

        cumulative: Float64 = np.cumprod(1.0 - beta, dtype=np.float64)
        previous: Float64 = np.concatenate([[1.0], cumulative[:-1]])
        posterior = beta * (1.0 - previous) / (1.0 - cumulative)

        self.timestep_map: Int64 = _frozen(origin)
        self.betas: Float64 = _frozen(beta)
        self.log_betas: Float64 = _frozen(np.log(beta))
        self.alphas_cumprod: Float64 = _frozen(cumulative)
        self.alphas_cumprod_prev: Float64 = _frozen(previous)
        self.sqrt_alphas_cumprod: Float64 = _frozen(np.sqrt(cumulative))
        self.sqrt_one_minus_alphas_cumprod: Float64 = _frozen(np.sqrt(1.0 - cumulative))
        self.sqrt_recip_alphas_cumprod: Float64 = _frozen(np.sqrt(1.0 / cumulative))
        self.sqrt_recipm1_alphas_cumprod: Float64 = _frozen(np.sqrt(1.0 / cumulative - 1.0))
        self.snr: Float64 = _frozen(cumulative / (1.0 - cumulative))
        self.posterior_variance: Float64 = _frozen(posterior)
        # The posterior of step 0 is a point: its log-variance is -inf, and a network interpolating towards it would
        # produce NaN. The authors of arXiv 2102.09672 put the next step's value there.
        first = posterior[1] if beta.size > 1 else beta[0]
        self.posterior_log_variance_clipped: Float64 = _frozen(np.log(np.concatenate([[first], posterior[1:]])))
        self.posterior_mean_coef1: Float64 = _frozen(beta * np.sqrt(previous) / (1.0 - cumulative))
        self.posterior_mean_coef2: Float64 = _frozen((1.0 - previous) * np.sqrt(1.0 - beta) / (1.0 - cumulative))

    @classmethod
    def linear(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "NoiseSchedule":
        """Return the schedule whose betas rise linearly, both ends included (arXiv 2006.11239, section 4).

        Args:
            num_steps: number of steps, at least 1.
            beta_start: variance of the first step, in (0, 1).
            beta_end: variance of the last step, in (0, 1).

        Raises:
            ValueError: if an argument is outside its range.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps = {num_steps}: expected at least 1")
        return cls(np.linspace(beta_start, beta_end, num_steps, dtype=np.float64))

    @property
    def num_steps(self) -> int:
        """Number of steps of this process."""
        return self.betas.size

    def respace(self, spacing: str | int) -> "NoiseSchedule":
        """Return the process that visits only some of the steps, with the same noise levels there.

        The new betas are `1 - alphas_cumprod[t_i] / alphas_cumprod[t_{i-1}]`; the new `timestep_map` holds the indices
        in the *original* process, also when an already respaced schedule is respaced.

        Args:
            spacing: see `respaced_timesteps`.

        Raises:
            ValueError: if the spacing does not fit this process.
        """
        kept = np.array(respaced_timesteps(self.num_steps, spacing), dtype=np.int64)
        levels = self.alphas_cumprod[kept]
        before = np.concatenate([[1.0], levels[:-1]])
        return NoiseSchedule(1.0 - levels / before, self.timestep_map[kept])


def respaced_timesteps(num_steps: int, spacing: str | int) -> list[int]:
    """Return the increasing indices that a respaced process visits (arXiv 2102.09672, section 4).

    - `250` or `"250"`: 250 indices spread evenly over all steps, the first and the last included.
    - `"10,15,20"`: the process is cut into as many equal sections as there are numbers (earlier sections are one longer
      where it does not divide), and each is spread separately.
    - `"ddim50"`: the smallest constant integer stride from index 0 that gives exactly 50 indices (arXiv 2010.02502).

    Positions are accumulated in floating point and rounded half to even, because checkpoints of this family were
    sampled that way; an exact formula would differ by one at some indices.

    Args:
        num_steps: number of steps of the process that is respaced.
        spacing: a count, or one of the forms above.

    Raises:
        ValueError: if the spacing cannot be read, asks for more indices than there are, or has no integer stride.
    """
    text = str(spacing).strip()
    if text.startswith("ddim"):
        return _constant_stride(num_steps, spacing, _counts(text.removeprefix("ddim"), spacing))
    counts = _counts(text, spacing)
    length, longer = divmod(num_steps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = length + (section < longer)
        if count > size:
            raise ValueError(
                f"spacing {spacing!r} asks for {count} of the {size} steps of section {section}: "
                f"expected at most {size} there ({num_steps} steps in {len(counts)} section(s))"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 0.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def _counts(text: str, spacing: str | int) -> list[int]:
    """Read comma-separated positive integers; `spacing` is what the user wrote, for the message."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"spacing {spacing!r} is not understood: expected a positive count such as '250', counts per section such "
            "as '10,15,20', or a constant stride such as 'ddim50'"
        )
    return [int(part) for part in parts]


def _constant_stride(num_steps: int, spacing: str | int, counts: Sequence[int]) -> list[int]:
    if len(counts) != 1:
        raise ValueError(f"spacing {spacing!r}: 'ddim' takes a single count, such as 'ddim50'")
    for stride in range(1, num_steps + 1):
        if len(range(0, num_steps, stride)) == counts[0]:
            return list(range(0, num_steps, stride))
    raise ValueError(
        f"spacing {spacing!r}: no integer stride gives {counts[0]} of {num_steps} steps; "
        f"use '{counts[0]}' for an even spread, or a count that divides {num_steps}"
    )


def _frozen(table: NDArray[Any]) -> NDArray[Any]:
    """Make a table read-only: schedules are shared between training and sampling."""
    table.flags.writeable = False
    return table
