"""What extractors that are networks have in common."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...util.errors import UserError
from .base import Extractor, Features


class NetworkExtractor(Extractor):
    """An extractor around a frozen network in evaluation mode.

    It computes in float32 whatever the process around it has set: no autocast, and no TF32, which would move a Frechet
    distance in the fourth digit between kinds of GPUs.
    """

    network: nn.Module
    _device = torch.device("cpu")

    def __call__(self, images: Tensor) -> Features:
        check_images(images)
        with full_precision(self._device):
            found = self._extract(images)
        logits, spatial = (None if part is None else _result(part) for part in (found.logits, found.spatial))
        return Features(_result(found.pooled), logits, spatial)

    @abstractmethod
    def _extract(self, images: Tensor) -> Features:
        """Features of checked pictures on any device; without gradients and in full precision already."""

    def to(self, device: torch.device | str) -> "NetworkExtractor":
        """Move the network to a device, and return the extractor."""
        self._device = torch.device(device)
        self.network.to(self._device)
        return self


def check_images(images: Tensor) -> None:
    """Raise a `UserError` unless `images` is uint8 (N, 3, H, W) with N, H and W at least 1."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise UserError(
            f"pictures of shape {tuple(images.shape)} and type {images.dtype}: expected uint8 (N, 3, H, W), "
            "gray ones with their channel three times"
        )


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper on a device, and without gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                deterministic = torch.backends.cudnn.deterministic
                stack.enter_context(
                    torch.backends.cudnn.flags(enabled=True, deterministic=deterministic, allow_tf32=False)
                )
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _result(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32).contiguous()
