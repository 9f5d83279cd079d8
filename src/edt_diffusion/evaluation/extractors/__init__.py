"""Feature extractors: what an evaluation looks at pictures through.

- `EXTRACTORS`      the names there are
- `open_extractor`  a name, or the file of a network of one's own -> an `Extractor`
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...util.errors import UserError
from ...util.lookup import lookup, nearest
from .base import Extractor, Features
from .clip import ClipExtractor
from .dinov2 import Dinov2Extractor
from .inception import InceptionExtractor
from .pixels import PixelExtractor
from .torchscript import TorchScriptExtractor

__all__ = ["EXTRACTORS", "Extractor", "ExtractorKind", "Features", "open_extractor"]

_SUFFIXES = (".ts", ".pt", ".pth", ".jit")


@dataclass(frozen=True)
class ExtractorKind:
    """One row of the table of extractors.

    Attributes:
        description: what it is, in one line.
        form: how it is written, such as "inception[=FILE]".
        open: the extractor on the CPU, made of what stands behind the "=", or of None if nothing does.
    """

    description: str
    form: str
    open: Callable[[str | None], Extractor]


def _torchscript(source: str | None) -> Extractor:
    if source is None:
        raise UserError("extractor 'torchscript' needs a file: expected torchscript=FILE, a TorchScript archive")
    return TorchScriptExtractor(source)


def _pixels(source: str | None) -> Extractor:
    if source is not None:
        raise UserError(f"extractor 'pixels={source}': 'pixels' has no weights; leave '={source}' out")
    return PixelExtractor()


EXTRACTORS: dict[str, ExtractorKind] = {
    "inception": ExtractorKind(
        "the Inception-v3 of 2015-12-05 of all published FID, sFID and Inception Scores; 2048 features",
        "inception[=FILE]",
        InceptionExtractor,
    ),
    "dinov2": ExtractorKind(
        "DINOv2 ViT-L/14 of FD-DINOv2 (arXiv 2306.04675), through transformers; 1024 features",
        "dinov2[=FOLDER or hub id]",
        Dinov2Extractor,
    ),
    "clip": ExtractorKind(
        "CLIP ViT-L/14 at 336 pixels of CMMD (arXiv 2401.09603), through transformers; 768 features of length 1",
        "clip[=FOLDER or hub id]",
        ClipExtractor,
    ),
    "torchscript": ExtractorKind(
        "a network of one's own: uint8 pictures (N, 3, H, W) -> features (N, D), or (features, logits)",
        "torchscript=FILE",
        _torchscript,
    ),
    "pixels": ExtractorKind("the pixels themselves, on a 16x16 grid; no weights; 768 features", "pixels", _pixels),
}


def open_extractor(spec: str, device: torch.device | str = "cpu") -> Extractor:
    """Open an extractor.

    Args:
        spec: a name of `EXTRACTORS`; a name, "=" and where its weights are; or the path of a TorchScript file that ends
            in .ts, .pt, .pth or .jit.
        device: where its network is to run.

    Raises:
        UserError: no such name or file, or its weights cannot be had or are not what was expected.
    """
    path = Path(spec).expanduser()
    if path.suffix in _SUFFIXES and path.is_file():
        return TorchScriptExtractor(path).to(device)
    name, equals, source = spec.partition("=")
    if name not in EXTRACTORS and path.suffix in _SUFFIXES and "=" not in spec:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = nearest(path.name, beside)
        hint = f" (did you mean '{path.parent / guess}'?)" if guess else ""
        raise UserError(f"extractor {spec!r} does not exist: expected a TorchScript file{hint}")
    kind = lookup(EXTRACTORS, name, "extractor")
    if equals and not source:
        raise UserError(f"extractor {spec!r} names nothing behind '=': expected {kind.form}")
    return kind.open(source or None).to(device)
