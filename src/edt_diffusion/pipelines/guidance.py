"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) on raw model outputs."""

from torch import Tensor


def combine(cond: Tensor, uncond: Tensor, scale: float, guided_channels: int | None = None) -> Tensor:
    """Move the conditional prediction away from the unconditional one.

    Args:
        cond, uncond: model outputs, (B, C, H, W) or with 2 C channels where the variance is predicted too.
        scale: 1 returns `cond`, larger values move further.
        guided_channels: number of leading channels that are guided; the others (variance channels, and in the
            authors' form every channel after the third) keep the conditional prediction. None guides all given
            channels.

    Returns:
        uncond + scale * (cond - uncond) on the guided channels, `cond` elsewhere.
    """
    if guided_channels is None or guided_channels >= cond.shape[1]:
        return uncond + scale * (cond - uncond)
    guided = cond.clone()
    head = slice(0, guided_channels)
    guided[:, head] = uncond[:, head] + scale * (cond[:, head] - uncond[:, head])
    return guided
