"""An evaluation, from what a user names to results. Read it from top to bottom to see what is opened when."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from ..data.encoding_job import default_device, processes
from ..evaluation.adm_npz import SampleNpzWriter, StatisticsOrigin, write_statistics_npz
from ..evaluation.digests import digest_of
from ..evaluation.extractors import Extractor, open_extractor
from ..evaluation.inputs import Input, open_input
from ..evaluation.judging import JudgeSettings, Judging
from ..evaluation.measure import choose_metrics, left_out, possible_metrics
from ..evaluation.metrics import MetricSettings
from ..evaluation.parts import Gathered
from ..evaluation.pixels import as_source
from ..evaluation.reference import Known, features_of
from ..evaluation.report import write_tables
from ..evaluation.result import AS_FOUND, SHARED, Result
from ..evaluation.sweep import Evaluation, Keep
from ..pipelines.loading import load_pipeline
from ..sampling.labels import LabelPolicy, choose_labels
from ..sampling.samples import Samples
from ..sampling.settings import parse_sweep
from ..util.errors import UserError
from .facts import model_facts, picture_shape, sample_facts
from .run_pictures import RunPictures, reference_input

# What is sampled when nobody says otherwise: enough for small extractors; published figures take 50,000.
SAMPLES = 5000
# From so many bytes on it is told what an evaluation takes of the disk.
_MUCH = 1 << 30


@dataclass
class Request:
    """What `edt evaluate` was asked for.

    Attributes:
        what: a model (run folder, diffusers folder, hub name), pictures, or an `.npz`.
        sweep: axes, such as "guidance=1,2".
        sampling: fields of `SamplingSetting` for what the sweep does not vary.
        reference: real pictures or their statistics; None takes the pictures that the run was trained on.
        training: what copies are looked for in and a judge is trained on; None as for the reference.
        extractor: as `open_extractor` takes it.
        samples: how many to make, or to take of pictures.
        labels: the policy; see `choose_labels`.
        seed: of the samples.
        batch: pictures computed at once; None chooses.
        metrics: names separated by commas, "all", or None.
        settings: of the metrics.
        judge: how to judge, or None.
        size: (height, width) that pictures are brought to.
        out: the folder of results; None makes one beside the model.
        keep: what stays on the disk; see `sweep.Evaluation`.
        save_samples, save_statistics: `.npz` files to write, in the layout of ADM's evaluator.
        device: where to compute; None is the GPU if there is one.
        quiet: no progress.
    """

    what: str
    sweep: Sequence[str] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    training: str | None = None
    extractor: str = "inception"
    samples: int | None = None
    labels: str = "auto"
    seed: int = 0
    batch: int | None = None
    metrics: str | None = None
    settings: MetricSettings = field(default_factory=MetricSettings)
    judge: JudgeSettings | None = None
    size: tuple[int, int] | None = None
    out: Path | None = None
    keep: Keep = "features"
    save_samples: Path | None = None
    save_statistics: Path | None = None
    device: str | None = None
    quiet: bool = True


@dataclass
class Outcome:
    """What came of it; nothing on processes other than the main one.

    Attributes:
        results: one for each setting.
        out: their folder.
        written: the files and folders that were written.
        notes: which metrics were left out, and why.
    """

    results: list[Result]
    out: Path
    written: list[Path]
    notes: list[str]


def is_model(what: str) -> bool:
    """Whether a name is that of a model, and not of pictures."""
    path = Path(what).expanduser()
    if path.is_dir():
        begun = (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()
        return begun or any((path / name).is_file() for name in ("model_index.json", "model/model_index.json"))
    return not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", what) is not None and path.suffix != ".npz"


def evaluate(request: Request) -> Outcome:
    """Do what was asked for.

    Raises:
        UserError: for anything the user can put right.
    """
    settings, _ = parse_sweep(request.sweep, request.sampling)  # mistakes are told before anything is opened
    choose_metrics(request.metrics)
    if request.labels not in get_args(LabelPolicy):
        raise UserError(f"label policy {request.labels!r}: expected {', '.join(get_args(LabelPolicy))}")
    for path in (request.save_samples, request.save_statistics):
        if path is not None and len(settings) > 1:
            raise UserError(f"{path} holds one setting, and the sweep has {len(settings)}: leave the file out")
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {path.parent}")
    if is_model(request.what):
        if request.size is not None:
            raise UserError(f"{request.what} is a model, and --size is for pictures: leave it out")
    else:
        if request.labels != "auto":
            raise UserError(f"{request.what} is no model, and --labels is about how a model is sampled: leave it out")
        if request.sweep or request.sampling:
            given = next(iter([*(word.partition("=")[0] for word in request.sweep), *request.sampling]))
            raise UserError(f"{request.what} is no model, and {given} is about how a model is sampled: leave it out")
        return _evaluate_pictures(request)
    return _evaluate_model(request, settings)


def _evaluate_model(request: Request, settings: list[Any]) -> Outcome:
    rank, world_size = processes()
    device = _device(request.device)
    pipeline = load_pipeline(request.what)
    pipeline.set_progress_bar_config(disable=True)
    model = model_facts(pipeline, request.what)
    pipeline.to(device)
    extractor = open_extractor(request.extractor, device)
    needed = request.reference is None or (request.judge is not None and request.training is None)
    run = RunPictures.of(request.what) if needed else None
    shape = picture_shape(pipeline)
    reference = reference_input(request.reference or (request.training if run is None else None), run, shape)
    count = request.samples or SAMPLES
    names, classes = pipeline.class_names, pipeline.transformer.config.num_classes
    pictures = None if reference is None else reference.pictures
    labels, policy = choose_labels(
        request.labels, count, names, classes, request.seed,
        None if pictures is None else pictures.labels, None if pictures is None else pictures.class_names,
    )  # fmt: skip
    batch = request.batch or min(count, 64 if pipeline.vae is None else 16)
    plan = [Samples(pipeline, setting, labels, count, request.seed, batch) for setting in settings]
    known = _known(reference, extractor, request.quiet, rank, world_size)
    asked = (extractor, shape[:2], known and known.features, choose_metrics(request.metrics), count, request.settings)
    metrics, notes = possible_metrics(*asked), left_out(*asked)
    judging = None if rank else _judging(request, run, shape, names, extractor, labels is not None)
    facts = sample_facts(count, policy, request.seed, batch, shape)
    key = digest_of([model["transformer_sha256"], extractor.identity(), known and known.sha256, facts])
    evaluation = Evaluation(
        request.out or Path(request.what if Path(request.what).is_dir() else "results") / "evaluation" / key[:8],
        extractor, known, facts, model, metrics, request.settings, labels,
        judging=judging, needs_pictures=request.judge is not None or request.save_samples is not None,
        keep=request.keep, quiet=request.quiet, rank=rank, world_size=world_size, device=str(device),
    )  # fmt: skip
    if evaluation.disk_bytes(len(plan)) > _MUCH and not (request.quiet or rank):
        print(
            f"features and samples take about {evaluation.disk_bytes(len(plan)) / 2**30:.1f} GiB in {evaluation.out} "
            "while they are needed (see --keep)", file=sys.stderr,
        )  # fmt: skip
    results = evaluation.run(plan)
    if rank:
        return Outcome([], evaluation.out, [], [])
    written = [evaluation.out]
    if request.save_samples is not None or request.save_statistics is not None:
        gathered = evaluation.gather(evaluation.parts(plan[-1]), plan[-1].make, "samples")
        assert gathered is not None
        written += _save(request, gathered, gathered.extras.get("pictures"), labels, extractor)
    evaluation.tidy(plan)
    return Outcome(results, evaluation.out, written, notes + evaluation.notes)


def _evaluate_pictures(request: Request) -> Outcome:
    rank, world_size = processes()
    device = _device(request.device)
    side = open_input(request.what, size=request.size, limit=request.samples)
    if side.pictures is None:
        raise UserError(f"{request.what} holds statistics only: give them as --reference, and pictures to evaluate")
    extractor = open_extractor(request.extractor, device)
    shape = side.pictures.shape
    reference = reference_input(request.reference or request.training, None, shape)
    known = _known(reference, extractor, request.quiet, rank, world_size)
    measured = known is not None or request.save_statistics is None or request.metrics is not None
    asked = (
        extractor, shape[:2], known and known.features, choose_metrics(request.metrics), len(side.pictures),
        request.settings,
    )  # fmt: skip
    metrics, notes = (possible_metrics(*asked), left_out(*asked)) if measured else (None, [])
    here = features_of(side, extractor, quiet=request.quiet, rank=rank, world_size=world_size)
    if rank:
        return Outcome([], Path(), [], [])
    labels = side.pictures.labels
    judging = _judging(request, None, shape, side.pictures.class_names, extractor, labels is not None)
    facts = {**here.facts, "count": len(side.pictures), "labels": AS_FOUND, "channels": shape[2]}
    name = re.sub(r"[^\w.+-]", "_", Path(request.what).stem) or "pictures"
    name = f"{name}_" if f"{name}.json" == SHARED else name
    key = digest_of([here.sha256, extractor.identity(), known and known.sha256])
    evaluation = Evaluation(
        request.out or Path("results") / f"{name}-{key[:8]}",
        extractor, known, facts, None, metrics, request.settings, labels, judging=judging, quiet=request.quiet,
        device=str(device),
    )  # fmt: skip
    written: list[Path] = []
    gathered = Gathered(here.features, 0.0, here.sha256, {})
    results = []
    if measured:
        evaluation.begin()
        found = evaluation.known(name, here.sha256)
        if found is None:
            found = evaluation.result(Path(request.what).name or "pictures", name, gathered, side.pictures)
            evaluation.save(found, name)
        results = [found]
        write_tables(evaluation.out, evaluation.all_results())
        written.append(evaluation.out)
    written += _save(request, gathered, side.pictures, labels, extractor)
    return Outcome(results, evaluation.out, written, notes)


def _device(name: str | None) -> str:
    wanted = name or (default_device() if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--device {name} cannot be used ({reason}): expected such as cpu or cuda:0") from None
    return wanted


def _known(side: Input | None, extractor: Extractor, quiet: bool, rank: int, world_size: int) -> Known | None:
    """The features of the reference, which the processes compute together and all get."""
    return None if side is None else features_of(side, extractor, quiet=quiet, rank=rank, world_size=world_size)


def _judging(
    request: Request,
    run: "RunPictures | None",
    shape: tuple[int, int, int],
    class_names: list[str] | None,
    extractor: Extractor,
    labelled: bool,
) -> Judging | None:
    if request.judge is None:
        return None
    held_out, mirrored = None, False
    path = request.training or (request.reference if run is None else None)
    if path is not None:
        if str(path).endswith(".npz"):
            raise UserError(f"a judge needs pictures with class names, and {path} has none: name them by --training")
        side = open_input(path, size=shape[:2], channels=1 if shape[2] == 1 else 3)
        assert side.pictures is not None
        training = side.pictures.dataset  # pyright: ignore[reportAttributeAccessIssue]
    elif run is not None:
        training, held_out, mirrored = run.training, run.held_out, run.mirrored
    else:
        raise UserError("--judge needs the pictures that the model was trained on: name them by --training")
    return Judging(request.judge, training, held_out, mirrored, class_names, extractor, request.quiet, labelled)


def _save(
    request: Request, gathered: Gathered, pictures: Any, labels: np.ndarray | None, extractor: Extractor
) -> list[Path]:
    """Write the `.npz` files that were asked for."""
    written = []
    if request.save_samples is not None:
        count = len(gathered.features)
        first = as_source(pictures).images([0])[0]
        with SampleNpzWriter(request.save_samples, count, first.shape[:2]) as file:
            for start in range(0, count, 256):
                part = np.arange(start, min(start + 256, count))
                images = as_source(pictures).images(part)
                images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
                file.append(images, None if labels is None else labels[part])
        written.append(request.save_samples)
    if request.save_statistics is not None:
        features, origin = gathered.features, None
        if features.count is not None:  # not those of a file that does not say what they are of
            origin = StatisticsOrigin(
                extractor.name, extractor.sha256, extractor.preprocessing, features.count, gathered.pictures_sha256
            )
        write_statistics_npz(request.save_statistics, features.statistics, features.spatial, origin)
        written.append(request.save_statistics)
    return written
