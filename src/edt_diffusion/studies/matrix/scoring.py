"""Samples of a matrix and their scores, by the code of `edt evaluate`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...assemble.facts import model_facts, picture_shape, sample_facts
from ...assemble.run_pictures import RunPictures, reference_input
from ...config import RunConfig
from ...data.encoding_job import default_device
from ...evaluation.extractors import open_extractor
from ...evaluation.extractors.base import Extractor, Features
from ...evaluation.inputs import open_input
from ...evaluation.measure import measure, possible_metrics
from ...evaluation.metrics import MetricSettings
from ...evaluation.reference import Known, features_of
from ...evaluation.result import environment
from ...evaluation.sweep import Evaluation
from ...pipelines.loading import load_pipeline
from ...sampling.labels import choose_labels
from ...sampling.samples import Samples
from ...util.errors import UserError
from ...util.files import atomic_write_json
from .folder import MatrixFolder, Run
from .plan import Matrix


class ResizedExtractor(Extractor):
    """An extractor that sees every picture at one size, samples and real ones alike.

    Args:
        inner: the extractor.
        size: height and width; pictures of another size are brought to it by bicubic interpolation, smoothed where
            they shrink, and rounded to uint8.
    """

    def __init__(self, inner: Extractor, size: int) -> None:
        self.inner, self.size = inner, size
        self.name, self.sha256, self.dimensions = inner.name, inner.sha256, inner.dimensions
        self.preprocessing = f"bicubic to {size}x{size}; {inner.preprocessing}"

    def __call__(self, images: Tensor) -> Features:
        if tuple(images.shape[2:]) != (self.size, self.size):
            wide = torch.nn.functional.interpolate(
                images.float(), (self.size, self.size), mode="bicubic", antialias=True
            )
            images = wide.round().clamp(0, 255).to(torch.uint8)
        return self.inner(images)

    def to(self, device: torch.device | str) -> "ResizedExtractor":
        self.inner = self.inner.to(device)
        return self


def _device() -> str:
    return default_device() if torch.cuda.is_available() else "cpu"


def open_extractor_of(matrix: Matrix, device: str) -> Extractor:
    """The extractor of a matrix, with its resize."""
    inner = open_extractor(matrix.extractor, device)
    return inner if matrix.score_size is None else ResizedExtractor(inner, matrix.score_size)


def reference_of(matrix: Matrix, config: RunConfig, shape: tuple[int, int, int], extractor: Extractor) -> Known:
    """The features of the real pictures that samples are compared with.

    Raises:
        UserError: nothing names them, or they cannot be read.
    """
    run = RunPictures.behind(config) if matrix.reference is None else None
    side = reference_input(matrix.reference, run, shape)
    if side is None:
        raise UserError("what is trained on holds no pictures to compare samples with: name some as the reference")
    return features_of(side, extractor)


def prepare(matrix: Matrix, folder: MatrixFolder) -> None:
    """Look at the real pictures, before anything is trained: mistakes show at once.

    Raises:
        UserError: extractor, reference, ceiling or metrics cannot be had.
    """
    if not matrix.images:
        return
    config = matrix.config(matrix.arms[0], matrix.seeds[0], folder.base)
    extractor = open_extractor_of(matrix, _device())
    shape = _shape(config)
    if shape is None:
        return  # a store tells it when its autoencoder is loaded, to sample
    known = reference_of(matrix, config, shape, extractor)
    names = None if matrix.metrics is None else list(matrix.metrics)
    possible_metrics(extractor, shape[:2], known.features, names, matrix.images, MetricSettings())
    if matrix.ceiling is not None and not folder.ceiling.is_file():
        _score_ceiling(matrix, folder, shape, known, extractor)
    atomic_write_json(folder.prepared, {"extractor": extractor.identity(), "reference": known.facts})


def _score_ceiling(
    matrix: Matrix, folder: MatrixFolder, shape: tuple[int, int, int], known: Known, extractor: Extractor
) -> None:
    names = None if matrix.metrics is None else list(matrix.metrics)
    assert matrix.ceiling is not None
    side = open_input(matrix.ceiling, size=shape[:2], channels=1 if shape[2] == 1 else 3)
    if side.pictures is not None and len(side.pictures) > matrix.images:  # distances depend on how many are compared
        side = open_input(matrix.ceiling, size=shape[:2], channels=1 if shape[2] == 1 else 3, limit=matrix.images)
    held_out = features_of(side, extractor)
    numbers, warnings = measure(held_out.features, known.features, extractor, names, MetricSettings())
    atomic_write_json(
        folder.ceiling,
        {
            "metrics": numbers,
            "pictures": held_out.facts,
            "reference": known.facts,
            "extractor": extractor.identity(),
            "warnings": warnings,
        },
    )


def _shape(config: RunConfig) -> tuple[int, int, int] | None:
    size = config.data.size
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, config.data.channels


def score(matrix: Matrix, folder: MatrixFolder, run: Run, quiet: bool = True) -> None:
    """Sample and score every point and variant of a run that is not there yet.

    Raises:
        UserError: a point's weights are gone, or sampling or scoring cannot be done.
    """
    device = _device()
    extractor = open_extractor_of(matrix, device)
    config = matrix.config(matrix.arm(run.arm), run.seed, folder.base)
    known: Known | None = None
    for point in dict.fromkeys(point for point, _ in folder.missing_scores(matrix, run)):
        source = folder.point(run, point)
        pipeline = load_pipeline(source)
        pipeline.set_progress_bar_config(disable=True)
        facts = json.loads((source / "point.json").read_text("utf-8"))
        model = model_facts(pipeline, str(source))
        pipeline.to(device)
        shape = picture_shape(pipeline)
        known = known or reference_of(matrix, config, shape, extractor)
        pictures = known.pictures
        labels, policy = choose_labels(
            matrix.labels, matrix.images, pipeline.class_names, pipeline.transformer.config.num_classes,
            matrix.sample_seed, None if pictures is None else pictures.labels,
            None if pictures is None else pictures.class_names,
        )  # fmt: skip
        batch = min(matrix.images, matrix.batch or (64 if pipeline.vae is None else 16))
        wanted = [variant for variant in matrix.variants if not folder.score(run, point, variant).is_file()]
        plan = [
            Samples(pipeline, variant.setting(), labels, matrix.images, matrix.sample_seed, batch)
            for variant in wanted
        ]  # fmt: skip
        evaluation = Evaluation(
            folder.evaluation(run, point), extractor, known,
            sample_facts(matrix.images, policy, matrix.sample_seed, batch, shape), model, matrix.metrics,
            labels=labels, keep=matrix.keep, quiet=quiet, device=device,
        )  # fmt: skip
        results = evaluation.run(plan)
        for variant, result in zip(wanted, results, strict=True):
            told = {
                "arm": run.arm, "seed": run.seed, "point": point, "variant": variant.name, **_of_point(facts),
                "metrics": {name: found["value"] for name, found in result.metrics.items()},
                "details": result.metrics,
                "seconds_per_image": result.seconds_per_image,
                "sampling": result.manifest["sampling"],
                "samples": result.manifest["samples"],
                "warnings": result.warnings,
                "environment": environment(device),
            }  # fmt: skip
            atomic_write_json(folder.score(run, point, variant), told)
        evaluation.tidy(plan)


def _of_point(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "point"}


def pictures_of(folder: MatrixFolder, matrix: Matrix, run: Run, point: float, variant: str) -> np.ndarray | None:
    """Samples of a cell, uint8 (N, H, W, C), if they were kept."""
    told = json.loads(folder.score(run, point, _variant(matrix.variants, variant)).read_text("utf-8"))
    wanted = told["samples"]["sha256"]
    for facts in sorted(folder.evaluation(run, point).glob("features/*/whole/facts.json")):
        kept: Path = facts.parent / "extra_pictures.npy"
        if kept.is_file() and json.loads(facts.read_text("utf-8")).get("pictures_sha256") == wanted:
            return np.load(kept, mmap_mode="r", allow_pickle=False)
    return None


def _variant(variants: Iterable[Any], name: str) -> Any:
    return next(variant for variant in variants if variant.name == name)
