"""Evaluation while a run trains, as a callback of the trainer."""

from pathlib import Path

from accelerate import Accelerator

from ..config import RunConfig
from ..data import ImageDataset, LatentStore
from ..evaluation.extractors import open_extractor
from ..evaluation.in_training import MetricsDuringTraining
from ..evaluation.inputs import dataset_input
from ..evaluation.reference import features_of
from ..pipelines import ClassConditionalPipeline
from ..sampling.labels import choose_labels
from ..sampling.samples import Samples
from ..sampling.settings import parse_setting
from ..training.trainer import Callback
from ..util.errors import UserError
from .facts import picture_shape, sample_facts
from .run_pictures import RunPictures, origin, reference_input


def evaluation_callback(
    config: RunConfig,
    trained_on: ImageDataset | LatentStore,
    pipeline: ClassConditionalPipeline,
    accelerator: Accelerator,
    folder: Path,
    quiet: bool,
) -> list[Callback]:
    """The callback that measures samples while a run trains, if it is asked for.

    Raises:
        UserError: extractor, reference, labels or sampling cannot be had: told before the first step.
    """
    wanted = config.evaluation
    if not wanted.every:
        return []
    rank, world_size = accelerator.process_index, accelerator.num_processes
    extractor = open_extractor(wanted.extractor, accelerator.device)
    shape = picture_shape(pipeline)
    if wanted.reference is not None:
        side = reference_input(wanted.reference, None, shape)
        assert side is not None
    elif isinstance(trained_on, ImageDataset) and config.data.path is not None:
        side = dataset_input(trained_on, config.data.path, *origin(config, trained_on))
    elif (run := RunPictures.behind(config)) is not None:
        side = dataset_input(run.training, run.path, run.preparation, run.key)
    else:
        raise UserError("evaluation.reference is not set: a latent store holds no pictures to compare with, name some")
    pictures = side.pictures
    labels, policy = choose_labels(
        wanted.labels, wanted.samples, pipeline.class_names, pipeline.transformer.config.num_classes, wanted.seed,
        None if pictures is None else pictures.labels, None if pictures is None else pictures.class_names,
    )  # fmt: skip
    setting = parse_setting(
        {
            "guidance": wanted.guidance, "scheduler": wanted.scheduler, "steps": wanted.num_inference_steps,
            "amm": wanted.amm,
        }
    )  # fmt: skip
    batch = min(wanted.batch_size or (64 if pipeline.vae is None else 16), wanted.samples)
    samples = Samples(pipeline, setting, labels, wanted.samples, wanted.seed, batch)
    facts = sample_facts(wanted.samples, policy, wanted.seed, batch, shape)
    reference = features_of(side, extractor, quiet=quiet, rank=rank, world_size=world_size)
    call = MetricsDuringTraining(
        samples, extractor, reference, facts, accelerator, folder / "evaluation", wanted.metrics
    )
    call.check()
    return [Callback(wanted.every, call, everywhere=True)]
