"""A training run, from the pictures to the loop. Read it from top to bottom to see how data flow."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..config import RunConfig, begun_config, refuse_changes, settled, to_yaml
from ..data import ImageDataset, LatentStore, open_dataset, training_loader
from ..data.dataset import make_order
from ..data.shard_files import IntegrityCheck
from ..objectives import OBJECTIVES, MaskedTraining
from ..objectives.config import build_objective, default_masks
from ..pipelines import ClassConditionalPipeline
from ..training.ema import EMASet
from ..training.lora import without_adapters
from ..training.meters import training_flops
from ..training.pace import Pace
from ..training.parallel import make_accelerator, refuse_unsupported
from ..training.record import picture_facts, read_record, refuse_other_pictures, write_record
from ..training.trackers import build_trackers, check_trackers
from ..training.trainer import Callback, Trainer
from ..util.errors import UserError
from ..util.files import atomic_write_text, make_folder
from ..util.hardware import measured_matmul_peak
from . import budget, during, finetuning
from .evaluation_callback import evaluation_callback
from .model import (
    build_model,
    build_pipeline,
    check_masks,
    complete,
    open_codec,
    tell_about_classes,
    with_weights,
)

# Stores up to this size are hashed before the first step, larger ones beside the training.
_CHECKED_AT_START = 1 << 30
# A run of fewer operations is over before its share of the hardware's peak would tell anybody anything.
_WORTH_MEASURING = 1e14


def open_data(config: RunConfig, quiet: bool = True) -> ImageDataset | LatentStore:
    """The pictures or latents that a configuration names; see `data.open_dataset`."""
    return open_dataset(config.data, config.seed, quiet)


def build_trainer(
    config: RunConfig,
    folder: Path,
    dataset: ImageDataset | LatentStore | None = None,
    *,
    quiet: bool = False,
    allow_changes: bool = False,
    preset: str | None = None,
    callbacks: Callable[[ClassConditionalPipeline], list[Any]] | None = None,
    batch_auto: bool = False,
    max_seconds: float | None = None,
    pace: Pace | None = None,
) -> Trainer:
    """Everything `edt train` needs, from the pictures to the loop, at the step that the folder's run has reached.

    Args:
        config: the run's settings.
        folder: the run folder; made if absent. If it holds a run, its settings must be the same.
        dataset: pictures already opened; by default those of `config.data`.
        quiet: no progress on the terminal.
        allow_changes: go on with other settings or pictures than those the run began with.
        preset: name of the preset that the settings come from, kept with the run.
        callbacks: given the pipeline, returns further callbacks, as `Callback` or (every, call) pairs.
        batch_auto: choose the number of micro-batches by the memory that is free.
        max_seconds: stop and save after so long.
        pace: a budget that ends the run, and sets its learning rate where it is one of time.

    Raises:
        UserError: for anything the user can put right; nothing has been written then.
    """
    quiet = quiet or int(os.environ.get("RANK", "0")) > 0  # one process of a job speaks for all
    refuse_unsupported(config.train)
    check_trackers(config.train.trackers)
    if dataset is None:
        dataset = open_data(config, quiet)
    begun = begun_config(folder)
    conditional = dataset.class_names is not None and config.model.get("num_classes", 0) is not None
    class_names = dataset.class_names if conditional else None
    facts = picture_facts(dataset, class_names)
    if begun is not None and not allow_changes:
        refuse_other_pictures(folder, facts)
    config, source = finetuning.begin(config, begun)
    config = complete(config, dataset)
    if not quiet and begun is None:
        tell_about_classes(dataset, config)
    trained_on, held_out = during.split_for_validation(config, dataset)

    model = build_model(config)
    # A run's own config.yaml names the usual masks, whether they are in use or not.
    chosen_masks = begun is None and config.objective.masks not in (None, default_masks(config.model))
    config = settled(config, begun, validated=held_out is not None)
    check_masks(config, model, begun)
    told = finetuning.prepare(config, model, class_names, source)
    vae = open_codec(config, dataset)
    scaling = dataset.scaling if isinstance(dataset, LatentStore) else None
    told += finetuning.latent_lines(source, vae, scaling)
    if chosen_masks and config.objective.passes == "full":
        told.append("objective.masks has no effect with objective.passes=full")
    objective = build_objective(config.objective, model.config.learn_sigma)
    prediction_type = OBJECTIVES[config.objective.name].prediction_type
    # Sampled with the density of times it was trained with.
    sampled: dict[str, Any] = {"prediction_type": prediction_type, "shift": config.objective.shift or 1.0}
    pipeline = build_pipeline(model, class_names, vae, scaling, **sampled)

    accelerator = make_accelerator(config.train)
    device, processes = accelerator.device, accelerator.num_processes
    if pace is not None and processes > 1:
        raise UserError(f"a run with a budget is one of a single process, and this job has {processes}: start it alone")
    objective.joint = budget.joint_passes(config, device)
    if batch_auto:
        config = budget.fitted(config, model, accelerator)
    if begun is not None and not allow_changes:
        refuse_changes(begun, config, folder)
    _refuse_disagreement(accelerator, config, facts)
    if not quiet:
        told += budget.memory_lines(config, model, device, processes)
    if vae is not None:
        vae.to(device)
    check = _integrity_check(config, dataset, accelerator)
    make_loader = _loaders(config, trained_on, objective, model, accelerator, check)
    make_loader(0)  # numbers that do not divide are told here

    def export(target: Path, state: dict[str, Tensor] | None) -> None:
        trained = model
        if state is not None:
            like = functools.partial(finetuning.prepare, config, class_names=class_names, source=None)
            trained = with_weights(config, like, model, state)
        plain = without_adapters(trained)
        if plain is model:
            pipeline.save_pretrained(target)
        else:
            build_pipeline(plain, class_names, vae, scaling, **sampled).save_pretrained(target)
        finetuning.save_adapters(trained, target)

    evaluations = evaluation_callback(config, trained_on, pipeline, accelerator, folder, quiet)
    grids = during.SampleGrids(pipeline, config.samples, folder / "samples", write=accelerator.is_main_process)
    flops = training_flops(sum(model.multiply_adds().values()), config.train.batch_size, len(objective.passes))
    peak = None
    if flops * config.train.steps > _WORTH_MEASURING:
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]
        peak = measured_matmul_peak(device, dtype) * processes
    trainer = Trainer(
        folder=folder,
        config=config.train,
        seed=config.seed,
        accelerator=accelerator,
        model=model,
        objective=objective,
        make_optimizer=config.optimizer.make,
        learning_rate=(
            config.optimizer.rate(config.train.steps)
            if pace is None
            else pace.learning_rate(config.optimizer, config.train.steps)
        ),
        make_ema=lambda network: EMASet(network, config.ema),
        make_loader=make_loader,
        export=export,
        callbacks=[
            Callback(config.train.sample_every, grids),
            *during.validation_callback(config, held_out, objective, accelerator, model),
            *evaluations,
            *(callbacks(pipeline) if callbacks else []),
        ],
        snapshot_every=config.ema.interval(config.train.steps),
        flops_per_step=flops,
        peak_flops=peak,
        max_seconds=max_seconds,
        pace=pace,
        trackers=lambda: build_trackers(
            config.train.trackers, folder, folder.resolve().name, config.model_dump(mode="json")
        ),
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
    if not quiet:
        print(*told, sep="\n", file=sys.stderr)
    return trainer


def _loaders(
    config: RunConfig,
    dataset: ImageDataset | LatentStore,
    objective: MaskedTraining,
    model: Any,
    accelerator: Accelerator,
    check: IntegrityCheck | None,
) -> Callable[[int], Iterator[dict[str, Any]]]:
    """Makes this process's stream of micro-batches from a step on; noise and masks are drawn beside the data."""
    order = make_order(config.data, dataset, config.seed, config.train.batch_size)
    workers = config.data.workers
    if workers is None:  # a GPU would wait for the noise; a CPU has no core to spare
        workers = 0 if accelerator.device.type == "cpu" else 2
    draw = objective.drawer(config.seed, dataset.shape, model.mask_grids, model.null_label is not None)

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
            workers=workers,
            check=None if check is None else check.raise_failure,
            draw=draw,
        )  # pyright: ignore[reportReturnType]

    return make_loader


def _refuse_disagreement(accelerator: Accelerator, config: RunConfig, facts: dict[str, Any]) -> None:
    """Make sure that all processes of the job train the same thing.

    Raises:
        UserError: settings or pictures differ, as where machines see different folders.
    """
    told = hashlib.sha256((to_yaml(config) + json.dumps(facts, sort_keys=True)).encode()).hexdigest()
    if len(set(gather_object([told]))) > 1:
        raise UserError(
            "the processes of this job have different settings or pictures: give all the same command, and put the "
            "run folder and the data where every machine sees them"
        )


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
