"""Whether the metrics rank known damage rightly: real pictures, degraded in steps, against other real pictures.

    python benchmarks/metric_ranking.py --reference TRAIN --pictures TEST --extractor NETWORK.ts --out FOLDER

Each row of `DEGRADATIONS` rises from the floor, which is the same pictures, and as many of them, untouched. What every
metric should do stands with its reason in `EXPECTED`, written before anything was measured, and is never adapted to
what was found. A verdict says whether the steps come in the expected order, and how many neighbours are told apart,
that is, have 95 % intervals that do not overlap. The intervals hold the chance of single sets; steps share their
pictures, so that a paired comparison would tell apart more.

- blur, jpeg, noise   all pictures; blur in pixels of a 32 pixel picture, scaled with the size; JPEG as Pillow writes it
  (4:2:0), which changes next to nothing in pictures that were JPEGs of no higher quality; noise per value of 255, the
  same draws at each strength, cut at 0 and 255
- imbalance, missing  pictures as they are, classes in uneven shares or left out, without repeats; all steps of the row
  and its floor hold the same number of pictures, which is less than there are and so has another floor. KID's floor
  is negative there: even shares are less left to chance than the independent draws that its estimate corrects for
- memorised           some pictures repeated until they are as many as before. Intervals of what is a mean over
  generated pictures are widened by the root of the number of copies, since copies add nothing; those of recall and
  coverage are as wide as those of the distinct pictures alone
"""

import argparse
import datetime
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edt_diffusion.data import open_images
from edt_diffusion.evaluation.extractors import Extractor, open_extractor
from edt_diffusion.evaluation.feature_set import FeatureSet
from edt_diffusion.evaluation.metrics import METRICS, MetricSettings
from edt_diffusion.evaluation.pixels import colour_tensor
from edt_diffusion.evaluation.statistics import GaussianStatistics
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.files import atomic_path, atomic_write_json, atomic_write_text, make_folder
from edt_diffusion.util.rng import Purpose, stream

NAMES = ("fid", "kid", "precision", "recall", "density", "coverage", "is")
SEED = 0

# Direction as the damage grows, and why; "flat": within chance of the floor.
_DAMAGE = {
    "fid": ("rises", "features move away from those of real pictures"),
    "kid": ("rises", "features move away from those of real pictures"),
    "precision": ("falls", "damaged pictures leave the balls around real ones"),
    "recall": ("falls", "damaged pictures lose what tells them apart, so that their balls leave real ones out"),
    "density": ("falls", "damaged pictures lie in fewer balls of real ones"),
    "coverage": ("falls", "the balls of intact real pictures stay empty"),
    "is": ("falls", "the classifier becomes unsure, or answers with few classes"),
}
_SHARES = {
    "fid": ("rises", "mean and covariance are those of another mixture of the classes"),
    "kid": ("rises", "the mean of the kernel's features is that of another mixture of the classes"),
    "precision": ("flat", "each picture is still a real one"),
    "recall": ("falls", "real pictures of rare classes have few or no balls around them"),
    "density": ("flat", "each picture is still a real one, though classes may differ in density"),
    "coverage": ("falls", "the balls of real pictures of rare classes stay empty"),
    "is": ("falls", "the entropy of the mean class probabilities falls with the evenness of the shares"),
}
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "blur": _DAMAGE,
    "jpeg": _DAMAGE,
    "noise": {
        **_DAMAGE,
        "recall": ("falls", "as for blur, but doubtful: outliers have wide balls (arXiv 2002.09797)"),
    },
    "imbalance": _SHARES,
    "missing": _SHARES,
    "memorised": {
        "fid": ("rises", "only by the bias of a smaller sample: hardly beside real damage"),
        "kid": ("rises", "only by pairs of copies, which it takes for different pictures: hardly"),
        "precision": ("flat", "each picture is still a real one"),
        "recall": ("falls", "of copies the third neighbour is at distance 0 or nearly: balls shrink or vanish"),
        "density": ("flat", "each picture is still a real one"),
        "coverage": ("falls", "a few pictures lie in the balls of few real ones"),
        "is": ("flat", "classes keep their shares, as long as the kept pictures are many more than the classes"),
    },
}


# Degraded pixels: uint8 (N, H, W, 3) and a strength -> the same shape.


def blurred(pictures: np.ndarray, strength: float) -> np.ndarray:
    """Gaussian blur of `strength` pixels of a 32 pixel picture; weights beyond the border go to the pixels inside."""
    result = pictures.astype(np.float32)
    for axis in (1, 2):
        pixels = np.arange(pictures.shape[axis])
        sigma = strength * pictures.shape[axis] / 32
        weights = np.exp(-((pixels[:, None] - pixels) ** 2) / (2 * sigma**2))
        weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        result = np.moveaxis(np.tensordot(result, weights, axes=(axis, 1)), -1, axis)
    return np.rint(result).clip(0, 255).astype(np.uint8)


def compressed(pictures: np.ndarray, strength: float) -> np.ndarray:
    """JPEG of quality `strength`, decoded again."""
    result = np.empty_like(pictures)
    for row, picture in enumerate(pictures):
        held = io.BytesIO()
        Image.fromarray(picture).save(held, "JPEG", quality=int(strength))
        result[row] = np.asarray(Image.open(held))
    return result


def noisy(pictures: np.ndarray, strength: float) -> np.ndarray:
    """Independent normal noise of `strength` of 255 on each value; row i has the same draws at every strength."""
    result = np.empty_like(pictures)
    for row, picture in enumerate(pictures):
        noise = stream(SEED, Purpose.NOISE, position=row).standard_normal(picture.shape, np.float32)
        result[row] = np.rint(picture + strength * noise).clip(0, 255)
    return result


# Chosen pictures: labels (N,) and strengths -> rows for the floor and for each strength.


def uneven(labels: np.ndarray, ratios: Sequence[float]) -> list[np.ndarray]:
    """Shares that fall exponentially over the classes, the first `ratio` times the last; classes in random order."""
    position = np.arange(classes := len(np.unique(labels))) / max(classes - 1, 1)
    return _rows_of_shares(labels, [ratio**-position for ratio in (1, *ratios)])


def missing(labels: np.ndarray, kept: Sequence[float]) -> list[np.ndarray]:
    """Equal shares of the first `kept` of the classes, in random order, and none of the others."""
    classes = len(np.unique(labels))
    number = [max(round(share * classes), 1) for share in (1, *kept)]
    return _rows_of_shares(labels, [(np.arange(classes) < count).astype(float) for count in number])


def repeated(labels: np.ndarray, kept: Sequence[float]) -> list[np.ndarray]:
    """The share `kept` of all rows, over and over."""
    order = stream(SEED, Purpose.SUBSET, step=5).permutation(len(labels))
    return [np.resize(order[: max(int(share * len(order)), 1)], len(order)) for share in (1, *kept)]


def _rows_of_shares(labels: np.ndarray, weights: list[np.ndarray]) -> list[np.ndarray]:
    """Rows without repeats, as many for each of `weights` (over classes in random order), the most that there are."""
    names = stream(SEED, Purpose.SUBSET, step=3).permutation(np.unique(labels))
    of_class = [
        stream(SEED, Purpose.SUBSET, step=4, position=int(name)).permutation(np.flatnonzero(labels == name))
        for name in names
    ]
    there = np.array([len(rows) for rows in of_class])
    shares = [weight / weight.sum() for weight in weights]
    number = min(int((there[share > 0] / share[share > 0]).min() + 1e-9) for share in shares)
    chosen = []
    for share in shares:
        counts = np.floor(share * number + 1e-9).astype(int)
        counts[np.argsort(counts - share * number)[: number - counts.sum()]] += 1  # largest remainders
        rows = np.concatenate([rows[:count] for rows, count in zip(of_class, counts, strict=True)])
        chosen.append(stream(SEED, Purpose.SUBSET, step=6).permutation(rows))
    return chosen


@dataclass(frozen=True)
class Degradation:
    """One row: its strengths, rising, and how pixels or rows are made of them."""

    title: str
    strengths: tuple[float, ...]
    pixels: Callable[[np.ndarray, float], np.ndarray] | None = None
    rows: Callable[[np.ndarray, Sequence[float]], list[np.ndarray]] | None = None
    needs_labels: bool = False


DEGRADATIONS = {
    "blur": Degradation("Gaussian blur, sigma at 32 px", (0.5, 1, 2, 4), pixels=blurred),
    "jpeg": Degradation("JPEG, quality", (75, 40, 20, 8), pixels=compressed),
    "noise": Degradation("Gaussian noise, std of 255", (5, 15, 35, 70), pixels=noisy),
    "imbalance": Degradation("class imbalance, ratio", (3, 10, 100), rows=uneven, needs_labels=True),
    "missing": Degradation("classes kept, share", (0.8, 0.5, 0.2), rows=missing, needs_labels=True),
    "memorised": Degradation("distinct pictures, share", (1 / 2, 1 / 8, 1 / 32), rows=repeated),
}


# Features and metrics


def extract(pictures: np.ndarray, extractor: Extractor, cache: Path | None) -> FeatureSet:
    """Features of uint8 (N, H, W, 3), kept in `cache` by what they depend on."""
    digest = hashlib.sha256(f"{extractor.identity()} {pictures.shape}".encode() + pictures.tobytes()).hexdigest()
    path = cache / f"{digest}.npz" if cache else None
    if path is not None and path.is_file():
        with np.load(path) as held:
            return feature_set(held["pooled"], held.get("logits"))
    batch = 256 if pictures.shape[1] <= 64 else 32
    parts = [extractor(colour_tensor(pictures[start : start + batch])) for start in range(0, len(pictures), batch)]
    arrays = {"pooled": np.concatenate([part.pooled.numpy() for part in parts])}
    if parts[0].logits is not None:
        arrays["logits"] = np.concatenate([np.asarray(part.logits) for part in parts])
    if path is not None:
        with atomic_path(path) as temporary, open(temporary, "xb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    return feature_set(**arrays)


def feature_set(pooled: np.ndarray, logits: np.ndarray | None = None, rows: np.ndarray | None = None) -> FeatureSet:
    if rows is not None:
        pooled, logits = pooled[rows], None if logits is None else logits[rows]
    return FeatureSet(GaussianStatistics.of(pooled), pooled, logits)


def measure(features: FeatureSet, reference: FeatureSet, copies: float = 1.0) -> dict[str, dict[str, Any]]:
    """Metrics of one set, every picture of which is there `copies` times."""
    out = {}
    for name in NAMES:
        if METRICS[name].missing(features, reference) is None:
            found = asdict(METRICS[name](features, reference))
            if copies > 1 and name in ("recall", "coverage"):
                found |= _interval_without_copies(name, features, reference, found["value"], copies)
            elif copies > 1:
                for end in ("low", "high"):
                    found[end] = found["value"] + (found[end] - found["value"]) * math.sqrt(copies)
            out[name] = found
    return out


def _interval_without_copies(
    name: str, features: FeatureSet, reference: FeatureSet, value: float, copies: float
) -> dict[str, float]:
    """Interval of recall or coverage of copied pictures, from the distinct ones, which alone are left to chance.

    Coverage is that of the distinct pictures. Recall is that with the neighbour that the k-th one is without copies;
    with more copies than neighbours the balls are points, and the metric's own interval stays.
    """
    assert features.pooled is not None
    first = np.unique(features.pooled, axis=0, return_index=True)[1]
    distinct = feature_set(features.pooled[np.sort(first)])
    copied = MetricSettings()
    neighbours = math.ceil((copied.neighbours - copies + 1) / copies)
    if name == "recall" and neighbours < 1:
        return {}
    found = METRICS[name](distinct, reference, copied.model_copy(update={"neighbours": max(neighbours, 1)}))
    if found.low is None or found.high is None:
        return {}
    return {"low": max(value + found.low - found.value, 0.0), "high": min(value + found.high - found.value, 1.0)}


def run(pictures: np.ndarray, labels: np.ndarray | None, reference: FeatureSet, extractor: Extractor, cache=None):
    """All rows: by degradation the number of pictures and the metrics of floor and steps."""
    untouched = extract(pictures, extractor, cache)
    assert untouched.pooled is not None
    whole = measure(untouched, reference)
    out: dict[str, Any] = {}
    for name, row in DEGRADATIONS.items():
        if row.needs_labels and labels is None:
            print(f"{name}: left out, the pictures have no labels", flush=True)
            continue
        count, floor, steps = len(pictures), whole, []
        if row.pixels is not None:
            sets = [
                (strength, 1.0, extract(row.pixels(pictures, strength), extractor, cache)) for strength in row.strengths
            ]
        else:
            assert row.rows is not None
            chosen = row.rows(np.zeros(count) if labels is None else labels, row.strengths)
            parts = [feature_set(untouched.pooled, untouched.logits, rows) for rows in chosen]
            copies = [len(rows) / len(np.unique(rows)) for rows in chosen]
            count, floor = len(chosen[0]), measure(parts[0], reference)
            sets = list(zip(row.strengths, copies[1:], parts[1:], strict=True))
        for strength, each, features in sets:
            steps.append({"strength": strength, "copies": each, "metrics": measure(features, reference, each)})
            values = ", ".join(f"{key} {found['value']:.4g}" for key, found in steps[-1]["metrics"].items())
            print(f"{name} {strength:g}: {values}", flush=True)
        out[name] = {"title": row.title, "pictures": count, "floor": floor, "steps": steps}
    return out


# Verdicts


def verdict(direction: str, points: Sequence[tuple[float, float, float]], labels: Sequence[str]) -> dict[str, Any]:
    """What (value, low, high) of floor and steps say of the expected direction.

    Returns:
        `verdict` in words; `right`, whether it is the expected one but for chance; `ordered`, whether the values
        themselves are in order; `resolved` and `steps`, neighbours told apart in the expected order and neighbours in
        all; `noticed`, the first strength told apart from the floor.
    """
    down = direction == "falls"
    flipped = [(-v, -high, -low) for v, low, high in points] if down else list(points)
    floor = flipped[0]
    above = [point[1] > floor[2] for point in flipped[1:]]
    below = [point[2] < floor[1] for point in flipped[1:]]
    pairs = list(itertools.pairwise(flipped))
    resolved = sum(after[1] > before[2] for before, after in pairs)
    reversals = [label for (before, after), label in zip(pairs, labels, strict=True) if after[2] < before[1]]
    ordered = all(after[0] >= before[0] for before, after in pairs)
    moved = [label for label, *out in zip(labels, above, below, strict=True) if any(out)]
    found = {"resolved": resolved, "steps": len(pairs), "ordered": ordered, "noticed": moved[0] if moved else None}
    if direction == "flat":
        way = "moves both ways" if any(above) and any(below) else "rises" if any(above) else "falls"
        words = f"{way} from {moved[0]}" if moved else "flat"
        return found | {"resolved": None, "ordered": None, "right": not moved, "verdict": words}
    told = f"{'all' if resolved == len(pairs) else f'{resolved} of {len(pairs)}'} resolved"
    if any(below):
        words = f"wrong direction at {', '.join(itertools.compress(labels, below))}; {told}"
    elif reversals:
        words = f"wrong order at {', '.join(reversals)}; {told}"
    elif not any(above):
        words = "not noticed"
    elif not above[-1]:
        words = f"noticed at {moved[0]}, but not at the strongest; {told}"
    else:
        words = f"{'in order' if ordered else 'in order but for chance'}; {told}"
    return found | {"right": above[-1] and not any(below) and not reversals, "verdict": words}


def judge(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Verdicts by degradation and metric."""
    out: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        labels = [f"{step['strength']:g}" for step in row["steps"]]
        out[name] = {}
        for metric in row["floor"]:
            points = [metrics[metric] for metrics in (row["floor"], *(step["metrics"] for step in row["steps"]))]
            direction, reason = EXPECTED[name][metric]
            found = verdict(direction, [(p["value"], p["low"], p["high"]) for p in points], labels)
            out[name][metric] = {"expected": direction, "reason": reason, **found}
    return out


# Output


def markdown(results: dict[str, Any]) -> str:
    """Verdicts, notes and figures."""
    facts = results["facts"]
    lines = [f"# Do the metrics rank known damage rightly? {facts['extractor']['name']}", ""]
    lines += [
        f"{facts['pictures']} real pictures, degraded, against {facts['reference']} other real ones; "
        f"{facts['extractor']['dimensions']} features. Expectations were written before measuring; a step is resolved "
        "where neighbouring 95 % intervals do not overlap. The floor is the pictures untouched. fid is the Fréchet "
        "distance of these features: comparable with others of this table only.",
        "",
    ]
    metrics = list(next(iter(results["rows"].values()))["floor"])
    lines += ["## Verdicts", "", "**Bold**: not what was expected.", ""]
    lines += [f"| | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, found in results["verdicts"].items():
        cells = []
        for metric in metrics:
            words = f"{found[metric]['expected']}: {found[metric]['verdict']}"
            cells.append(words if found[metric]["right"] else f"**{words}**")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = {
        f"{metric}: {note}"
        for row in results["rows"].values()
        for step in ({"metrics": row["floor"]}, *row["steps"])
        for metric, found in step["metrics"].items()
        for note in found["notes"]
    }
    lines += ["", "## Notes of the metrics", "", *(f"- {note}" for note in sorted(notes) or ["none"])]
    for name, row in results["rows"].items():
        lines += ["", f"## {name}: {row['title']} ({row['pictures']} pictures each)", ""]
        lines += [f"| | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
        steps = [("floor", row["floor"]), *((f"{step['strength']:.4g}", step["metrics"]) for step in row["steps"])]
        for label, found in steps:
            cells = [f"{found[m]['value']:.4g} [{found[m]['low']:.4g}, {found[m]['high']:.4g}]" for m in metrics]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "## Expectations", "", "| | metric | expected | because |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {metric} | {found['expected']} | {found['reason']} |"
        for name, of_row in results["verdicts"].items()
        for metric, found in of_row.items()
    ]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Two panels a degradation: distances above, shares and scores below, each against its floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, axes = pyplot.subplots(2, len(rows), figsize=(3.1 * len(rows), 6.4), sharey="row", squeeze=False)
    colours = ("#d55e00", "#000000", "#0072b2", "#e69f00", "#7b3fa0", "#009e73", "#56b4e9")
    top = 1.5
    for column, (name, row) in enumerate(rows.items()):
        points = [row["floor"], *(step["metrics"] for step in row["steps"])]
        for metric, floor in row["floor"].items():
            panel = axes[0 if metric in ("fid", "kid") else 1, column]
            # KID's floor is about 0 and may be negative: its unit is the chance of the floor.
            unit = (floor["high"] - floor["low"]) / 2 if metric == "kid" else floor["value"]
            value, low, high = (np.array([p[metric][part] for p in points]) / unit for part in ("value", "low", "high"))
            bars = np.abs([value - low, high - value])
            if panel is axes[1, column]:
                top = max(top, 1.05 * float(high.max()))
            style = {
                "color": colours[NAMES.index(metric)],
                "marker": "o",
                "markersize": 3,
                "linewidth": 1.4,
                "capsize": 2,
            }
            panel.errorbar(range(len(points)), value, bars, label=metric, **style)
        for panel in axes[:, column]:
            panel.axhline(1, color="0.75", linewidth=0.8, zorder=0)
            panel.set_xticks(
                range(len(points)), ["floor", *(f"{step['strength']:g}" for step in row["steps"])], fontsize=8
            )
            panel.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_yscale("symlog", linthresh=1)
        axes[0, column].set_title(name, fontsize=10)
        axes[1, column].set_yscale("symlog", linthresh=2)  # linear up to 2
        axes[1, column].set_yticks([0, 0.5, 1, 1.5, 2, 5, 10, 20], ["0", "0.5", "1", "1.5", "2", "5", "10", "20"])
        axes[1, column].set_xlabel(f"{row['title']}\n({row['pictures']} pictures)", fontsize=8)
    axes[1, 0].set_ylim(0, top)  # of the whole row
    axes[0, 0].set_ylabel("fid over its floor;\nkid over half its floor's interval", fontsize=8)
    axes[1, 0].set_ylabel("over the floor", fontsize=8)
    handles = [entry for panel in axes[:, 0] for entry in zip(*panel.get_legend_handles_labels(), strict=True)]
    figure.legend(*zip(*handles, strict=True), loc="upper center", ncol=len(handles), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse_arguments(words)
    for folder in filter(None, (arguments.out, arguments.cache)):
        make_folder(folder)
    extractor = open_extractor(arguments.extractor)
    real = open_images(arguments.reference, size=arguments.size, limit=arguments.reference_limit)
    pictures = open_images(arguments.pictures, size=arguments.size, limit=arguments.limit)
    if len(pictures) < 64:
        raise UserError(f"{len(pictures)} pictures are too few for steps of 1/32: expected at least 64")
    features = extract(real.images(range(len(real))), extractor, arguments.cache)
    rows = run(pictures.images(range(len(pictures))), pictures.labels, features, extractor, arguments.cache)
    facts = {
        "extractor": extractor.identity(),
        "size": arguments.size,
        "pictures": len(pictures),
        "reference": len(real),
        "seed": SEED,
        "date": datetime.date.today().isoformat(),
    }
    results = {"facts": facts, "verdicts": judge(rows), "rows": rows}
    text = markdown(results)
    if arguments.out:
        write(results, text, arguments.out)
    print(json.dumps(results, indent=2) if arguments.json else text)
    return results


def write(results: dict[str, Any], text: str, folder: Path) -> None:
    facts = results["facts"]
    stem = f"metric_ranking_{facts['extractor']['name']}_cpu-{os.cpu_count()}-cores_{facts['date']}"
    atomic_write_json(folder / f"{stem}.json", results)
    atomic_write_text(folder / f"{stem}.md", text)
    plot(results, folder / f"{stem}.png")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="real pictures that all sets are compared with")
    parser.add_argument("--pictures", required=True, help="other real pictures, which are degraded")
    parser.add_argument("--extractor", required=True, help="as edt evaluate takes it, such as a TorchScript file")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--limit", type=int, help="take so many of --pictures, evenly spaced")
    parser.add_argument("--reference-limit", type=int, help="take so many of --reference, evenly spaced")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--out", type=Path, help="write JSON, Markdown and a plot to this folder")
    parser.add_argument("--cache", type=Path, help="keep features in this folder, for further runs")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
