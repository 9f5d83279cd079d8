"""The hybrid loss of EDT, DiT and MDTv2: a regression, plus a variational bound that trains the variance only.

A network returns an estimate of the noise, or of v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022, arXiv
2202.00512), and, per channel, a number that places the log-variance between the two bounds of the reverse step (Nichol
and Dhariwal 2021, arXiv 2102.09672, equations 15 and 16). The regression is weighted by a function of the noise level,
min(SNR, 5) / SNR of the noise's error in the EDT authors' code; see `loss_weights`.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..models.masking import TokenMasks
from ..nn.noise_schedule import NoiseSchedule
from .loss_weights import LossWeighting
from .terms import LossTerms, check_output, mean_flat
from .variational import discretised_gaussian_nll, gaussian_kl

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


# What the network predicts besides the variance, in a word for messages.
_PREDICTED = {"epsilon": "noise", "v_prediction": "v"}


class LearnedVarianceObjective:
    """`loss = w(t) * mean((target - prediction)^2) + vb_weight * VB`, with gradient of VB through the variance only.

    VB is, in bits per dimension and without the factor T/1000 of arXiv 2102.09672, the KL divergence between
    q(x_{t-1} | x_t, x_0) and the network's reverse step; at t = 0 it is the negative log-likelihood of x_0 under a
    discretised Gaussian. Nothing is clipped to [-1, 1].

    Args:
        schedule: the noising process; the 1000-step linear one if not given. A respaced one is allowed: `t` then
            counts its steps, and the network is told the original index.
        loss_weighting: one of `LOSS_WEIGHTINGS`; "none" for w = 1 (the DiT authors).
        min_snr_gamma: gamma of "min_snr", positive.
        learn_sigma: whether the network returns the variance besides the target, hence 2C channels for latents of C.
        vb_weight: factor of VB, not negative.
        p2_k, p2_gamma: settings of "p2".
        prediction_type: what the network predicts, in the words of `diffusers` schedulers: "epsilon" (the noise) or
            "v_prediction".

    Raises:
        ValueError: if an argument is outside its range.
    """

    continuous = False

    def __init__(
        self,
        schedule: NoiseSchedule | None = None,
        loss_weighting: str = "min_snr",
        min_snr_gamma: float = 5.0,
        learn_sigma: bool = True,
        vb_weight: float = 1.0,
        p2_k: float = 1.0,
        p2_gamma: float = 1.0,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    ) -> None:
        if prediction_type not in _PREDICTED:
            raise ValueError(f"prediction_type = {prediction_type!r}: expected 'epsilon' or 'v_prediction'")
        if not (math.isfinite(vb_weight) and vb_weight >= 0):
            raise ValueError(f"vb_weight = {vb_weight}: expected a number that is not negative")
        self.schedule = NoiseSchedule.linear() if schedule is None else schedule
        self.loss_weighting = LossWeighting(loss_weighting, min_snr_gamma, p2_k, p2_gamma)
        self.learn_sigma = learn_sigma
        self.vb_weight = vb_weight
        self.prediction_type = prediction_type
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
            output: (B, 2C, H, W), estimate of the target first, then of the variance (any real; -1 and 1 are its
                bounds); (B, C, H, W) without learn_sigma.
            x0: clean latents (B, C, H, W).
            x_t: noised latents (B, C, H, W).
            t: step of each sample, (B,) int64.
            noise: the noise in x_t, shape of x0.

        Raises:
            ValueError: if the output has another shape.
        """
        check_output(output, x0, self.learn_sigma, _PREDICTED[self.prediction_type])
        channels = x0.shape[1]
        # Nothing below is a matrix product, so autocast leaves it in the dtype it is given.
        output, x0, x_t, noise = output.float(), x0.float(), x_t.float(), noise.float()
        predicted = output[:, :channels]
        mse_plain = mean_flat((self._target(x0, t, noise) - predicted) ** 2)
        mse = self._at("mse_weight", t, ndim=1) * mse_plain
        if not self.learn_sigma:
            return LossTerms(mse, mse, mse_plain, torch.zeros_like(mse))
        vb = self._variational_bound(predicted.detach(), output[:, channels:], x0, x_t, t)
        return LossTerms(mse + self.vb_weight * vb, mse, mse_plain, vb)

    def _target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should return: the noise, or v (arXiv 2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        return self._at("sqrt_alphas_cumprod", t) * noise - self._at("sqrt_one_minus_alphas_cumprod", t) * x0

    def _implied_x0(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction amounts to."""
        if self.prediction_type == "epsilon":
            signal, noise = self._at("sqrt_recip_alphas_cumprod", t), self._at("sqrt_recipm1_alphas_cumprod", t)
        else:
            signal, noise = self._at("sqrt_alphas_cumprod", t), self._at("sqrt_one_minus_alphas_cumprod", t)
        return signal * x_t - noise * predicted

    def _variational_bound(self, predicted: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Bits per dimension of one reverse step, (B,); `predicted` carries no gradient, `v` places the variance."""
        log_max = self._at("log_betas", t)
        log_min = self._at("posterior_log_variance_clipped", t)
        share = (v + 1.0) / 2.0
        log_variance = share * log_max + (1.0 - share) * log_min

        coef1, coef2 = self._at("posterior_mean_coef1", t), self._at("posterior_mean_coef2", t)
        mean = coef1 * self._implied_x0(predicted, x_t, t) + coef2 * x_t
        true_mean = coef1 * x0 + coef2 * x_t

        # Both branches are computed for every sample. The KL overflows long before the likelihood does; where it is not
        # used it gets a constant, or the overflow would reach v as 0 * inf = NaN in the backward pass.
        first = (t == 0).view(-1, 1, 1, 1)
        kl = gaussian_kl(true_mean, log_min, mean, torch.where(first, log_min, log_variance))
        nll = discretised_gaussian_nll(x0, mean, 0.5 * log_variance)
        return mean_flat(torch.where(first, nll, kl)) / math.log(2.0)

    def _at(self, name: str, t: Tensor, ndim: int = 4) -> Tensor:
        """Entries of a float32 table at t, shaped (B, 1, ...) with `ndim` axes."""
        return self._device_tables(t.device)[name][t].view(-1, *[1] * (ndim - 1))

    def _device_tables(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._tables:
            arrays = {name: np.float32(getattr(self.schedule, name)) for name in _TABLES}
            snr = torch.tensor(self.schedule.snr)
            # x_t fixes the one where the other is given: an error of v is one of the noise, divided by sqrt(a).
            from_noise = torch.tensor(self.schedule.alphas_cumprod) if self.prediction_type == "v_prediction" else 1.0
            arrays["mse_weight"] = np.float32(self.loss_weighting(snr, from_noise).numpy())
            tables = {name: torch.tensor(array, device=device) for name, array in arrays.items()}
            tables["timestep_map"] = torch.tensor(self.schedule.timestep_map, device=device)
            self._tables[device] = tables
        return self._tables[device]
