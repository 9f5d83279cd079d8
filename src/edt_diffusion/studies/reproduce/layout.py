"""The page of a quality table, laid out from what its matrix came to."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..matrix import Estimate, Matrix, Results
from .base import PUBLISHED_SIZES, Base
from .losses import PARTS, fall_together
from .matching import parameters_used
from .page import Cell, Column, Grid, Interval, Page
from .published import SAMPLING_SPEED, TRAINING_SPEED, Published, sentence
from .speed import Speeds
from .study import METRICS, Study


def lay_out(
    name: str, study: Study, base: Base, matrix: Matrix, results: Results, speeds: Speeds | None = None
) -> Page:
    """The page of what is there."""
    grids = []
    if study.figure == "losses":
        grids.append(_loss_grid(matrix, results))
    else:
        grids.append(_score_grid(study, base, matrix, results, speeds))
    published = [cell for cells in _published(study, base).values() for cell in cells.values()]
    sources = [sentence(f"Scores of {study.published_of}", *published)] if published else []
    if speeds is not None and base.published and not study.doubled:
        sources.append(sentence("Speeds", TRAINING_SPEED[base.size], SAMPLING_SPEED[base.size]))
    notes = [*study.notes, *_about_arms(study, base), *_about_scores(study, matrix, results)]
    notes += [f"Runs were not made alike, and equal seconds are not equal work ({told})." for told in results.unlike()]
    if speeds is not None:
        notes.append(
            f"Speeds are of {speeds.batch} pictures at once, the arms in turn: how many times as fast as "
            f"{_title(matrix, study.reference())}, median and quartiles. Memory is that of a training step, estimated."
        )
    if results.missing:
        notes.append(f"Not there yet: {len(results.missing)} of the cells; the same command again goes on.")
    notes += [f"Failed: {what}: {why}" for what, why in results.failed.items()]
    facts = json.loads(json.dumps(results.summary()))
    more = {"results": facts, "complete": results.complete, "stopped": results.stopped}
    if speeds is not None:
        more["speeds"] = speeds.facts()
    return Page(name, study.title, grids, _differences(study, base, matrix, results), notes, sources, more=more)


def _score_grid(study: Study, base: Base, matrix: Matrix, results: Results, speeds: Speeds | None) -> Grid:
    known = results.metrics()
    shown = [metric for metric in study.metrics if metric in known]
    published = _published(study, base)
    rows: list[dict[str, Cell]] = []
    for arm in matrix.arms:
        for point in matrix.points:
            for variant in matrix.variants:
                row: dict[str, Cell] = {"arm": arm.title, "variant": variant.title, "point": point}
                spent = results.spent(arm.name, point)
                row["steps"] = spent.get("step")
                row["images"] = spent["images"] / 1e6 if spent else None
                for metric in shown:
                    row[metric] = interval(results.mean(arm.name, metric, point, variant.name))
                if study.baseline is not None and (arm.name, variant.name) != study.baseline:
                    row["difference"] = interval(
                        results.difference(
                            arm.name, study.baseline[0], "fid", point, variant.name, study.baseline[1]
                        )
                    )  # fmt: skip
                for metric, cell in published.get((arm.name, variant.name), {}).items():
                    row[f"{metric}_paper"] = cell.value
                if speeds is not None:
                    row |= {
                        "training": speeds.training[arm.name],
                        "sampling": speeds.sampling[arm.name],
                        "memory": speeds.memory[arm.name] / 2**30,
                    }
                    if arm.name == "edt" and base.published and not study.doubled:
                        row["training_paper"] = TRAINING_SPEED[base.size].value
                        row["sampling_paper"] = SAMPLING_SPEED[base.size].value
                rows.append(row)
    columns = [Column("arm", "model")]
    columns += [Column("variant", "sampled")] if len(matrix.variants) > 1 else []
    columns += [Column("point", "share of the budget", "{:g}")] if len(matrix.points) > 1 else []
    if speeds is not None:
        for key, title in (("training", "training speed"), ("sampling", "inference speed")):
            columns.append(Column(key, f"{title}, ratio", "{:.2f}"))
            columns.append(Column(f"{key}_paper", f"{title}, ratio (paper)", "{:.2f}", published=True))
        columns.append(Column("memory", "memory, GiB", "{:.2f}"))
    columns += [Column("steps", "steps", "{:,.0f}"), Column("images", "pictures seen, M", "{:.3g}")]
    for metric in study.metrics:
        columns += [Column(metric, metric_title(results, metric))] if metric in shown else []
        columns.append(Column(f"{metric}_paper", f"{_paper_title(metric)} (paper)", published=True))
    if study.baseline is not None and "fid" in shown:
        title = _title(matrix, study.baseline[0])
        variant = next(each.title for each in matrix.variants if each.name == study.baseline[1])
        words = f"{title}, {variant}" if variant and len(matrix.variants) > 1 else title
        columns.append(Column("difference", f"{metric_title(results, 'fid')}, difference to {words}"))
    seeds = len(matrix.seeds)
    caption = f"{matrix.budget.words()} each, " + (f"means of {seeds} seeds" if seeds > 1 else "one seed")
    return Grid(columns, rows, caption)


def _loss_grid(matrix: Matrix, results: Results) -> Grid:
    """How the losses of the full and the masked input fall, and whether together."""
    rows: list[dict[str, Cell]] = []
    for arm in matrix.arms:
        seeds = {seed: told for seed, lines in results.losses(arm.name).items() if (told := fall_together(lines))}
        if seeds:
            names = ("full_end", "masked_end", "full_fall", "masked_fall", "same_way", "correlation")
            found = {name: interval(Estimate.of({seed: told[name] for seed, told in seeds.items()})) for name in names}
            rows.append({"arm": arm.title, **found})
        else:  # nothing is said of so few lines
            rows.append({"arm": f"{arm.title} (fewer than {PARTS} lines logged)"})
    columns = [
        Column("arm", "model"),
        Column("full_end", "loss of the full input, last part"),
        Column("masked_end", "loss of the masked input, last part"),
        Column("full_fall", "its fall since the second part, full", "{:.1%}"),
        Column("masked_fall", "its fall since the second part, masked", "{:.1%}"),
        Column("same_way", "parts in which both move the same way", "{:.0%}"),
        Column("correlation", "correlation of the changes", "{:.2f}"),
    ]
    count = len(matrix.seeds)
    seeds = f"{count} seeds" if count > 1 else "one seed"
    caption = f"{matrix.budget.words()} each, {seeds}, the training in {PARTS} parts"
    return Grid(columns, rows, caption)


def metric_title(results: Results, metric: str) -> str:
    """What a score is called: FID only through the extractor of published FIDs."""
    for record in results.records:
        if label := record.get("details", {}).get(metric, {}).get("label"):
            return str(label)
    return METRICS.get(metric, metric)


def _paper_title(metric: str) -> str:
    return "FID" if metric == "fid" else METRICS.get(metric, metric)


def _published(study: Study, base: Base) -> dict[tuple[str, str], Mapping[str, Published]]:
    """Published scores by arm and variant, of the size that is trained."""
    size = base.size if base.published else None
    return {(arm, variant): cells for (arm, variant, of), cells in study.published.items() if of == size}


def _about_arms(study: Study, base: Base) -> list[str]:
    backbones = dict.fromkeys(arm.backbone for arm in study.arms)
    told = []
    for name in backbones:
        network = base.network(name)
        layout = ", ".join(f"{d} x {w}" for d, w in zip(network.stage_depths, network.stage_dims, strict=True))
        count, work = parameters_used(network), sum(network.multiply_adds().values())
        told.append(
            f"{name}: {count / 1e6:.2f} M parameters used in sampling, {work / 1e9:.3f} GFLOPs, "
            f"blocks x width {layout}."
        )
    if any(variant.name == "on" or "amm" in str(variant.sampling) for variant in study.variants):
        if len(backbones) == 1:
            told.append(f"AMM acts in {base.amm_words()}.")
        else:
            for name in backbones:
                setting = base.network(name).suggested_modulation()
                known = base.network(name).published_modulation() is not None
                origin = "the authors' placement" if known else "at the places of the authors' S"
                blocks = "no block" if setting is None else "blocks " + "+".join(map(str, setting.blocks))
                told.append(f"AMM in {name}: {blocks}, {origin}.")
    return told


def _about_scores(study: Study, matrix: Matrix, results: Results) -> list[str]:
    if not study.metrics:
        return []
    told = ["Intervals are of 95 % over seeds (Student's t)."] if len(matrix.seeds) > 1 else []
    if study.baseline is not None and len(matrix.seeds) > 1:
        told.append("Differences are taken seed by seed; samples of all arms have the same noise and classes.")
    if matrix.extractor == "pixels":
        told.append(
            "Scored by pixels on a 16x16 grid, because no network was named (--extractor) and FID's Inception is not "
            "on this machine: such distances see colours and coarse shapes only."
        )
    warnings = dict.fromkeys(warning for record in results.records for warning in record.get("warnings", []))
    return [*told, *list(warnings)[:3]]


def _differences(study: Study, base: Base, matrix: Matrix, results: Results) -> list[str]:
    """In what the trainings and scores are not the paper's."""
    config = base.config()
    space = f"latents of {base.input_side}x{base.input_side}" if base.pictures.latents else "pixels"
    told = [
        f"Data: {Path(base.pictures.path).name} ({base.pictures.classes or 'no'} classes, {base.side}x{base.side} "
        f"pictures, trained on {space}); the paper's are ImageNet's 1000 classes at "
        f"{512 if study.doubled else 256}x{512 if study.doubled else 256}, trained on latents.",
        f"Training: {matrix.budget.words()} each with batches of {config.train.batch_size}; the paper's have 400 "
        "thousand iterations and more with batches of 256.",
    ]
    if matrix.budget.timed:
        told.append(
            "Arms are compared at equal time: those with two passes a step make fewer steps. The paper compares at "
            "equal iterations, as a budget in steps does here."
        )
    if base.size not in PUBLISHED_SIZES:
        told.append("Networks: not of the paper's sizes.")
    if len({arm.backbone for arm in study.arms}) > 1:
        if base.size not in PUBLISHED_SIZES:
            told[-1] = "Networks: not of the paper's sizes, matched to one another in parameters."
        told.append(
            "Recipe: loss, optimizer and schedule are the same for all networks; the authors of DiT and MDTv2 train "
            "with others."
        )
    if base.side > base.pictures.side:
        told.append(f"Pictures are enlarged from {base.pictures.side} pixels.")
    if study.doubled and base.pictures.store and base.side != 512:
        told.append(f"Resolution: that of the store, {base.side} pixels, and not twice another one.")
    sampled = [str(variant.sampling.get("amm", "saved")) for variant in matrix.variants]
    if study.metrics and set(sampled) == {"saved"} and not config.model.get("attention_modulation"):
        told.append("AMM: off in all samples; the authors' released code has it on in EDT (see table 3).")
    if study.metrics:
        sampling = matrix.variants[0].setting()
        told.append(
            f"Scores: {matrix.images} samples of {sampling.steps} {sampling.scheduler} steps with balanced classes, "
            f"against {matrix.reference or 'the training pictures'}; the paper's are 50,000 of 250 steps."
        )
        if matrix.extractor.partition("=")[0] != "inception":
            name = Path(matrix.extractor.partition("=")[2] or matrix.extractor).name
            resized = f", pictures brought to {matrix.score_size} pixels" if matrix.score_size else ""
            told.append(f"Extractor: {name}{resized}; a Fréchet distance through it is not FID.")
    return [*told, *study.differs]


def interval(found: Estimate | None) -> Interval | None:
    """A mean over seeds as a cell."""
    return None if found is None else Interval(found.mean, found.low, found.high)


def _title(matrix: Matrix, name: str) -> str:
    return matrix.arm(name).title
