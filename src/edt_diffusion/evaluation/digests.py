"""Digests that tell sets of pictures apart, whatever files they came from."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def digest_of(facts: Any) -> str:
    """SHA-256 of plain values, the same on every machine: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def picture_digests(pictures: np.ndarray, labels: np.ndarray | None) -> bytes:
    """A digest of 32 bytes for each picture, joined: of shape, pixels and label, as extractors see them.

    Args:
        pictures: uint8 (N, H, W, C); gray ones have the digest of three equal channels.
        labels: int64 (N,), or None.
    """
    if pictures.shape[-1] == 1:
        pictures = pictures.repeat(3, axis=-1)
    out = []
    for row, picture in enumerate(pictures):
        digest = hashlib.sha256(repr(picture.shape).encode())
        digest.update(np.ascontiguousarray(picture).data)
        if labels is not None:
            digest.update(b"%d" % int(labels[row]))
        out.append(digest.digest())
    return b"".join(out)


def combined_digest(digests: Iterable[bytes]) -> str:
    """SHA-256 of a whole set in its order, from `picture_digests` of its parts, however it was cut."""
    whole = hashlib.sha256()
    for part in digests:
        whole.update(part)
    return whole.hexdigest()
