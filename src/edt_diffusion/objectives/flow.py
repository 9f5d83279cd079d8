"""Flow matching on straight paths: the network predicts the velocity from data to noise.

x_s = (1 - s) x_0 + s noise for s in (0, 1), velocity = dx_s / ds = noise - x_0 (Lipman et al. 2023, "Flow matching for
generative modeling", arXiv 2210.02747; Liu et al. 2023, "Flow straight and fast", arXiv 2209.03003). Time runs as in
`diffusers`' flow-matching schedulers: s = 1 is noise, and the network is told 1000 s.
"""

from typing import Any

import torch
from torch import Tensor

from ..models.masking import TokenMasks
from ..util.errors import UserError
from .loss_weights import LossWeighting
from .terms import LossTerms, check_output, mean_flat


class FlowMatchingObjective:
    """`loss = w(s) * mean((noise - x_0 - prediction)^2)`, at continuous time.

    Args:
        loss_weighting: one of `LOSS_WEIGHTINGS`, with SNR = ((1 - s) / s)^2. "none" is usual: how s is drawn then is
            the weighting.
        min_snr_gamma, p2_k, p2_gamma: settings of the weightings.
        learn_sigma: must be False; there is no reverse step whose variance could be learned.
        num_train_timesteps: what the network is told at s = 1.

    Raises:
        UserError: if learn_sigma is set.
        ValueError: if another argument is outside its range.
    """

    prediction_type = "flow"
    continuous = True

    def __init__(
        self,
        loss_weighting: str = "none",
        min_snr_gamma: float = 5.0,
        learn_sigma: bool = False,
        p2_k: float = 1.0,
        p2_gamma: float = 1.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        if learn_sigma:
            raise UserError("flow matching learns no variance, but the model predicts one: set model.learn_sigma=false")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps = {num_train_timesteps}: expected at least 1")
        self.loss_weighting = LossWeighting(loss_weighting, min_snr_gamma, p2_k, p2_gamma)
        self.num_train_timesteps = num_train_timesteps

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_s = (1 - s) x_0 + s noise, s = t / num_train_timesteps.

        Args:
            x0: clean latents (B, C, H, W).
            t: time of each sample, (B,) float32 in (0, num_train_timesteps).
            noise: standard normal, shape of x0.

        Returns:
            float32 tensor of x0's shape.
        """
        s = self._share(t).view(-1, *[1] * (x0.ndim - 1))
        return (1.0 - s) * x0.float() + s * noise.float()

    def terms(
        self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None, masks: TokenMasks | None = None
    ) -> LossTerms:
        """Mix latents and noise, run the network once and return its losses; see `LearnedVarianceObjective.terms`.

        Raises:
            ValueError: if the network's output has not the shape of x0.
        """
        output = model(
            hidden_states=self.add_noise(x0, t, noise),
            timestep=t.float(),
            class_labels=labels,
            token_masks=masks,
            return_dict=False,
        )[0]
        return self.terms_from_output(output, x0, t, noise)

    def terms_from_output(self, output: Tensor, x0: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """Return the losses of a network output, in float32 whatever the dtypes and whatever autocast says.

        Args:
            output: predicted velocity (B, C, H, W).
            x0: clean latents (B, C, H, W).
            t: time of each sample, (B,) in (0, num_train_timesteps).
            noise: the noise in x_s, shape of x0.

        Raises:
            ValueError: if the output has another shape.
        """
        check_output(output, x0, False, "velocity")
        # Nothing below is a matrix product, so autocast leaves it in the dtype it is given.
        mse_plain = mean_flat((noise.float() - x0.float() - output.float()) ** 2)
        s = self._share(t)
        # noise = x_s + (1 - s) velocity, so (1 - s) is the error of the noise over that of the velocity.
        mse = self.loss_weighting(((1.0 - s) / s) ** 2, (1.0 - s) ** 2) * mse_plain
        return LossTerms(mse, mse, mse_plain, torch.zeros_like(mse))

    def _share(self, t: Tensor) -> Tensor:
        return t.float() / self.num_train_timesteps
