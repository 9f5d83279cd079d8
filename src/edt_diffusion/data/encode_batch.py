"""One batch of prepared pictures through the codec: rows to store, and the sums behind the channels' statistics."""

from dataclasses import dataclass

import numpy as np

from ..util.errors import UserError
from .codec import PixelCodec, VAECodec, from_uint8
from .manifest import Bucket, Statistics
from .prepare import Prepared

# A picture and its row in each view, of shape (K, h, w).
EncodedRow = tuple[Prepared, list[np.ndarray]]


@dataclass
class Sums:
    """Sums over latents: numbers per channel, their sum and the sum of their squares; floats survive JSON unchanged."""

    count: int
    values: list[float]
    squares: list[float]

    @classmethod
    def zero(cls, channels: int) -> "Sums":
        """Of nothing."""
        return cls(0, [0.0] * channels, [0.0] * channels)


def statistics(parts: list[Sums]) -> Statistics:
    """Mean and deviation per channel."""
    count = sum(part.count for part in parts)
    mean = np.sum([part.values for part in parts], axis=0) / count
    variance = np.sum([part.squares for part in parts], axis=0) / count - mean**2
    return Statistics(mean=mean.tolist(), std=np.sqrt(np.maximum(variance, 0.0)).tolist())


class BatchEncoder:
    """Encodes batches; each is filled up with black pictures, so that its shape is always the same.

    Args:
        codec: the autoencoder, or `PixelCodec`.
        buckets: sizes of pictures and shapes of latents.
        views: "plain", or "plain" and "flipped".
        dtype: of the rows.
        channels: of the pictures.
        batch_size: None is 32 on a GPU and 2 on a CPU, where small batches stay in its caches.
    """

    def __init__(
        self,
        codec: VAECodec | PixelCodec,
        buckets: list[Bucket],
        views: list[str],
        dtype: np.dtype,
        channels: int,
        batch_size: int | None,
    ) -> None:
        on_cpu = isinstance(codec, PixelCodec) or (codec.device or codec.vae.device).type == "cpu"
        self.codec, self.buckets, self.views, self.dtype, self.channels = codec, buckets, views, dtype, channels
        self.batch_size = batch_size or (2 if on_cpu else 32)
        self.pixels = codec.kind == "pixels"

    def __call__(self, bucket: int, pictures: list[Prepared], sums: Sums) -> list[EncodedRow]:
        """The rows of those pictures of a batch that could be read; what they hold is added to `sums`.

        Raises:
            UserError: a latent does not fit the number format, or is not finite.
        """
        readable = [(slot, picture) for slot, picture in enumerate(pictures) if picture.pixels is not None]
        if not readable:
            return []
        height, width = self.buckets[bucket].pictures
        pixels = np.zeros((self.batch_size, height, width, self.channels), np.uint8)
        for slot, picture in readable:
            pixels[slot] = picture.pixels  # pyright: ignore[reportArgumentType, reportCallIssue]
        if self.pixels:
            views = [pixels.transpose(0, 3, 1, 2)]
        else:
            views = [self._posterior(pixels[:, :, ::-1] if view == "flipped" else pixels) for view in self.views]
        slots = [slot for slot, _ in readable]
        self._measure(views[0][slots], sums)
        with np.errstate(over="ignore"):  # told below, with the picture's name
            rows = [view.astype(self.dtype) for view in views]
        for slot, picture in readable:
            for exact, row in zip(views, rows, strict=True):
                if not self.pixels and not np.isfinite(row[slot]).all():
                    raise _not_finite(picture.key, exact[slot])
        return [(picture, [row[slot] for row in rows]) for slot, picture in readable]

    def _posterior(self, pixels: np.ndarray) -> np.ndarray:
        return self.codec.posterior(from_uint8(np.ascontiguousarray(pixels))).cpu().numpy()

    def _measure(self, values: np.ndarray, sums: Sums) -> None:
        """Add to the sums behind the channels' mean and deviation; a posterior adds its variance."""
        exact = values.astype(np.float64)
        if self.pixels:
            exact = exact / 127.5 - 1.0
        variance = 0.0
        if self.codec.kind == "moments":
            exact, logarithm = np.split(exact, 2, axis=1)
            variance = np.exp(logarithm)
        sums.count += exact[:, 0].size
        sums.values = (np.array(sums.values) + exact.sum((0, 2, 3))).tolist()
        sums.squares = (np.array(sums.squares) + (exact**2 + variance).sum((0, 2, 3))).tolist()


def _not_finite(key: str, exact: np.ndarray) -> UserError:
    if np.isfinite(exact).all():
        return UserError(
            f"the latents of {key!r} reach {np.abs(exact).max():g}, too much for float16: encode with --dtype float32"
        )
    return UserError(f"the autoencoder gave values that are not finite for {key!r}: its weights may be damaged")
