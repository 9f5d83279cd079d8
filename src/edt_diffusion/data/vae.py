"""The autoencoder's files: find and load it, name it, save it.

- `load_vae`      a folder or hub id -> `AutoencoderKL` or `AutoencoderTiny`, frozen, in float32
- `vae_id`        what a report calls it
- `save_vae`      a folder of the same bytes for the same autoencoder
- `forget_source` no machine's path in what is saved
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from ..util.errors import UserError
from ..util.lookup import nearest

if TYPE_CHECKING:  # importing diffusers takes seconds, and pixels need none of it
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
_EXPECTED = f"expected {' or '.join(_CLASSES)}"

# Where an autoencoder stands in a folder: it is the folder's content, or a pipeline's, a latent store's, a run's part.
_PLACES = ("", "vae", "codec", "model/vae")

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load_vae(source: str | os.PathLike[str]) -> "AutoencoderKL | AutoencoderTiny":
    """Load an autoencoder in float32 on the CPU, in eval mode, without gradients.

    Args:
        source: a diffusers folder of the autoencoder; a folder that holds one as `vae/` (a pipeline) or `codec/` (a
            latent store); a run folder; or a hub id `user/name` of an autoencoder or of a pipeline with a `vae/`.

    Returns:
        The autoencoder; its configuration does not say where it came from.

    Raises:
        UserError: there is no such folder or hub entry, it holds another kind of model, or its weights are missing or
            damaged.
    """
    path = Path(source)
    local = path.exists()
    if local:
        place, config = _in_folder(path)
    elif path.is_absolute() or path.parent.is_dir() or str(source).count("/") != 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = nearest(path.name, siblings)
        hint = f" (did you mean '{path.parent / guess}'?)" if guess else ""
        raise UserError(
            f"autoencoder '{source}' does not exist: expected a diffusers folder or a hub id user/name{hint}"
        )
    else:
        place, config = _on_hub(str(source))
    kind = config.get("_class_name")
    if kind not in _CLASSES:
        raise UserError(f"{_named(source, place)} is of class {kind}: {_EXPECTED}")

    import diffusers

    options: dict[str, Any] = {"subfolder": place} if place else {}
    if local and not _has_weights(path / place):
        if not _has_weights(path / place, variant="fp16"):
            raise UserError(f"{_named(source, place)} has no weights: expected a file {_WEIGHTS[0]} beside config.json")
        options["variant"] = "fp16"
    try:
        vae, info = getattr(diffusers, kind).from_pretrained(
            source, torch_dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # diffusers, safetensors, the hub client and torch each have their own
        raise UserError(f"{_named(source, place)} cannot be loaded as {kind} ({_reason(error)})") from None
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"{_named(source, place)} lacks weights ({some}, ...): the file is of another autoencoder")
    forget_source(vae)
    # Convolutions run up to twice as fast, on CPUs too.
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def vae_id(source: str | os.PathLike[str]) -> str:
    """Return the name of an autoencoder for reports: the hub id, or the folder's own name without its path."""
    return Path(os.path.abspath(source)).name if Path(source).exists() else str(source)


def save_vae(vae: "AutoencoderKL | AutoencoderTiny", folder: str | os.PathLike[str]) -> None:
    """Write `config.json` and safetensors into `folder`; the same autoencoder gives the same bytes.

    Not atomic: write into a folder of `util.files.atomic_directory`.
    """
    forget_source(vae)
    vae.save_pretrained(folder)
    for weights in Path(folder).glob("*.safetensors"):  # safetensors keeps them private, whatever the umask
        shutil.copymode(Path(folder, "config.json"), weights)


def forget_source(part: Any) -> None:
    """Remove from a diffusers object's configuration the path it was loaded from, which would be saved with it."""
    from diffusers.configuration_utils import FrozenDict

    part = getattr(part, "_orig_mod", part)  # torch.compile wraps models
    config = getattr(part, "config", None)
    if isinstance(config, FrozenDict) and "_name_or_path" in config:
        part._internal_dict = FrozenDict({key: value for key, value in config.items() if key != "_name_or_path"})


def _in_folder(path: Path) -> tuple[str, Mapping[str, Any]]:
    """Which place of a folder holds a model, and that model's configuration."""
    if not path.is_dir():
        raise UserError(f"autoencoder '{path}' is a file: expected the diffusers folder it lies in")
    for place in _PLACES:
        file = path / place / "config.json"
        if file.is_file():
            return place, _read_config(file)
    raise UserError(f"'{path}' holds no autoencoder (no config.json in it or in its vae or codec folder): {_EXPECTED}")


def _on_hub(name: str) -> tuple[str, Mapping[str, Any]]:
    """Which place of a hub entry holds a model, and that model's configuration."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable = None
    for place in ("", "vae"):
        try:
            # What could not be reached once is not waited for again.
            options = {"subfolder": place or None, "local_files_only": unreachable is not None}
            return place, _read_config(Path(hf_hub_download(name, "config.json", **options)))
        except LocalEntryNotFoundError as error:  # not in the cache, and the hub could not be asked
            unreachable = error
        except EntryNotFoundError:
            continue
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"autoencoder '{name}' cannot be had from the hub ({_reason(error)})") from None
    if unreachable is not None:
        raise UserError(
            f"autoencoder '{name}' is no folder here, not in the hub's cache, and the hub cannot be reached: give a "
            "folder, or go online"
        )
    raise UserError(f"hub entry '{name}' holds no autoencoder (no config.json in it or in vae/): {_EXPECTED}")


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"'{file}' is damaged or unreadable: expected the JSON of an autoencoder; copy the folder anew")
    return config


def _has_weights(folder: Path, variant: str | None = None) -> bool:
    for name in _WEIGHTS:
        stem, suffix = name.split(".")
        whole = f"{stem}.{variant}.{suffix}" if variant else name
        # A sharded file is named by its index.
        parts = f"{stem}.{suffix}.index.{variant}.json" if variant else f"{name}.index.json"
        if (folder / whole).is_file() or (folder / parts).is_file():
            return True
    return False


def _named(source: str | os.PathLike[str], place: str) -> str:
    return f"autoencoder '{Path(source) / place}'" if place else f"autoencoder '{source}'"


def _reason(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
