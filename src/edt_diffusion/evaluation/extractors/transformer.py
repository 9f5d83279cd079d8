"""What the extractors around `transformers` have in common: find the model, load it, prepare the pictures."""

import contextlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...util.errors import UserError
from ...util.weights import weights_sha256
from .network import NetworkExtractor

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TIMEOUT = 10.0  # seconds without an answer


class TransformerExtractor(NetworkExtractor):
    """A vision transformer with its preparation of the pictures.

    Pictures are resized by Pillow, as uint8 and with its bicubic filter, which averages when it reduces: to the bit
    what the papers' own code did with files, and the same on all machines.
    """

    _size: int
    _mean: tuple[float, float, float]
    _std: tuple[float, float, float]

    def _prepared(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to float32 (N, 3, size, size) on the device, normalised per channel."""
        pixels = resize_as_pillow(images, self._size).to(self._device, torch.float32) / 255
        mean, std = (torch.tensor(values, device=self._device).reshape(3, 1, 1) for values in (self._mean, self._std))
        return (pixels - mean) / std


def resize_as_pillow(images: Tensor, size: int) -> Tensor:
    """Resize uint8 (N, 3, H, W) to uint8 (N, 3, size, size) on the CPU with Pillow's bicubic filter."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    pictures = [Image.fromarray(picture) for picture in images.permute(0, 2, 3, 1).cpu().contiguous().numpy()]
    resized = [np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def load_model(
    class_name: str, source: str | os.PathLike[str], extractor: str, model_types: tuple[str, ...]
) -> tuple[Any, str]:
    """Load a model of `transformers` in float32 on the CPU, frozen and in evaluation mode.

    Args:
        class_name: its class there.
        source: a folder that it was saved into, or a hub id `user/name`. What is in the hub's cache is not asked for
            again.
        extractor: who wants it, for messages.
        model_types: what the `model_type` of its config.json may be.

    Returns:
        The model, and the SHA-256 of its weights.

    Raises:
        UserError: transformers is not installed, there is no such folder or hub entry, the hub cannot be reached, or it
            is another model.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"extractor {extractor!r} needs transformers: pip install 'edt-diffusion[features]', or use another "
            "extractor: inception, pixels, torchscript=FILE"
        ) from None
    folder = _folder(source, extractor)
    kind = _model_type(folder / "config.json")
    if kind not in model_types:
        raise UserError(f"'{source}' is a model of type {kind!r}: {extractor} expects {' or '.join(model_types)}")
    try:
        with _quiet():
            model, report = getattr(transformers, class_name).from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # transformers, safetensors and torch each have their own
        raise UserError(f"'{source}' cannot be loaded as {class_name} ({_reason(error)})") from None
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"'{source}' lacks weights ({some}, ...): expected a whole {class_name}")
    model = model.eval().requires_grad_(False)
    return model, weights_sha256(model)


def _folder(source: str | os.PathLike[str], extractor: str) -> Path:
    """The folder that holds a model's config.json and weights, fetched from the hub if need be."""
    path = Path(source).expanduser()
    if path.is_dir():
        # Large models are saved in several files, which an index names.
        weights = [name for stem in _WEIGHTS for name in (stem, f"{stem}.index.json")]
        for names in (["config.json"], weights):
            if not any((path / name).is_file() for name in names):
                raise UserError(f"'{path}' holds no {names[0]}: {extractor} expects a folder saved by transformers")
        return path
    name = str(source)
    if path.exists() or path.is_absolute() or name.count("/") != 1 or name.startswith((".", "~")):
        raise UserError(
            f"'{source}' is no folder: {extractor} expects one saved by transformers, or a hub id user/name"
        )
    cached = _from_hub(name, local_files_only=True)
    if cached is not None:
        return cached
    if not _reachable():
        raise UserError(
            f"{name!r} for {extractor} is neither a folder here nor in the hub's cache, and the hub cannot be reached: "
            f"go online, or name a folder by {extractor}=FOLDER"
        )
    fetched = _from_hub(name, local_files_only=False)
    if fetched is None:
        raise UserError(f"hub entry {name!r} holds no {' or '.join(_WEIGHTS)} beside a config.json")
    return fetched


def _from_hub(name: str, *, local_files_only: bool) -> Path | None:
    """The snapshot folder of a hub entry with its config.json and weights in it; None if it has them not."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        folder = Path(hf_hub_download(name, "config.json", local_files_only=local_files_only)).parent
        for weights in _WEIGHTS:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(name, weights, local_files_only=local_files_only)
                return folder
    except EntryNotFoundError:
        pass
    except Exception as error:  # unknown, gated or misspelt entries, and the network: each has its own
        raise UserError(f"{name!r} cannot be had from the hub ({_reason(error)})") from None
    return None


def _reachable() -> bool:
    """Whether the hub answers at all: its client would try again and again for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT):
            return True
    except urllib.error.HTTPError:  # it answers
        return True
    except OSError:
        return False


def _model_type(file: Path) -> str:
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"'{file}' is damaged or unreadable: expected the JSON of a model; copy the folder anew")
    return str(config.get("model_type"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars, and no report of the weights that are left out, such as those of CLIP's text tower."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
