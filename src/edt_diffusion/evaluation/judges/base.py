"""What all judges share: the contract, the facts they are known by, and their files."""

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ...util.errors import UserError
from ...util.files import atomic_directory, atomic_write_bytes, atomic_write_json
from ..pixels import PictureSource, Progress

FACTS, WEIGHTS = "judge.json", "weights.safetensors"
FORMAT = 1
_BLOCK = 256


class Classifier(ABC):
    """Says of a picture which class it is of.

    Args:
        class_names: in label order.
        shape: (height, width, channels) of the pictures it was made for.
        facts: how it was made and how good it is, as JSON holds it.

    Attributes:
        kind: its name in the table of kinds.
        facts: as given; `held_out_accuracy` is there once it was measured.
    """

    kind: ClassVar[str]

    def __init__(self, class_names: list[str], shape: tuple[int, int, int], facts: Mapping[str, Any]) -> None:
        self.class_names = list(class_names)
        self.shape = shape
        self.facts = dict(facts)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Tell how probable each class is.

        Args:
            images: uint8 (N, H, W, C), of the size and channels it was made for.

        Returns:
            float64 (N, K), rows summing to 1; row i depends on picture i only.

        Raises:
            UserError: the pictures have another size or other channels.
        """
        if images.shape[1:] != self.shape:
            raise UserError(
                f"the judge was made for pictures of {size_text(self.shape)}, these are {size_text(images.shape[1:])}: "
                "train one on real pictures of the same size"
            )
        if not len(images):
            return np.zeros((0, len(self.class_names)))
        blocks = (images[start : start + _BLOCK] for start in range(0, len(images), _BLOCK))
        return np.concatenate([_softmax(self._logits(block)) for block in blocks])

    def predict_source(self, pictures: PictureSource, progress: Progress | None = None) -> np.ndarray:
        """Like `predict`, for pictures that are read block by block."""
        found = [np.zeros((0, len(self.class_names)))]
        for start in range(0, len(pictures), _BLOCK):
            block = np.arange(start, min(start + _BLOCK, len(pictures)))
            found.append(self.predict(pictures.images(block)))
            if progress is not None:
                progress(int(block[-1]) + 1, len(pictures))
        return np.concatenate(found)

    @abstractmethod
    def _logits(self, images: np.ndarray) -> np.ndarray:
        """Scores before the softmax, float (N, K), of a block of pictures."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """Everything learned, by name; empty for a judge that learned nothing."""

    @property
    def sha256(self) -> str:
        """Digest of the weights: that of the file of weights which `save` writes."""
        return hashlib.sha256(safetensors.torch.save(self._tensors())).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What a result's manifest says of it: its kind, the digest of its weights, and the facts."""
        return {
            "kind": self.kind,
            "sha256": self.sha256,
            "pictures": size_text(self.shape),
            "classes": len(self.class_names),
            **self.facts,
        }

    def save(self, folder: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Write it to a new folder, which appears when it is complete: weights as safetensors, the rest as JSON.

        Raises:
            FileExistsError: the folder exists and `replace` is False.
        """
        weights = safetensors.torch.save(self._tensors())
        tree = {
            "format": FORMAT,
            "kind": self.kind,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "shape": list(self.shape),
            "class_names": self.class_names,
            "facts": self.facts,
        }
        with atomic_directory(folder, replace=replace) as temporary:
            atomic_write_bytes(temporary / WEIGHTS, weights)
            atomic_write_json(temporary / FACTS, tree)


def read_files(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `Classifier.save` wrote: the tree of `judge.json`, and the tensors.

    Raises:
        UserError: it is no folder of a judge, or was changed or damaged.
    """
    path = Path(folder)
    try:
        tree, content = json.loads((path / FACTS).read_bytes()), (path / WEIGHTS).read_bytes()
        found, complete = tree["format"], {"kind", "weights_sha256", "shape", "class_names", "facts"} <= tree.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{str(folder)!r} is no saved judge: expected a folder with {FACTS} and {WEIGHTS}; train one anew"
        ) from None
    if found != FORMAT or not complete:
        raise UserError(f"{str(folder)!r} is a judge of format {found!r}, expected {FORMAT}: train one anew")
    if hashlib.sha256(content).hexdigest() != tree["weights_sha256"]:
        raise UserError(f"{str(path / WEIGHTS)!r} is damaged (its SHA-256 is not that of {FACTS}): train one anew")
    return tree, safetensors.torch.load(content)


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients even where the caller has turned them off; also a decorator."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def size_text(shape: tuple[int, ...]) -> str:
    """Write (height, width, channels) as "height x width, gray" or "..., colour"."""
    height, width, channels = shape
    return f"{height}x{width} pixels in {'gray' if channels == 1 else 'colour'}"


def _softmax(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)
