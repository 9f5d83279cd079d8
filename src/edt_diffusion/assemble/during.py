"""What is done now and then while a run trains: sample grids and validation."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..config import RunConfig, SamplesConfig
from ..data import ImageDataset, LatentStore, open_dataset, stratified_split
from ..objectives import MaskedTraining
from ..pipelines import ClassConditionalPipeline, default_scheduler
from ..pipelines.schedulers import prediction_type_of
from ..training.trainer import Callback
from ..training.validation import ValidationLoss
from ..util.errors import UserError
from ..util.pictures import beside, grid, save_png
from ..util.rng import image_seed


def sample_classes(
    pipeline: ClassConditionalPipeline, settings: SamplesConfig, attention_modulation: bool = False
) -> tuple[np.ndarray, list[str]]:
    """`per_class` pictures of the first classes from fixed seeds: uint8 (N, H, W, C), and the names of the rows."""
    classes = pipeline.transformer.config.num_classes
    rows = min(classes or 1, settings.max_classes)
    labels = [row for row in range(rows) for _ in range(settings.per_class)]
    seeds = [image_seed(settings.seed, index) for index in range(len(labels))]
    model = pipeline.transformer
    with model.suspend_attention_modulation() if not attention_modulation else nullcontext():
        images = pipeline(
            labels if classes else None,
            guidance_scale=settings.guidance_scale if classes else 1.0,
            num_inference_steps=settings.num_inference_steps,
            scheduler=settings.scheduler or default_scheduler(prediction_type_of(pipeline.scheduler)),
            seeds=seeds,
            batch_size=None if pipeline.vae is None else settings.decode_batch,
            output_type="uint8",
        ).images  # pyright: ignore[reportAttributeAccessIssue]
    names = pipeline.class_names or [str(row) for row in range(rows)]
    return images, names[:rows] if classes else []


class SampleGrids:
    """The callback that makes a grid of samples from fixed seeds, without and with attention modulation.

    Args:
        pipeline: around the network that is trained.
        settings: how the pictures are made.
        folder: of the PNG files, `step-00001000.png` and so on.
        write: False for processes that only take part.
    """

    def __init__(
        self, pipeline: ClassConditionalPipeline, settings: SamplesConfig, folder: Path, write: bool = True
    ) -> None:
        self.pipeline, self.settings, self.folder, self.write = pipeline, settings, folder, write
        model = pipeline.transformer
        self.modulation = None
        if settings.attention_modulation == "auto":
            self.modulation = model.suggested_modulation(settings.guidance_scale)

    def __call__(self, step: int) -> dict[str, Any]:
        model, settings = self.pipeline.transformer, self.settings
        pictures, names = sample_classes(self.pipeline, settings, settings.attention_modulation == "saved")
        made = grid(pictures, settings.per_class, names)
        if self.modulation is not None:
            with model.use_attention_modulation(self.modulation):
                modulated, _ = sample_classes(self.pipeline, settings, attention_modulation=True)
            made = beside([made, grid(modulated, settings.per_class, names)], ["AMM off", "AMM on"])
        if not self.write:
            return {}
        self.folder.mkdir(exist_ok=True)
        save_png(made, self.folder / f"step-{step:08d}.png")
        return {"samples": np.atleast_3d(np.asarray(made))}


def split_for_validation(
    config: RunConfig, dataset: ImageDataset | LatentStore
) -> tuple[ImageDataset | LatentStore, ImageDataset | LatentStore | None]:
    """What is trained on, and what is held out (None if nothing is).

    Raises:
        UserError: there are no pictures to validate on, or of other classes or sizes than those trained on.
    """
    wanted = config.validation
    if wanted.share:
        labels = np.zeros(len(dataset), dtype=np.int64) if dataset.labels is None else dataset.labels
        if len(labels) == len(np.unique(labels)):
            raise UserError(
                f"validation.share={wanted.share} can hold out none of the {len(dataset)} pictures of "
                f"{dataset.source}, since no class has two: add pictures, or give others with validation.path"
            )
        return stratified_split(dataset, wanted.share, config.seed)  # pyright: ignore[reportReturnType]
    if wanted.path is None:
        return dataset, None
    held = open_dataset(config.data.model_copy(update={"path": wanted.path, "limit": None}), config.seed, True)
    if not len(held):
        raise UserError(f"validation.path={wanted.path} has 0 pictures: expected at least one")
    for what in ("shape", "class_names"):
        here, there = getattr(dataset, what), getattr(held, what)
        if here != there and not (what == "class_names" and here is None):
            raise UserError(
                f"validation.path={wanted.path} has other {what.replace('_', ' ')} ({there}) than {dataset.source} "
                f"({here}): give pictures of the same kind"
            )
    return dataset, held


def validation_callback(
    config: RunConfig,
    held_out: ImageDataset | LatentStore | None,
    objective: MaskedTraining,
    accelerator: Any,
    network: Any,
) -> list[Callback]:
    """The callback that computes the held-out loss, if there is anything held out."""
    if held_out is None:
        return []
    wanted, train = config.validation, config.train
    micro = max(1, train.batch_size // accelerator.num_processes // train.micro_batches)
    call = ValidationLoss(
        held_out, objective, accelerator, network, config.seed, wanted.pictures, wanted.batch_size or micro
    )
    return [Callback(wanted.every or 10 * train.log_every, call, everywhere=True)]
