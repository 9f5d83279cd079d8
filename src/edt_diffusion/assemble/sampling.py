"""`edt sample`, from what a user names to pictures. Read it from top to bottom to see what is opened when."""

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..data.encoding_job import default_device, processes
from ..pipelines import ClassConditionalPipeline
from ..pipelines.acceleration import choose_acceleration
from ..pipelines.guidance import Guidance, parse_schedule
from ..pipelines.loading import load_pipeline
from ..pipelines.modulation import choose_modulation
from ..pipelines.schedulers import prediction_type_of
from ..sampling.job import Counter, Job, read_job
from ..sampling.notes import Notes, command_words, shareable_name
from ..sampling.plan import Plan, plan_classes, plan_labels
from ..sampling.processes import helpers, share_threads
from ..sampling.samples import Samples
from ..sampling.settings import SamplingSetting, parse_setting
from ..sampling.sheets import beside, write_grid, write_sheet
from ..sampling.stopping import Stopped, stoppable
from ..sampling.trajectory import write_trajectory
from ..sampling.writers import WRITERS
from ..sampling.writers.png import PngWriter
from ..util.errors import UserError
from ..util.files import make_folder
from ..util.lock import Lock
from ..util.lookup import lookup
from ..util.progress import CountProgress
from .facts import model_facts, picture_shape

__all__ = ["Opened", "Outcome", "Request", "Stopped", "class_list", "open_job", "sample"]

# Guidance of a model with classes, pictures of a class, and pictures computed at once when nobody says otherwise.
GUIDANCE, EACH, BATCH = 2.0, 8, 64


@dataclass
class Request:
    """What `edt sample` was asked for.

    Attributes:
        model: run folder, diffusers folder or hub name.
        classes: class names or numbers separated by commas; None is every class. Not with `labels`.
        labels: "balanced", "random" or a file, see `plan_labels`; None is `number` of each class.
        number: pictures of a class, or in all with `labels`; None is 8 of a class, or see `plan_labels`.
        sampling: fields of `SamplingSetting` but for the modulation.
        acceleration: "exact", "balanced" or "fast": what `sampling` leaves open of scheduler, steps and cache.
        amm, amm_formula, amm_radius: see `choose_modulation`.
        seed: picture i of a class, or i of all with `labels`, has the seed `image_seed(seed, i)`.
        seeds: these very seeds, for each class; not with `number` or `labels`.
        batch: pictures computed at once; None chooses, or goes on with that of a begun job.
        to: a name of `sampling.writers.WRITERS`.
        out: folder of the pictures.
        processes: how many to start here.
        trajectory: also make a film of a few pictures.
        device: where to compute; None is the GPU if there is one.
        quiet: no progress.
    """

    model: str
    classes: str | None = None
    labels: str | None = None
    number: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    acceleration: str | None = None
    amm: str = "saved"
    amm_formula: str = "exp"
    amm_radius: str | None = None
    seed: int = 0
    seeds: Sequence[int] | None = None
    batch: int | None = None
    to: str = "png"
    out: Path = Path("samples")
    processes: int = 1
    trajectory: bool = False
    device: str | None = None
    quiet: bool = True


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        count: pictures in the folder.
        found: how many of them were there before.
        seconds: that making the others took.
        written: the folder of PNG files, or the other files.
        pictures: the PNG files; empty in other forms.
        grid, sheet, trajectory: pictures beside the folder; None for those that were not made.
        facts: what the job's file says.
    """

    count: int
    found: int
    seconds: float
    written: list[Path]
    pictures: list[Path]
    grid: Path
    sheet: Path | None
    trajectory: Path | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Opened:
    """The parts of a job."""

    pipeline: ClassConditionalPipeline
    samples: Samples
    plan: Plan
    job: Job


def sample(request: Request) -> Outcome | None:
    """Make the pictures that are missing; None on processes other than the main one of several.

    Raises:
        UserError: for anything the user can put right.
        Stopped: a signal came.
    """
    rank, world_size = processes()
    lookup(WRITERS, request.to, "form")
    if request.processes > 1 and world_size > 1:
        raise UserError(f"--processes {request.processes}: this is one of {world_size} processes already: leave it out")
    if request.processes < 1:
        raise UserError(f"--processes {request.processes}: expected at least 1")
    if request.out.suffix in (".npz", ".parquet", ".png"):
        raise UserError(f"--out {request.out} names a file: expected a folder, such as {request.out.with_suffix('')}")
    if request.processes > 1:
        share_threads(request.processes)
    if rank:
        opened = open_job(request)
        opened.job.wait_until_begun()
        mine = range(rank, opened.plan.batches, world_size)
        opened.job.compute(opened.samples, opened.job.writer.missing(mine))
        return None
    opened = open_job(request)
    opened.job.writer.prepare()
    make_folder(request.out)
    with Lock(request.out, f"another process samples into {request.out}: wait for it, or choose another --out"):
        opened.job.begin(alone=world_size == 1)
        with stoppable(opened.job):
            return _sample(request, opened, world_size)


def open_job(request: Request) -> Opened:
    """Load the model and say which pictures are to be made, and how.

    Raises:
        UserError: for anything the user can put right.
    """
    pipeline = load_pipeline(request.model)
    model = model_facts(pipeline, shareable_name(request.model))
    device = _device(request.device)
    there = read_job(request.out) or {}
    setting = _setting(request, pipeline)
    choose_modulation(
        pipeline.transformer, request.amm, request.amm_formula, request.amm_radius, setting.guidance
    )  # fmt: skip
    plan = _plan(request, pipeline, there.get("batch"))
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    samples = Samples(pipeline, setting, plan.labels, len(plan), request.seed, plan.batch, seeds=plan.seeds)
    shape = picture_shape(pipeline)
    facts = {
        "to": request.to,
        "model": model,
        "sampling": samples.facts(),
        "seed": None if request.seeds is not None else request.seed,
        "labels": plan.policy,
        "classes": [plan.class_names[label] for label in plan.by_class() if label is not None]
        if plan.policy == "each class"
        else None,
        "batch": plan.batch,
        "size": list(shape),
        "device": torch.device(device).type,
    }
    notes = Notes(model, facts["sampling"], plan.batch, command_words(model["from"], samples, facts["sampling"]))
    writer = WRITERS[request.to](request.out, plan, shape, notes)
    return Opened(pipeline, samples, plan, Job(request.out, facts, plan, writer))


def _sample(request: Request, opened: Opened, world_size: int) -> Outcome:
    job, plan, samples = opened.job, opened.plan, opened.samples
    mine = range(0, plan.batches, world_size)
    missing = job.writer.missing(mine)
    lacking = job.writer.waiting()
    begun = time.perf_counter()
    if len(missing) == 1 and lacking:  # nothing to count: the bar of the pipeline's steps, in terminals only
        opened.pipeline.set_progress_bar_config(disable=request.quiet or None, leave=False)
    with CountProgress("sampling", "pictures", request.quiet or len(missing) <= 1) as progress:
        workers = min(request.processes, len(missing))
        counter = Counter(job, len(plan) - lacking, workers > 1 or world_size > 1, progress)
        if workers > 1:
            shares = [missing[turn::workers] for turn in range(workers)]
            with helpers(
                _help, [(replace(request, quiet=True), turn, shares[turn]) for turn in range(1, workers)]
            ) as up:
                job.compute(samples, shares[0], counter)
                job.wait(progress, up)
            left = job.writer.missing(missing)
            if left:
                print("another process of the job has stopped; its pictures are made here", file=sys.stderr)
            job.compute(samples, left, counter)
        else:
            job.compute(samples, missing, counter)
            job.wait(progress)
    seconds = time.perf_counter() - begun if lacking else 0.0
    written = job.finish()
    opened.pipeline.set_progress_bar_config(disable=True)
    grid, sheet, film = (beside(request.out, name) for name in ("grid.png", "sheet.png", "trajectory.gif"))
    whole = write_grid(plan, job.writer.picture, grid)
    if not whole:
        write_sheet(plan, job.writer.picture, sheet)
    if request.trajectory:
        write_trajectory(samples, plan, film)
    pictures = job.writer.files() if isinstance(job.writer, PngWriter) else []
    return Outcome(
        len(plan), len(plan) - lacking, seconds, written, pictures, grid,
        None if whole else sheet, film if request.trajectory else None, job.facts,
    )  # fmt: skip


def _help(request: Request, number: int, batches: list[int]) -> None:
    """A process that the main one has started: makes its share of the batches."""
    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    os.environ.setdefault("LOCAL_RANK", str(number))  # its GPU, where there are several
    share_threads(request.processes)
    try:
        opened = open_job(request)
        opened.job.compute(opened.samples, batches)
    except UserError as error:
        print(f"process {number}: {error}", file=sys.stderr)
        sys.exit(2)


def _setting(request: Request, pipeline: ClassConditionalPipeline) -> SamplingSetting:
    fields = dict(request.sampling)
    unconditional = pipeline.transformer.config.num_classes is None
    fields.setdefault("guidance", 1.0 if unconditional else GUIDANCE)
    if request.acceleration is not None:
        chosen = choose_acceleration(request.acceleration, prediction_type_of(pipeline.scheduler))
        if fields.get("scheduler") is None:
            fields["scheduler"] = chosen.scheduler
            fields.setdefault("steps", chosen.steps)
            schedule = parse_schedule(fields.get("guidance_schedule", "constant"))
            fields.setdefault("cache", chosen.cache_for(Guidance(fields["guidance"], schedule).always_doubled))
    return parse_setting(fields)


def _plan(request: Request, pipeline: ClassConditionalPipeline, begun: int | None) -> Plan:
    """Which pictures; `begun` is the batch of the job in the folder."""
    count = pipeline.transformer.config.num_classes
    names = pipeline.class_names or [str(number) for number in range(count or 0)]
    if request.labels is not None:
        for given, option in ((request.classes, "--classes"), (request.seeds, "--seeds")):
            if given is not None:
                raise UserError(f"--labels {request.labels} says which pictures: leave {option} out")
        plan = plan_labels(
            request.labels, request.number, names, count, pipeline.resolve_labels, batch=1, seed=request.seed
        )  # fmt: skip
    else:
        wanted: Any = None if request.classes is None else class_list(request.classes, pipeline.class_names or [])
        if wanted == []:
            raise UserError(f"--classes {request.classes!r} names no class: give names or numbers, separated by commas")
        rows = pipeline.resolve_labels(wanted if wanted is not None or count is None else list(range(count)))
        rows = None if rows is None else list(dict.fromkeys(rows))
        if request.seeds is not None and request.number not in (None, len(request.seeds)):
            raise UserError(f"--seeds names {len(request.seeds)} seeds, -n {request.number}: leave -n out")
        each = request.number or EACH if request.seeds is None else len(request.seeds)
        plan = plan_classes(rows, each, names, batch=1, seed=request.seed, seeds=request.seeds)
    return replace(plan, batch=request.batch or begun or min(BATCH, len(plan)))


def class_list(text: str, names: list[str]) -> list[str]:
    """Split at commas, but keep together what is the name of a class with commas in it."""
    parts = [part.strip() for part in text.split(",")]
    out: list[str] = []
    while parts:
        joined = [", ".join(parts[:end]) for end in range(len(parts), 1, -1)]
        spaceless = {re.sub(r"\s*,\s*", ", ", name): name for name in names}
        match = next((end for end, name in zip(range(len(parts), 1, -1), joined, strict=True) if name in spaceless), 1)
        out.append(spaceless.get(", ".join(parts[:match]), parts[0]))
        parts = parts[match:]
    return [name for name in out if name]


def _device(name: str | None) -> str:
    wanted = name or (default_device() if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--device {name} cannot be used ({reason}): expected such as cpu or cuda:0") from None
    return wanted
