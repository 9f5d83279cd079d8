"""Networks of one's own, as TorchScript files."""

import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from ...util.errors import UserError
from ...util.files import sha256_file
from .base import Features
from .network import NetworkExtractor, full_precision

_EXPECTED = "expected a TorchScript archive (torch.jit.save)"
_SIZES = (32, 64, 128, 224, 256, 299, 336, 512)
_PARTS = ("features", "logits", "spatial")
_SAYS_NOTHING = ("extractor", "features", "model", "network")


class TorchScriptExtractor(NetworkExtractor):
    """A TorchScript file that maps uint8 (N, 3, H, W) to features.

    It returns float features (N, D); or (features, logits (N, K)); or a mapping with "features" and perhaps "logits"
    and "spatial" (N, S). The pixels are its own business: scaling, normalising and resizing belong into the file. What
    it returns is checked at every call.

    TorchScript archives hold code that runs in an interpreter of tensors only, and no Python; pickles of Python objects
    are refused.

    Args:
        source: the file. It is called by its name without the ending, or, if that says as little as "features", by its
            folder's.

    Raises:
        UserError: no such file, not a TorchScript archive, it takes square pictures of no common size (it is tried with
            32 to 512 pixels), returns something else, or mixes the pictures of a batch.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self._path = Path(source).expanduser()
        self.network = _load(self._path)
        folder = self._path.resolve().parent.name
        self.name = folder if self._path.stem.lower() in _SAYS_NOTHING and folder else self._path.stem
        self.sha256 = sha256_file(self._path)
        self.preprocessing = "in the file"
        self.dimensions = 0  # until the first result
        self._probe()

    def _probe(self) -> None:
        """Find D, and whether a picture's features depend on that picture only, by the first size that is taken."""
        reason = ""
        for size in _SIZES:
            picture = (torch.arange(3 * size * size) * 97 % 251).reshape(3, size, size).to(torch.uint8)
            images = torch.stack([picture, picture // 4])  # a bright one and a dark one
            with full_precision(self._device):
                try:
                    self.network(images)
                except RuntimeError as error:
                    reason = reason or _reason(error)
                    continue
                both, one = self._extract(images).pooled, self._extract(images[:1]).pooled
            if not torch.allclose(both[:1], one, rtol=1e-2, atol=1e-3 * float(both.abs().max())):
                raise UserError(
                    f"'{self._path}' mixes the pictures of a batch: a picture's features depend on the others; "
                    "save the network in evaluation mode"
                )
            return
        raise UserError(
            f"'{self._path}' takes uint8 pictures (N, 3, H, W) of none of {', '.join(map(str, _SIZES))} pixels "
            f"({reason}); resize to what it needs within the file"
        )

    def _extract(self, images: Tensor) -> Features:
        height, width = images.shape[2:]
        try:
            returned = self.network(images.to(self._device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"'{self._path}' refuses pictures of {width}x{height} pixels ({_reason(error)}); give it pictures of "
                "the size it was made for, or resize within the file"
            ) from None
        parts = self._parts(returned)
        for part, values in parts.items():
            self._check(part, values, len(images))
        pooled = parts["features"]
        if self.dimensions not in (0, pooled.shape[1]):
            raise UserError(
                f"'{self._path}' gives {pooled.shape[1]} features of a {width}x{height} picture, and {self.dimensions} "
                "of another: expected one number for all sizes; pool within the file"
            )
        self.dimensions = pooled.shape[1]
        return Features(pooled, parts.get("logits"), parts.get("spatial"))

    def _parts(self, returned: Any) -> dict[str, Any]:
        if isinstance(returned, Tensor):
            return {"features": returned}
        if isinstance(returned, Mapping) and "features" in returned and set(returned) <= set(_PARTS):
            return dict(returned)
        if isinstance(returned, Sequence) and 1 <= len(returned) <= 2:
            return dict(zip(_PARTS, returned, strict=False))
        found = f"a mapping of {', '.join(map(str, returned))}" if isinstance(returned, Mapping) else "something else"
        raise UserError(
            f"'{self._path}' returns {found}: expected features (N, D), (features, logits), or a mapping of "
            f"{', '.join(_PARTS)}"
        )

    def _check(self, part: str, values: Any, count: int) -> None:
        if not isinstance(values, Tensor) or not values.is_floating_point():
            found = f"tensor of {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"'{self._path}' returns as {part} a {found}: expected a float tensor")
        if values.ndim != 2 or len(values) != count or values.shape[1] == 0:
            raise UserError(
                f"'{self._path}' returns {part} of shape {tuple(values.shape)} for {count} pictures: expected "
                f"({count}, D); pool or flatten within the file"
            )
        if not values.isfinite().all():
            raise UserError(
                f"'{self._path}' returns {part} that are not finite: expected numbers; check its preprocessing, "
                "which takes uint8 from 0 to 255"
            )


def _load(path: Path) -> torch.nn.Module:
    if not path.is_file():
        raise UserError(f"'{path}' does not exist or is no file: {_EXPECTED}")
    names = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    # What tells an archive of TorchScript from torch.save's.
    if not any(name.endswith("/constants.pkl") for name in names) or not any("/code/" in name for name in names):
        raise UserError(
            f"'{path}' is not TorchScript but another kind of file, such as a checkpoint: {_EXPECTED}; a file of the "
            "FID Inception is named by inception=FILE"
        )
    try:
        # Its successor, torch.export, fixes the batch size and cannot read such files.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as TorchScript ({_reason(error)}): {_EXPECTED}") from None
    return module.eval()


def _reason(error: Exception) -> str:
    """The last line of an error: TorchScript's begin with a trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shorten(lines[-1] if lines else type(error).__name__, 200, placeholder=" ...")
