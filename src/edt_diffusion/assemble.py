"""Configuration becomes objects, here and nowhere else. Read it from top to bottom to see how data flow."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from .config import RunConfig, SamplesConfig, begun_config, parse_config, refuse_changes, settled, to_yaml
from .data import ImageDataset, LatentStore, open_dataset, require_classes, training_loader
from .data.codec import LatentScaling
from .data.dataset import described, make_order
from .data.shard_files import IntegrityCheck
from .data.vae import load_vae, vae_sha256
from .models import BACKBONES
from .objectives.config import build_objective
from .pipelines import ClassConditionalPipeline, make_scheduler
from .training.ema import EMA
from .training.record import picture_facts, read_record, refuse_other_pictures, write_record
from .training.trainer import Trainer
from .util.errors import UserError
from .util.files import atomic_directory, atomic_write_text, make_folder
from .util.lookup import lookup
from .util.pictures import grid, save_png
from .util.rng import image_seed

# Stores up to this size are hashed before the first step, larger ones beside the training.
_CHECKED_AT_START = 1 << 30


def open_data(config: RunConfig, quiet: bool = True) -> ImageDataset | LatentStore:
    """The pictures or latents that a configuration names; see `data.open_dataset`."""
    return open_dataset(config.data, config.seed, quiet)


def complete(config: RunConfig, dataset: ImageDataset | LatentStore) -> RunConfig:
    """Fill in what the data decide about the model, and refuse what contradicts them."""
    model = dict(config.model)
    channels, height, width = dataset.shape
    told: dict[str, Any] = {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
    }
    if dataset.class_names is None:  # unlabelled pictures make an unconditional model
        model.setdefault("num_classes", None)
    if model.get("num_classes", 0) is not None:
        require_classes(dataset)
        told["num_classes"] = len(dataset.class_names or [])
    kind = "latents" if isinstance(dataset, LatentStore) and dataset.manifest.kind != "pixels" else "pictures"
    for name, value in told.items():
        if model.setdefault(name, value) != value:
            raise UserError(f"model.{name}={model[name]} does not fit the {kind}, which need {value}: leave it out")
    data = described(config.data, dataset)
    return parse_config({**config.model_dump(mode="json"), "model": model, "data": data.model_dump(mode="json")})


def build_model(config: RunConfig) -> Any:
    """The untrained network; its weights depend on `config.seed` only."""
    arguments = {name: value for name, value in config.model.items() if name not in ("name", "size")}
    backbone = lookup(BACKBONES, config.model.get("name", "EDT"), "model")
    set_seed(config.seed)
    try:
        if size := config.model.get("size"):
            return backbone.from_size(size, **arguments)
        return backbone(**arguments)
    except KeyError as error:
        raise UserError(f"the model cannot be built: a setting of it lacks {error}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        hint = "; sample_size is data.size" if str(error).startswith("sample_size") else ""
        raise UserError(f"the model cannot be built: {error}{hint}") from None


def open_codec(config: RunConfig, dataset: ImageDataset | LatentStore) -> Any:
    """The autoencoder behind the latents of a store; None if the model sees pixels.

    Raises:
        UserError: the store has no copy and none is named, or the one named is another than made the store.
    """
    if not isinstance(dataset, LatentStore) or dataset.manifest.kind == "pixels":
        return None
    source = config.data.codec or dataset.codec_folder
    facts = dataset.manifest.codec
    if source is None:
        told = f"it was made by {facts.id}" if facts else "it does not say by which it was made"
        raise UserError(f"{dataset.source} holds no copy of its autoencoder ({told}): name it with data.codec")
    vae = load_vae(source)
    if facts is not None and vae_sha256(vae) != facts.sha256:
        raise UserError(
            f"the autoencoder {source!r} is not the one that made {dataset.source} ({facts.id}): its weights differ; "
            "give that one, or encode the pictures anew"
        )
    return vae


def build_pipeline(
    model: Any,
    class_names: list[str] | None,
    vae: Any = None,
    scaling: LatentScaling | None = None,
    pixels: bool = True,
) -> ClassConditionalPipeline:
    """The pipeline around a model, with the scheduler of its training process; predictions of pixels are clamped.

    Args:
        model: the network.
        class_names: in label order, or None.
        vae: the autoencoder of a model of latents.
        scaling: what was applied to the latents in training, if not what the autoencoder's configuration says.
        pixels: whether the model sees pixels.
    """
    scheduler = make_scheduler("ddpm", learned_variance=model.config.learn_sigma, clip_sample=pixels and vae is None)
    own = {}
    if vae is not None and scaling is not None and scaling != LatentScaling.of_config(vae.config):
        own = {"latents_mean": list(scaling.shift), "latents_std": [1 / scale for scale in scaling.scale]}
    pipeline = ClassConditionalPipeline(model, scheduler, vae=vae, class_names=class_names, **own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
            scheduler=settings.scheduler,
            seeds=seeds,
            batch_size=None if pipeline.vae is None else settings.decode_batch,
            output_type="uint8",
        ).images  # pyright: ignore[reportAttributeAccessIssue]
    names = pipeline.class_names or [str(row) for row in range(rows)]
    return images, names[:rows] if classes else []


def build_trainer(
    config: RunConfig,
    folder: Path,
    dataset: ImageDataset | LatentStore | None = None,
    *,
    quiet: bool = False,
    allow_changes: bool = False,
    preset: str | None = None,
    callbacks: Callable[[ClassConditionalPipeline], list[tuple[int, Any]]] | None = None,
) -> Trainer:
    """Everything `edt train` needs, from the pictures to the loop, at the step that the folder's run has reached.

    Args:
        config: the run's settings.
        folder: the run folder; made if absent. If it holds a run, its settings must be the same.
        dataset: pictures already opened; by default those of `config.data`.
        quiet: no progress on the terminal.
        allow_changes: go on with other settings or pictures than those the run began with.
        preset: name of the preset that the settings come from, kept with the run.
        callbacks: given the pipeline, returns further (every, callback) pairs.

    Raises:
        UserError: for anything the user can put right; nothing has been written then.
    """
    if config.train.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError(
            "train.mixed_precision=fp16 needs a GPU (it is a hundred times slower on a CPU): use bf16 or no"
        )
    if dataset is None:
        dataset = open_data(config, quiet)
    begun = begun_config(folder)
    conditional = dataset.class_names is not None and config.model.get("num_classes", 0) is not None
    class_names = dataset.class_names if conditional else None
    facts = picture_facts(dataset, class_names)
    if begun is not None and not allow_changes:
        refuse_other_pictures(folder, facts)
    config = complete(config, dataset)
    if not quiet and begun is None:
        _tell_about_classes(dataset, config)
    model = build_model(config)
    config = settled(config, begun)
    vae = open_codec(config, dataset)
    scaling = dataset.scaling if isinstance(dataset, LatentStore) else None
    pipeline = build_pipeline(model, class_names, vae, scaling)
    objective = build_objective(config.objective, model.config.learn_sigma)
    if objective.mask_plan is not None and len(objective.mask_plan.down) != len(model.mask_grids):
        raise UserError(
            f"objective.masks.down has {len(objective.mask_plan.down)} ranges, the model {len(model.mask_grids)} "
            "down-samplings: give one (low, high) each"
        )
    if begun is not None and not allow_changes:
        refuse_changes(begun, config, folder)

    accelerator = _build_accelerator(config)
    if vae is not None:
        vae.to(accelerator.device)
    check = _integrity_check(config, dataset, accelerator)
    order = make_order(config.data, dataset, config.seed, config.train.batch_size)

    def make_loader(start_step: int) -> Iterator[dict[str, Any]]:
        return training_loader(
            dataset,
            order=order,
            seed=config.seed,
            global_batch=config.train.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            start_step=start_step,
            micro_batches=config.train.micro_batches,
            flip=config.data.flip,
            workers=config.data.workers,
            check=None if check is None else check.raise_failure,
        )  # pyright: ignore[reportReturnType]

    def export() -> None:
        with atomic_directory(folder / "model", replace=True) as target:
            pipeline.save_pretrained(target)

    def sample(step: int) -> None:
        images, names = sample_classes(pipeline, config.samples)
        (folder / "samples").mkdir(exist_ok=True)
        save_png(grid(images, config.samples.per_class, names), folder / "samples" / f"step-{step:08d}.png")

    make_loader(0)  # numbers that do not divide are told here
    trainer = Trainer(
        folder=folder,
        config=config.train,
        seed=config.seed,
        accelerator=accelerator,
        model=model,
        objective=objective,
        make_optimizer=config.optimizer.make,
        learning_rate=config.optimizer.rate(config.train.steps),
        make_ema=lambda network: EMA(network, config.ema.decay, config.ema.warmup),
        make_loader=make_loader,
        export=export,
        callbacks=[(config.train.sample_every, sample), *(callbacks(pipeline) if callbacks else [])],
        quiet=quiet,
    )
    make_folder(folder)
    trainer.lock.acquire()  # held until `fit` ends
    try:
        trainer.restore()
        # The run's settings are replaced only now that its checkpoint fits the new ones, and if they have steps to add.
        if accelerator.is_main_process and trainer.step <= config.train.steps:
            atomic_write_text(folder / "config.yaml", to_yaml(config))
            write_record(folder, facts, preset or (read_record(folder).get("preset") if begun else None))
    except BaseException:
        trainer.lock.release()
        raise
    return trainer


def _tell_about_classes(dataset: ImageDataset | LatentStore, config: RunConfig) -> None:
    if config.model["num_classes"] is None:
        print("training an unconditional model" + ("" if dataset.class_names else ": the pictures have no classes"),
              file=sys.stderr)  # fmt: skip
        return
    empty = [name for name, count in dataset.class_counts().items() if not count]
    if empty:
        listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        print(f"{len(empty)} classes have no pictures and will not be learned: {listed}", file=sys.stderr)


def _integrity_check(
    config: RunConfig, dataset: ImageDataset | LatentStore, accelerator: Accelerator
) -> IntegrityCheck | None:
    """The check of a store's shards, done ("start") or begun ("background") as `data.verify` says."""
    if not isinstance(dataset, LatentStore) or config.data.verify == "off":
        return None
    check = dataset.integrity_check(accelerator.process_index, accelerator.num_processes).start()
    size = sum(shard.bytes for shard in dataset.manifest.shards)
    if config.data.verify == "start" or (config.data.verify == "auto" and size <= _CHECKED_AT_START):
        check.wait()
    return check


def _build_accelerator(config: RunConfig) -> Accelerator:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        # Told nothing, accelerate runs processes without a GPU as so many single ones, all in one run folder.
        cpu=processes > 1 and not torch.accelerator.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.num_processes != processes:
        raise UserError(
            f"{processes} processes were launched, but accelerate joins {accelerator.num_processes}: start the run "
            "with torchrun --nproc_per_node N -m edt_diffusion train ..., or accelerate launch after accelerate config"
        )
    return accelerator
