"""The file of the FID Inception's weights: find it, fetch it, check it."""

import os
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor

from ...data.shard_files import cache_folder
from ...util.errors import UserError
from ...util.files import atomic_path, make_folder, sha256_file

ENVIRONMENT = "EDT_INCEPTION"
FILE = "pt_inception-2015-12-05-6726825d.pth"
# torch-fidelity gives the same file out under its own name.
_FILES = (FILE, "weights-inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_TIMEOUT = 20.0  # seconds without an answer
_PIECE = 1 << 20  # bytes
_BATCHES = ".num_batches_tracked"
_OTHERS = "or use another extractor: dinov2, pixels, torchscript=FILE"


def load_inception(
    expected: Mapping[str, Tensor], source: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Tensor], str]:
    """Load the weights from the public file of pytorch-fid and torch-fidelity.

    Without `source` it is looked for by the environment variable EDT_INCEPTION, in `weights/` of the cache folder
    ($EDT_CACHE) and in torch hub's folder of checkpoints, where pytorch-fid and torch-fidelity leave it; if it is
    nowhere, it is fetched from the former's release (91 MiB) into the cache folder.

    Args:
        expected: the network's state dict; of its tensors only names and shapes count.
        source: the file.

    Returns:
        The state dict in float32, and the file's SHA-256. Counts of batches, which older files lack and evaluation does
        not use, are 0 where they are absent.

    Raises:
        UserError: there is no such file, it cannot be fetched, or it is another one.
    """
    path = _find(source)
    found = sha256_file(path)
    if found != SHA256:
        raise UserError(_other(f"'{path}'", found) + "; fetch it anew, or name a custom network by torchscript=FILE")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no state dict makes the unpickler raise nearly anything
        raise UserError(f"'{path}' cannot be read as a state dict ({_reason(error)}); fetch {FILE} anew") from None
    if not isinstance(weights, Mapping):
        raise UserError(f"'{path}' holds no state dict but a {type(weights).__name__}; fetch {FILE} anew")
    counts = {name: torch.zeros_like(tensor) for name, tensor in expected.items() if name.endswith(_BATCHES)}
    weights = {**counts, **weights}
    for name, tensor in expected.items():
        given = weights.get(name)
        if given is None or given.shape != tensor.shape:
            has = "no such tensor" if given is None else str(tuple(given.shape))
            raise UserError(f"'{path}': {name} should be {tuple(tensor.shape)}, found {has}; fetch {FILE} anew")
    if unknown := sorted(set(weights) - set(expected)):
        raise UserError(f"'{path}' holds {unknown[0]!r}, which the FID Inception has not; fetch {FILE} anew")
    return {name: weights[name].to(tensor.dtype) for name, tensor in expected.items()}, found


def _find(source: str | os.PathLike[str] | None) -> Path:
    named = source or os.environ.get(ENVIRONMENT)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            given = "" if source else f"{ENVIRONMENT} names "
            raise UserError(f"{given}'{path}': no such file; expected {FILE}, which {URL} gives out")
        return path
    cache = cache_folder() / "weights"
    for folder in (cache, Path(torch.hub.get_dir(), "checkpoints")):
        for name in _FILES:
            if (folder / name).is_file():
                return folder / name
    return _fetch(cache)


def _fetch(folder: Path) -> Path:
    """Download the file into a folder, where it appears only when it is complete and the right one."""
    make_folder(folder)
    path = folder / FILE
    try:
        with urllib.request.urlopen(URL, timeout=_TIMEOUT) as answer, atomic_path(path) as temporary:
            with open(temporary, "xb") as file:
                while piece := answer.read(_PIECE):
                    file.write(piece)
            found = sha256_file(temporary)
            if found != SHA256:
                raise UserError(_other(f"what {URL} gives out", found) + f"; put the right one into '{folder}'")
    except (OSError, HTTPException) as error:
        raise UserError(
            f"the weights of inception, {FILE}, are not on this machine and cannot be fetched from {URL} "
            f"({_reason(error)}): put the file into '{folder}', name it by inception=FILE or {ENVIRONMENT}, {_OTHERS}"
        ) from None
    return path


def _other(what: str, found: str) -> str:
    return f"{what} has SHA-256 {found}, and {FILE} has {SHA256}: it may be another network or a damaged copy"


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error  # of a URLError, what is behind it
    return " ".join(str(reason).split())[:200] or type(error).__name__
