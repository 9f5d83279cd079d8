"""The hybrid loss of EDT, DiT and MDTv2: noise prediction, plus a variational bound that trains the variance only.

A network returns the noise estimate and, per channel, a number v that places the log-variance between the two bounds of
the reverse step (Nichol and Dhariwal 2021, arXiv 2102.09672, equations 15 and 16). The noise term is weighted by
min(SNR, gamma) / SNR (Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting", arXiv 2303.09556), with
gamma 5 in the EDT authors' code.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..models.masking import TokenMasks
from ..nn.noise_schedule import NoiseSchedule

_TABLES = (
    "log_betas",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@dataclass(frozen=True)
class LossTerms:
    """Losses per sample; every tensor is float32 of shape (B,).

    Attributes:
        loss: what is minimised.
        mse: the regression part of it, weighted as the objective's weighting says.
        mse_plain: the same without that weighting, averaged over channels and pixels.
        vb: variational bound in bits per dimension; zeros where no variance is learned.
    """

    loss: Tensor
    mse: Tensor
    mse_plain: Tensor
    vb: Tensor


class LearnedVarianceObjective:
    """`loss = w(t) * mean((noise - prediction)^2) + vb_weight * VB`, with gradient of VB through the variance only.

    VB is, in bits per dimension and without the factor T/1000 of arXiv 2102.09672, the KL divergence between
    q(x_{t-1} | x_t, x_0) and the network's reverse step; at t = 0 it is the negative log-likelihood of x_0 under a
    discretised Gaussian. Nothing is clipped to [-1, 1].

    Args:
        schedule: the noising process; the 1000-step linear one if not given. A respaced one is allowed: `t` then
            counts its steps, and the network is told the original index.
        loss_weighting: "min_snr" for w = min(SNR, gamma) / SNR, "none" for w = 1 (the DiT authors).
        min_snr_gamma: gamma, positive.
        learn_sigma: whether the network returns v besides the noise, hence 2C channels for latents of C.
        vb_weight: factor of VB, not negative.

    Attributes:
        prediction_type: "epsilon", in the words of `diffusers` schedulers.

    Raises:
        ValueError: if an argument is outside its range.
    """

    prediction_type = "epsilon"

    def __init__(
        self,
        schedule: NoiseSchedule | None = None,
        loss_weighting: Literal["min_snr", "none"] = "min_snr",
        min_snr_gamma: float = 5.0,
        learn_sigma: bool = True,
        vb_weight: float = 1.0,
    ) -> None:
        if loss_weighting not in ("min_snr", "none"):
            raise ValueError(f"loss_weighting = {loss_weighting!r}: expected 'min_snr' or 'none'")
        if not (math.isfinite(min_snr_gamma) and min_snr_gamma > 0):
            raise ValueError(f"min_snr_gamma = {min_snr_gamma}: expected a positive number (5 in the paper)")
        if not (math.isfinite(vb_weight) and vb_weight >= 0):
            raise ValueError(f"vb_weight = {vb_weight}: expected a number that is not negative")
        self.schedule = NoiseSchedule.linear() if schedule is None else schedule
        self.loss_weighting = loss_weighting
        self.min_snr_gamma = min_snr_gamma
        self.learn_sigma = learn_sigma
        self.vb_weight = vb_weight
        self._tables: dict[torch.device, dict[str, Tensor]] = {}

    @property
    def num_train_timesteps(self) -> int:
        """Number of steps of the process; `t` runs over `{0..num_train_timesteps-1}`."""
        return self.schedule.num_steps

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = sqrt(a) x_0 + sqrt(1 - a) noise, a = alphas_cumprod[t] (arXiv 2006.11239, equation 4).

        Args:
            x0: clean latents (B, C, H, W).
            t: step of each sample, (B,) int64.
            noise: standard normal, shape of x0.

        Returns:
            float32 tensor of x0's shape.
        """
        signal = self._at("sqrt_alphas_cumprod", t)
        return signal * x0.float() + self._at("sqrt_one_minus_alphas_cumprod", t) * noise.float()

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Return the index in the original process of each step, (B,) int64: what the network is told."""
        return self._device_tables(t.device)["timestep_map"][t]

    def terms(
        self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None, masks: TokenMasks | None = None
    ) -> LossTerms:
        """Noise the latents, run the network once and return its losses.

        Args:
            model: called as `model(hidden_states=, timestep=, class_labels=, token_masks=, return_dict=False)[0]`;
                returns (B, 2C, H, W), or (B, C, H, W) without learn_sigma, of any floating dtype.
            x0: clean latents (B, C, H, W).
            t: step of each sample, (B,) int64.
            noise: standard normal, shape of x0.
            labels: (B,) int64 with label dropping already done, or None.
            masks: token masks to pass on, or None.

        Raises:
            ValueError: if the network's output does not fit, see `terms_from_output`.
        """
        x_t = self.add_noise(x0, t, noise)
        output = model(
            hidden_states=x_t,
            timestep=self.model_timesteps(t),
            class_labels=labels,
            token_masks=masks,
            return_dict=False,
        )[0]
        return self.terms_from_output(output, x0, x_t, t, noise)

    def terms_from_output(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """Return the losses of a network output, computed in float32 whatever the dtypes and whatever autocast says.

        Args:
            output: (B, 2C, H, W), noise estimate first, then v (any real; -1 and 1 are the bounds of the variance);
                (B, C, H, W) without learn_sigma.
            x0: clean latents (B, C, H, W).
            x_t: noised latents (B, C, H, W).
            t: step of each sample, (B,) int64.
            noise: the noise in x_t, shape of x0.

        Raises:
            ValueError: if the output has another shape.
        """
        batch, channels, *size = x0.shape
        expected = (batch, channels * (2 if self.learn_sigma else 1), *size)
        if tuple(output.shape) != expected:
            raise ValueError(
                f"the model returned shape {tuple(output.shape)} for latents of shape {tuple(x0.shape)}, expected "
                f"{expected}: with learn_sigma={self.learn_sigma} the model's out_channels must be "
                f"{expected[1]} ({'noise and variance' if self.learn_sigma else 'noise only'}); "
                "change out_channels of the model or learn_sigma of the objective"
            )
        # Nothing below is a matrix product, so autocast leaves it in the dtype it is given.
        output, x0, x_t, noise = output.float(), x0.float(), x_t.float(), noise.float()
        predicted = output[:, :channels]
        mse_plain = _mean_flat((noise - predicted) ** 2)
        mse = self._at("mse_weight", t, ndim=1) * mse_plain
        if not self.learn_sigma:
            return LossTerms(mse, mse, mse_plain, torch.zeros_like(mse))
        vb = self._variational_bound(predicted.detach(), output[:, channels:], x0, x_t, t)
        return LossTerms(mse + self.vb_weight * vb, mse, mse_plain, vb)

    def _variational_bound(self, predicted: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Bits per dimension of one reverse step, (B,); `predicted` carries no gradient."""
        log_max = self._at("log_betas", t)
        log_min = self._at("posterior_log_variance_clipped", t)
        share = (v + 1.0) / 2.0
        log_variance = share * log_max + (1.0 - share) * log_min

        coef1, coef2 = self._at("posterior_mean_coef1", t), self._at("posterior_mean_coef2", t)
        predicted_x0 = (
            self._at("sqrt_recip_alphas_cumprod", t) * x_t - self._at("sqrt_recipm1_alphas_cumprod", t) * predicted
        )
        mean = coef1 * predicted_x0 + coef2 * x_t
        true_mean = coef1 * x0 + coef2 * x_t

        # Both branches are computed for every sample. The KL overflows long before the likelihood does; where it is not
        # used it gets a constant, or the overflow would reach v as 0 * inf = NaN in the backward pass.
        first = (t == 0).view(-1, 1, 1, 1)
        kl = _gaussian_kl(true_mean, log_min, mean, torch.where(first, log_min, log_variance))
        nll = _discretised_gaussian_nll(x0, mean, 0.5 * log_variance)
        return _mean_flat(torch.where(first, nll, kl)) / math.log(2.0)

    def _at(self, name: str, t: Tensor, ndim: int = 4) -> Tensor:
        """Entries of a float32 table at t, shaped (B, 1, ...) with `ndim` axes."""
        return self._device_tables(t.device)[name][t].view(-1, *[1] * (ndim - 1))

    def _device_tables(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._tables:
            arrays = {name: np.float32(getattr(self.schedule, name)) for name in _TABLES}
            # min(SNR, gamma) / SNR, in the form that is also right where the SNR underflows to 0.
            weight = np.minimum(1.0, self.min_snr_gamma / self.schedule.snr)
            arrays["mse_weight"] = np.float32(weight if self.loss_weighting == "min_snr" else np.ones_like(weight))
            tables = {name: torch.tensor(array, device=device) for name, array in arrays.items()}
            tables["timestep_map"] = torch.tensor(self.schedule.timestep_map, device=device)
            self._tables[device] = tables
        return self._tables[device]


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise."""
    gap = log_variance1 - log_variance2
    return 0.5 * (torch.exp(gap) - gap - 1.0 + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def _normal_cdf(x: Tensor) -> Tensor:
    """Tanh approximation of the standard normal's distribution function, as in the reference implementation."""
    # In float32 the tanh is exactly 1 from x = 6 on. Values and gradients beyond stay the same under the clamp, except
    # that the cube's derivative cannot overflow and turn the tanh's zero gradient into NaN.
    x = x.clamp(-30.0, 30.0)
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _discretised_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-ln of the Gaussian mass in a bin of half-width 1/255 around x, elementwise, in nats (arXiv 2006.11239, eq. 13).

    The outermost bins (|x| > 0.999) reach to infinity. Made for 8-bit images in [-1, 1]; latents are treated alike.
    """
    inverse_scale = torch.exp(-log_scale)
    below_upper = _normal_cdf(inverse_scale * (x - mean + 1.0 / 255.0))
    below_lower = _normal_cdf(inverse_scale * (x - mean - 1.0 / 255.0))
    upper_or_all = torch.where(x > 0.999, torch.ones_like(x), below_upper)
    lower_or_none = torch.where(x < -0.999, torch.zeros_like(x), below_lower)
    return -torch.log((upper_or_all - lower_or_none).clamp(min=1e-12))


def _mean_flat(x: Tensor) -> Tensor:
    """Mean over every axis but the first."""
    return x.flatten(1).mean(dim=1)
