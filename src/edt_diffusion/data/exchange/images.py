"""A latent store decoded into pictures, to be looked at."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...util.pictures import to_pil
from ..codec import PixelCodec, VAECodec
from ..inspection.decoding import decode_rows
from ..inspection.summary import evenly_spaced, safe_name, safe_names
from ..latents import LatentStore
from .folders import new_folder


def to_pictures(
    store: LatentStore,
    codec: VAECodec | PixelCodec,
    out: Path,
    limit: int | None = None,
    batch_size: int = 16,
    told: Callable[[int, int | None, int], None] | None = None,
) -> int:
    """Write rows as PNG files, in a folder for each class if the store has classes.

    Of moments the mean is decoded, nothing is drawn. A file is called by the number of its row and the name of the
    picture; class folders by the classes, with what file systems cannot have replaced by "_".

    Args:
        store: the store.
        codec: see `inspection.store_codec`.
        out: folder to make.
        limit: write that many rows, evenly spaced; None writes all.
        batch_size: rows decoded at once.
        told: called with pictures done, pictures in all, and 0.

    Returns:
        The number of pictures.

    Raises:
        UserError: a shard cannot be read, or `out` exists.
    """
    rows = evenly_spaced(np.arange(len(store)), limit)
    digits = len(str(len(store) - 1))
    classes = None if store.class_names is None else safe_names(store.class_names)
    with new_folder(out) as folder:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            pictures = decode_rows(store, codec, batch, batch_size)
            for row, key, picture in zip(batch.tolist(), store.column("key", batch), pictures, strict=True):
                place = folder
                if classes is not None and store.labels is not None:
                    place = folder / classes[int(store.labels[row])]
                place.mkdir(exist_ok=True)
                name = safe_name(key.rpartition("/")[2].rpartition(".")[0])
                to_pil(picture).save(place / f"{row:0{digits}d} {name}.png")
            if told is not None:
                told(start + len(batch), len(rows), 0)
    return len(rows)
