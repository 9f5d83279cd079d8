"""A quality table: its matrix of trainings is run, and the page is laid out from what came of it."""

import json
import os
from pathlib import Path

import torch

from ...data.shard_files import cache_folder
from ...evaluation.extractors.inception_weights import ENVIRONMENT, FILE
from ...util.errors import UserError
from ...util.files import atomic_write_json, make_folder
from ..matrix import Arm, Budget, Matrix, Results, Variant, run_matrix
from .base import Base, choose_base
from .drawing import draw_bars, draw_losses, draw_pictures, draw_variants
from .layout import interval, lay_out, metric_title
from .page import Page
from .request import Request
from .speed import Speeds, compare, device_for
from .study import Study, settled

DEFAULT_BUDGET = "10m"
# Training and scoring is done in this folder of the page's.
MATRIX, SPEED, FIGURE = "matrix", "speed.json", "figure.png"
# From so many seconds or steps on, scores take so many samples; the paper's 50,000 for trainings like its own.
_IMAGES = ((0.0, 0, 500), (180.0, 1_000, 1000), (1800.0, 10_000, 5000), (6 * 3600.0, 200_000, 50_000))
_LONG = (6 * 3600.0, 200_000)  # sampled as the paper does
_PICTURES = 48
_SCORED_AT_LEAST = 32  # pixels; what networks in TorchScript files are made for


def effort(budget: Budget, batch_size: int) -> tuple[float | None, int | None]:
    """Seconds or steps of a training; the other one is None."""
    return (budget.amount, None) if budget.timed else (None, budget.steps(batch_size))


def default_images(seconds: float | None, steps: int | None) -> int:
    """Samples of each score that are in proportion to the training."""
    fitting = [n for least, few, n in _IMAGES if (seconds >= least if seconds is not None else (steps or 0) >= few)]
    return fitting[-1]


def default_extractor() -> str:
    """FID's Inception if its weights are on this machine, else the pixels themselves."""
    named = os.environ.get(ENVIRONMENT)
    folders = (cache_folder() / "weights", Path(torch.hub.get_dir(), "checkpoints"))
    return "inception" if named or any((folder / FILE).is_file() for folder in folders) else "pixels"


def build_matrix(study: Study, base: Base, request: Request, budget: Budget) -> Matrix:
    """The trainings and samplings of a study.

    Raises:
        UserError: a setting that does not fit.
    """
    seconds, steps = effort(budget, base.config().train.batch_size)
    long = seconds >= _LONG[0] if seconds is not None else (steps or 0) >= _LONG[1]
    common = {"scheduler": "ddpm", "steps": 250} if long else {"scheduler": "ddim", "steps": 25}
    arms = tuple(
        Arm(arm.name, arm.title, {**base.model(arm.backbone), **settled(arm.settings, base)}) for arm in study.arms
    )
    variants = tuple(
        Variant(each.name, each.title, {**common, **settled(each.sampling, base)}) for each in study.variants
    )
    if study.single:
        images, extractor, metrics, keep = _PICTURES, "pixels", ("fid",), "pictures"
    else:
        images, extractor, metrics, keep = request.images or default_images(seconds, steps), None, None, "features"
        images = images if study.metrics else 0
    extractor = extractor or request.extractor or default_extractor()
    custom = extractor.startswith("torchscript=") or Path(extractor).suffix in (".ts", ".pt", ".pth", ".jit")
    return Matrix(
        base=base.source,
        arms=arms,
        budget=budget,
        settings=base.settings,
        variants=variants,
        seeds=tuple(range(1 if study.single else request.seeds)),
        points=study.points,
        images=images,
        extractor=extractor,
        score_size=_SCORED_AT_LEAST if custom and base.side < _SCORED_AT_LEAST else None,
        metrics=metrics,
        reference=request.reference,
        labels="balanced",
        keep=keep,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def reproduce_study(name: str, study: Study, request: Request) -> Page:
    """Run a study as far as it goes, and lay out its page. Run again to go on.

    Raises:
        UserError: for anything the user can put right.
    """
    budget = Budget.parse(request.budget or DEFAULT_BUDGET)
    if request.seeds < 1:
        raise UserError(f"--seeds {request.seeds}: expected at least 1")
    # The batch, by which images become steps, does not depend on the size.
    first = choose_base(request, *effort(budget, 64), doubled=study.doubled)
    base = choose_base(request, *effort(budget, first.config().train.batch_size), doubled=study.doubled)
    matrix = build_matrix(study, base, request, budget)
    if request.amm_blocks and not study.places_amm():
        raise UserError(f"--amm-blocks {request.amm_blocks}: {name} does not place AMM by it: leave it out")
    make_folder(request.out)
    results = run_matrix(matrix, request.out / MATRIX, request.processes, request.threads, request.quiet)
    speeds, untimed = None, []
    if study.speed and not results.stopped:
        try:
            speeds = measured_speeds(study, base, matrix, request)
        except torch.OutOfMemoryError:
            untimed = ["Speeds are not there: the arms do not fit into this device's memory beside one another."]
    page = lay_out(name, study, base, matrix, results, speeds)
    page.notes = [*page.notes, *untimed]
    page.figure = draw(study, base, matrix, results, request.out)
    return page


def measured_speeds(study: Study, base: Base, matrix: Matrix, request: Request) -> Speeds:
    """The speeds of the arms on this machine; those that were measured before for the same arms and device.

    Raises:
        torch.OutOfMemoryError: not even one picture of each arm fits.
    """
    device = device_for(request.device)
    configs = {}
    told = {
        "sample_size": base.input_side, "in_channels": base.pictures.channels, "num_classes": base.pictures.classes,
    }  # fmt: skip
    for arm in matrix.arms:
        settings = {**arm.settings, **{f"model.{name}": value for name, value in told.items()}}
        configs[arm.name] = base.config(settings)
    question = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "configs": {name: config.model_dump(mode="json") for name, config in configs.items()},
    }
    question = json.loads(json.dumps(question))
    path = request.out / SPEED
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept.get("question") == question:
            return Speeds.of_facts(kept["speeds"])
    batch = min(base.config().train.batch_size, 64 if device.type == "cuda" else 16)
    speeds = None
    while speeds is None:
        try:
            speeds = compare(configs, study.reference(), batch, device)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
    atomic_write_json(path, {"question": question, "speeds": speeds.facts()})
    return speeds


def draw(study: Study, base: Base, matrix: Matrix, results: Results, folder: Path) -> str | None:
    """Draw the figure of a page, if there is something to draw; its file's name."""
    out = folder / FIGURE
    titles = {arm.name: arm.title for arm in matrix.arms}
    if study.figure == "losses":
        losses = {name: results.losses(name) for name in titles}
        if any(losses.values()):
            return draw_losses(losses, titles, out).name
    elif study.figure == "pictures":
        arm = matrix.arms[0].name
        found = {each.name: results.pictures(arm, matrix.seeds[0], variant=each.name) for each in matrix.variants}
        if all(each is not None for each in found.values()):
            named = {each.name: each.title for each in matrix.variants}
            return draw_pictures(found, named, base.pictures.classes, out).name
    elif "fid" in results.metrics():
        label = metric_title(results, "fid")
        if study.figure == "curves":
            return draw_variants(results, "fid", label, out).name
        rows = []
        for arm in matrix.arms:
            for variant in matrix.variants:
                found = interval(results.mean(arm.name, "fid", None, variant.name))
                title = ", ".join(dict.fromkeys(filter(None, (arm.title, variant.title))))
                rows += [] if found is None else [(title, found)]
        return draw_bars(rows, label, out).name
    return None
