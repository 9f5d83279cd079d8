"""The pictures that a run was trained on, for whoever judges it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig, load_config
from ..data import ImageDataset, open_dataset
from ..data.shard_files import is_store
from ..data.sources import find_source
from ..evaluation.inputs import Input, dataset_input, open_input, pictures_key
from ..util.errors import UserError
from .during import split_for_validation


@dataclass(frozen=True)
class RunPictures:
    """The pictures that a run was trained on.

    Attributes:
        training: those that it learns from.
        held_out: those that it is validated on, or None.
        mirrored: whether it sees them mirrored too.
        path, preparation, key: for `evaluation.inputs.dataset_input`.
    """

    training: ImageDataset
    held_out: ImageDataset | None
    mirrored: bool
    path: str
    preparation: str
    key: list[Any]

    @classmethod
    def of(cls, what: str) -> "RunPictures | None":
        """Those of a run folder; None for other models, and for runs from a store, which holds no pictures.

        Raises:
            UserError: they have been moved away.
        """
        settings = Path(what) / "config.yaml"
        if not settings.is_file():
            return None
        config: RunConfig = load_config(settings)
        try:
            return cls.behind(config)
        except UserError as error:
            raise UserError(
                f"the pictures that {what} was trained on ({config.data.path}) cannot be had ({error}): "
                "name them by --reference, and for a judge by --training"
            ) from None

    @classmethod
    def behind(cls, config: RunConfig) -> "RunPictures | None":
        """Those of a configuration, also where it trains on their latents; None if it names a store or a stream."""
        data = config.data
        if data.path is None or is_store(data.path) or data.streaming or data.size is None:
            return None
        crop = "center" if data.crop == "random" else data.crop
        pixels = data.model_copy(
            update={
                "codec": None, "crop": crop, "cache": "auto", "latent_scaling": "codec", "verify": "auto",
                "codec_batch": None,
            }
        )  # fmt: skip
        dataset = open_dataset(pixels, config.seed)
        assert isinstance(dataset, ImageDataset)
        training, held_out = split_for_validation(config.model_copy(update={"data": pixels}), dataset)
        assert isinstance(training, ImageDataset)
        assert held_out is None or isinstance(held_out, ImageDataset)
        preparation, key = origin(config, training)
        return cls(training, held_out, data.flip, data.path, preparation, key)


def origin(config: RunConfig, dataset: ImageDataset) -> tuple[str, list[Any]]:
    """`preparation` and `key` of a part of a run's pictures; see `evaluation.inputs.Input`."""
    data = config.data
    assert data.path is not None
    found = find_source(data.path, image_column=data.image_column, label_column=data.label_column, split=data.split)
    crop = "center" if data.crop == "random" else data.crop
    preparation = f"{crop} to {dataset.size[0]}x{dataset.size[1]}"
    return preparation, pictures_key(
        data.path, found, dataset, preparation,
        split=data.split, label_column=data.label_column, image_column=data.image_column, limit=data.limit,
    )  # fmt: skip


def reference_input(path: str | None, run: RunPictures | None, shape: tuple[int, int, int]) -> Input | None:
    """The real pictures that are named, brought to the size of the samples; or those of the run."""
    if path is not None:
        channels = 1 if shape[2] == 1 else 3
        return open_input(path, size=shape[:2], channels=channels)
    if run is not None and (*run.training.size, run.training.channels) == shape:
        return dataset_input(run.training, run.path, run.preparation, run.key)
    return None
