"""How much faster samples can be had at the quality of 250 steps of ancestral sampling: schedulers x feature caches.

    python benchmarks/acceleration.py --json                       # committed model and table; times the winner
    python benchmarks/acceleration.py --measure --data TEST --extractor NETWORK.ts --work FOLDER [--model MODEL]

The second form makes 5,000 pictures a setting (restartable: what is in FOLDER is not made again, and several processes
may share the work), with common seeds, labels, guidance, batch and precision. Quality is the Fréchet distance of their
features to those of real pictures that the model was not trained on, as a ratio to that of the ancestral samples; the
interval is of pairs (`evaluation.metrics.paired_difference`), two-sided at 95 %, and its upper end is what counts. A
setting is within 5 % when that is at most 1.05. `best_speedup_within_5pct` is the largest speed-up among those.

Times are ratios within one run on one batch, interleaved: a stretch of ancestral steps before and after each setting.
Every step of that sampler costs the same, so the stretch is scaled to 250. The winner is timed against all 250 steps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compact_model import is_compact, read_compact
from machine import machine

from edt_diffusion.evaluation.extract import extract
from edt_diffusion.evaluation.extractors import open_extractor
from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.metrics import METRICS, MetricSettings
from edt_diffusion.evaluation.metrics.paired import paired_difference
from edt_diffusion.pipelines.loading import load_pipeline
from edt_diffusion.sampling.samples import Samples
from edt_diffusion.sampling.settings import SamplingSetting, parse_setting
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.files import atomic_path, atomic_write_json, atomic_write_text, make_folder
from edt_diffusion.util.weights import weights_sha256

HERE = Path(__file__).parent
MODEL, TABLE = HERE / "models" / "cifar-32", HERE / "results" / "acceleration.json"
BASELINE = ("ddpm", 250, "none")
GOAL, BOUND = 12.0, 1.05
PART = 500
# (scheduler, steps, cache), each compared with BASELINE.
SETTINGS: tuple[tuple[str, int, str], ...] = (
    ("ddpm", 25, "none"),
    ("ddpm", 25, "confident:threshold=0.1"),
    ("ddpm", 25, "faster"),
    ("ddpm", 22, "faster"),
    ("ddim", 25, "none"),
    ("ddim", 25, "taylor:interval=2"),
    ("ddim", 25, "delta:edge=0"),
    ("ddim", 20, "none"),
    ("ddim", 20, "delta:edge=0"),
    ("ddim", 18, "none"),
    ("dpm++", 20, "none"),
    ("unipc", 20, "none"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="make samples and measure all settings")
    parser.add_argument("--model", type=Path, default=MODEL, help="run folder, diffusers folder or compact model")
    parser.add_argument("--data", type=Path, help="real pictures that the model was not trained on")
    parser.add_argument("--extractor", type=Path, help="TorchScript file: pictures to (features, logits)")
    parser.add_argument("--work", type=Path, help="folder of the samples")
    parser.add_argument("--number", type=int, default=5000)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--settings", nargs="*", metavar="SCHEDULER/STEPS/CACHE", help="in place of the built-in list")
    parser.add_argument("--only", nargs="*", choices=["samples", "times", "quality"], help="parts of --measure")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the table is written and read")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        if options.data is None or options.extractor is None or options.work is None:
            parser.error("--measure needs --data, --extractor and --work")
        outcome = measure(options)
    else:
        outcome = again(options)
    print(json.dumps(outcome, indent=2) if options.json else summary(outcome))


def open_model(path: Path) -> Any:
    pipeline = read_compact(path) if is_compact(path) else load_pipeline(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def label(setting: Sequence[Any]) -> str:
    return "/".join(str(part) for part in setting)


def parse(words: Sequence[str] | None) -> list[tuple[str, int, str]]:
    if words is None:
        return list(SETTINGS)
    parts = [word.split("/", 2) for word in words]
    return [(name, int(steps), cache) for name, steps, cache in parts]


def samples_of(pipeline: Any, setting: tuple[str, int, str], options: argparse.Namespace) -> Samples:
    scheduler, steps, cache = setting
    fields = {"scheduler": scheduler, "steps": steps, "cache": cache}
    fields |= {"guidance": options.guidance, "precision": options.precision}
    labels = np.arange(options.number) % pipeline.transformer.config.num_classes
    return Samples(pipeline, parse_setting(fields), labels, options.number, seed=0, batch=options.batch)


def facts_of(pipeline: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table, and all parts of a folder of samples, have in common."""
    return {
        "weights_sha256": weights_sha256(pipeline.transformer),
        "guidance": options.guidance,
        "precision": options.precision,
        "batch": options.batch,
        "part": PART,
    }


def check_facts(told: dict[str, Any], facts: dict[str, Any], where: Path) -> None:
    for name, value in facts.items():
        if told.get(name) != value:
            raise UserError(f"{where} is of {name}={told.get(name)}, not {value}: give another folder or table")


# ---- samples and their quality ----


def pictures(samples: Samples, folder: Path, name: str, count: int) -> np.ndarray:
    """Pictures 0 to `count` - 1, from the parts in the folder and new ones; parts made by others are awaited last."""
    folder = folder / name.replace("/", "_").replace(":", "-")
    make_folder(folder)
    starts = range(0, count, PART)
    for start in starts:
        path = folder / f"{start:05d}.npy"
        claim = path.with_suffix(".claim")
        if path.exists() or (claim.exists() and time.time() - claim.stat().st_mtime < 3600):
            continue
        claim.touch()
        made, seconds = samples.make(start, min(start + PART, count))
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.save(file, made)
        claim.unlink(missing_ok=True)
        print(f"{name}: {start + len(made)} of {count}, {seconds:.0f} s", flush=True)
    missing = [start for start in starts if not (folder / f"{start:05d}.npy").exists()]
    if missing:
        raise SystemExit(f"{name}: parts {missing} are being made by another process; run this again when it is done")
    parts = [np.load(folder / f"{start:05d}.npy") for start in starts]
    for start, part in zip(starts, parts, strict=True):
        if len(part) < min(PART, count - start):
            raise UserError(f"{folder / f'{start:05d}.npy'} holds {len(part)} pictures, too few: remove it")
    return np.concatenate(parts)[:count]


def quality(
    found: dict[str, FeatureSet], reference: FeatureSet, names: Sequence[str], labels: np.ndarray
) -> dict[str, dict[str, Any]]:
    base = found[label(BASELINE)]
    settings = MetricSettings()
    rows = {}
    for name in (label(BASELINE), *names):
        features = found[name]
        distance = METRICS["fid"](features, reference, settings)
        assert features.logits is not None
        row = {
            "distance": distance.value,
            "distance_interval": [distance.low, distance.high],
            "recognised": float((features.logits.argmax(1) == labels).mean()),
        }
        if features is not base:
            ratio = paired_difference(features, base, reference, "fid", settings, ratio=True)
            row |= {"ratio": ratio.value, "ratio_interval": [ratio.low, ratio.high]}
            row["within_5pct"] = bool(ratio.high is not None and ratio.high <= BOUND)
        rows[name] = row
    return rows


# ---- time ----


class _Enough(Exception):
    pass


def seconds_of(samples: Samples, setting: SamplingSetting, steps: int, only: int | None = None) -> float:
    """One batch of `setting`; or its first `only` steps, scaled to all of them."""

    def stop(pipeline: Any, step: int, timestep: float, values: dict[str, Any]) -> None:
        if only is not None and step + 1 == only:
            raise _Enough

    numbers = range(samples.batch)
    assert samples.labels is not None
    begun = time.perf_counter()
    try:
        with samples._prepared():
            begun = time.perf_counter()
            samples.pipeline(
                [int(samples.labels[number]) for number in numbers],
                guidance_scale=setting.guidance,
                num_inference_steps=steps,
                scheduler=setting.scheduler,
                cache=setting.cache,
                seeds=[samples.seed_of(number) for number in numbers],
                output_type="latent",
                callback_on_step_end=stop if only else None,
            )
    except _Enough:
        return (time.perf_counter() - begun) * steps / only  # pyright: ignore[reportOptionalOperand]
    return time.perf_counter() - begun


def speed_up(base: Samples, other: Samples, rounds: int = 3, stretch: int = 6) -> dict[str, float]:
    """How many times faster `other` is than all steps of `base`: the median over interleaved rounds, with its range."""
    seconds_of(other, other.setting, other.steps)  # whatever the first call has to prepare
    ratios, times = [], []
    before = seconds_of(base, base.setting, base.steps, stretch)
    for _ in range(rounds):
        taken = seconds_of(other, other.setting, other.steps)
        after = seconds_of(base, base.setting, base.steps, stretch)
        ratios.append((before + after) / 2 / taken)
        times.append(taken)
        before = after
    return {
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],  # pyright: ignore[reportReturnType]
        "seconds_per_picture": statistics.median(times) / other.batch,
    }


# ---- the whole ----


def measure(options: argparse.Namespace) -> dict[str, Any]:
    wanted = options.only or ["samples", "times", "quality"]
    pipeline = open_model(options.model)
    facts = facts_of(pipeline, options)
    make_folder(options.work)
    if (noted := options.work / "facts.json").exists():
        check_facts(json.loads(noted.read_text()), facts, options.work)
    else:
        atomic_write_json(noted, facts)
    settings = parse(options.settings)
    plan = {label(setting): samples_of(pipeline, setting, options) for setting in (*settings, BASELINE)}
    names = [label(setting) for setting in settings]
    count = options.number
    if "samples" in wanted or "quality" in wanted:
        made = {name: pictures(samples, options.work, name, count) for name, samples in plan.items()}
    table = json.loads(options.table.read_text()) if options.table.exists() else {"facts": facts, "rows": {}}
    check_facts(table["facts"], facts, options.table)
    rows = table["rows"]
    if "times" in wanted:
        for name in names:
            rows.setdefault(name, {}).update(speed_up(plan[label(BASELINE)], plan[name]))
            print(f"{name}: {rows[name]['speedup']:.1f} times as fast", flush=True)
            atomic_write_json(options.table, table)
    if "quality" not in wanted:
        return finished(table, options.table)
    from edt_diffusion.data import open_images

    extractor = open_extractor(str(options.extractor))
    source = open_images(options.data, size=pipeline.transformer.config.sample_size)
    real = extract(source, extractor)
    labels = np.arange(count) % pipeline.transformer.config.num_classes
    found = {name: with_labels(extract(pictures_, extractor), labels) for name, pictures_ in made.items()}
    for name, row in quality(found, real, names, labels).items():
        rows.setdefault(name, {}).update(row)
    assert real.logits is not None
    truth = np.array(source.labels)
    table |= {
        "model": options.model.name,
        "baseline": label(BASELINE),
        "guidance": options.guidance,
        "precision": options.precision,
        "batch": options.batch,
        "samples": count,
        "extractor": open_extractor(str(options.extractor)).identity(),
        "reference": {"from": options.data.name, "pictures": real.count},
        "recognised_of_real": float((real.logits.argmax(1) == truth).mean()),
        "machine": machine(),
    }
    return finished(table, options.table)


def finished(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write the table, and where qualities are known what follows from it."""
    if "recognised_of_real" in table:
        conclude(table)
        atomic_write_text(path.with_suffix(".md"), markdown(table))
        plot(table, path.with_suffix(".png"))
    atomic_write_json(path, table)
    return table


def with_labels(features: FeatureSet, labels: np.ndarray) -> FeatureSet:
    return replace(features, labels=labels, stratified=True)


def conclude(table: dict[str, Any]) -> None:
    rows = table["rows"]
    for name, row in rows.items():
        scheduler, steps, cache = name.split("/", 2)
        plain = rows.get(f"{scheduler}/{steps}/none", {})
        if cache != "none" and "speedup" in plain and "speedup" in row:
            row["gain_of_cache"] = row["speedup"] / plain["speedup"]
    fitting = {name: row["speedup"] for name, row in rows.items() if row.get("within_5pct") and "speedup" in row}
    winner = max(fitting, key=lambda name: fitting[name], default=None)
    table |= {
        "winner": winner,
        "best_speedup_within_5pct": None if winner is None else fitting[winner],
        "goal": GOAL,
        "goal_met": winner is not None and fitting[winner] >= GOAL,
    }
    share = rows[table["baseline"]]["recognised"] / table["recognised_of_real"]
    table["recognised_share_of_real"] = share


def again(options: argparse.Namespace) -> dict[str, Any]:
    """The committed table, with the winner's speed measured anew against all steps of the baseline."""
    if not options.table.exists():
        raise UserError(f"{options.table} does not exist: measure it with --measure")
    table = json.loads(options.table.read_text())
    if table.get("winner") is None:
        raise UserError(f"{options.table} has no setting within 5 %: measure more with --measure --settings ...")
    options.guidance, options.precision, options.batch = table["guidance"], table["precision"], table["batch"]
    options.number = options.batch
    pipeline = open_model(options.model)
    check_facts(table["facts"], facts_of(pipeline, options), options.table)
    scheduler, steps, cache = table["winner"].split("/", 2)
    base = samples_of(pipeline, BASELINE, options)
    other = samples_of(pipeline, (scheduler, int(steps), cache), options)
    seconds_of(other, other.setting, other.steps)
    before = seconds_of(other, other.setting, other.steps)
    whole = seconds_of(base, base.setting, base.steps)
    after = seconds_of(other, other.setting, other.steps)
    speed = whole / ((before + after) / 2)
    return {
        "winner": table["winner"],
        "best_speedup_within_5pct": speed,
        "best_speedup_in_table": table["best_speedup_within_5pct"],
        "ratio_interval": table["rows"][table["winner"]]["ratio_interval"],
        "goal": GOAL,
        "goal_met": speed >= GOAL,
        "seconds_of_baseline_batch": whole,
        "seconds_of_winner_batch": (before + after) / 2,
        "batch": options.batch,
        "machine": machine(),
    }


# ---- telling ----


def summary(outcome: dict[str, Any]) -> str:
    if "best_speedup_within_5pct" not in outcome:
        return f"{len(outcome['rows'])} settings so far; quality is not measured yet"
    speed = outcome["best_speedup_within_5pct"]
    told = "none" if speed is None else f"{speed:.1f} times as fast ({outcome['winner']})"
    return f"best within 5 %: {told}; goal {GOAL:g}: {'met' if outcome['goal_met'] else 'missed'}"


def interval(values: Sequence[float] | None, digits: int = 3) -> str:
    return "" if values is None or values[0] is None else f"[{values[0]:.{digits}f}, {values[1]:.{digits}f}]"


def markdown(table: dict[str, Any]) -> str:
    base = table["rows"][table["baseline"]]
    lines = [
        "# Speed against quality: schedulers x feature caches",
        "",
        f"{table['samples']} pictures a setting, common seeds and labels, guidance {table['guidance']:g}, "
        f"{table['precision']}, batches of {table['batch']}; Fréchet distance ({table['extractor']['name']}) to "
        f"{table['reference']['pictures']} real test pictures; ratio to {table['baseline']} with its paired 95 % "
        f"interval. Recognised: real {table['recognised_of_real']:.1%}, {table['baseline']} "
        f"{base['recognised']:.1%}.",
        "",
        f"**{summary(table)}**",
        "",
        "| scheduler/steps/cache | speed-up | gain of the cache | distance | ratio | within 5 % | recognised |",
        "|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(table["rows"].items(), key=lambda entry: entry[1].get("speedup", 1.0))
    for name, row in ordered:
        gain = f"{row['gain_of_cache']:.2f}" if "gain_of_cache" in row else ""
        ratio = f"{row['ratio']:.3f} {interval(row['ratio_interval'])}" if "ratio" in row else "1"
        within = {True: "yes", False: "no", None: ""}[row.get("within_5pct")]
        lines.append(
            f"| {name} | {row.get('speedup', 1.0):.1f} | {gain} | {row.get('distance', float('nan')):.2f} "
            f"{interval(row.get('distance_interval'), 2)} | {ratio} | {within} | {row.get('recognised', 0):.1%} |"
        )
    return "\n".join(lines) + "\n"


def plot(table: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    schedulers = list(dict.fromkeys(name.split("/")[0] for name in table["rows"]))
    for place, scheduler in enumerate(schedulers):
        colour = f"C{place}"
        for name, row in table["rows"].items():
            if name.split("/")[0] != scheduler or "ratio" not in row or "speedup" not in row:
                continue
            low, high = row["ratio_interval"]
            cached = not name.endswith("/none")
            spread = [[row["ratio"] - low], [high - row["ratio"]]]
            axes.errorbar(
                row["speedup"], row["ratio"], spread, fmt="o" if cached else "s", color=colour, capsize=2,
                mfc=colour if cached else "white",
            )  # fmt: skip
            axes.annotate(name, (row["speedup"], row["ratio"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(BOUND, color="grey", linestyle="--", linewidth=1)
    axes.axhline(1.0, color="grey", linewidth=0.5)
    axes.axvline(GOAL, color="grey", linestyle=":", linewidth=1)
    axes.set(
        xscale="log", xlabel=f"times as fast as {table['baseline']}",
        ylabel="Fréchet distance, times that of ancestral sampling",
        title="Open squares: no cache. Dashed: 5 % worse. Dotted: the goal",
    )  # fmt: skip
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
