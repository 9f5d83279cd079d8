"""How often generated pictures are recognised as the class that was asked for."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..util.errors import UserError
from .wilson import wilson_interval

_TOP = 5
_ANNOTATED = 30
_LARGEST = 20


@dataclass(frozen=True)
class Share:
    """How many of how many.

    Attributes:
        correct: how many were recognised.
        count: of how many.
        share: correct / count, in [0, 1]; None if there were none.
        interval: Wilson interval of it; (0, 1) if there were none.
    """

    correct: int
    count: int
    share: float | None
    interval: tuple[float, float]


@dataclass(frozen=True)
class ClassFidelity:
    """What a judge says of pictures whose class is known.

    Attributes:
        overall: over all pictures.
        per_class: by class name, in label order.
        confusion: int64 (K, K): of the pictures asked for as row's class, how many were recognised as column's.
        confidence: mean over the pictures of the largest probability.
        top5: share of pictures whose class is among the five most probable; None for ten classes or fewer.
        level: of the intervals.
    """

    overall: Share
    per_class: dict[str, Share]
    confusion: np.ndarray
    confidence: float
    top5: float | None
    level: float

    @property
    def accuracy(self) -> float:
        """Share recognised over all pictures, in [0, 1]."""
        assert self.overall.share is not None
        return self.overall.share

    @property
    def is_large(self) -> bool:
        """Whether there are too many classes for the matrix to be written or read number by number."""
        return len(self.per_class) > _ANNOTATED

    def largest_confusions(self) -> list[dict[str, Any]]:
        """The most frequent ones: class `asked_for`, class `recognised_as`, and `count`; at most 20, none of 0."""
        names, mistaken = list(self.per_class), self.confusion.copy()
        np.fill_diagonal(mistaken, 0)
        order = np.argsort(-mistaken, axis=None, kind="stable")[:_LARGEST]
        pairs = zip(*np.unravel_index(order, mistaken.shape), strict=True)
        return [
            {"asked_for": names[row], "recognised_as": names[column], "count": int(mistaken[row, column])}
            for row, column in pairs
            if mistaken[row, column]
        ]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON holds it: of more than 30 classes the largest confusions in place of the matrix."""
        tree = dataclasses.asdict(self)
        confusion = tree.pop("confusion")
        if self.is_large:
            return {**tree, "largest_confusions": self.largest_confusions()}
        return {**tree, "confusion": confusion.tolist()}


def class_fidelity(
    probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str], level: float = 0.95
) -> ClassFidelity:
    """Compare what a judge says with the classes asked for.

    Args:
        probabilities: float (N, K), as `Classifier.predict` gives them; of equal ones the lowest label counts.
        labels: int (N,), the classes asked for, in 0 .. K - 1.
        class_names: K names in label order.
        level: of the intervals.

    Raises:
        UserError: no pictures, not one label for each, a label outside the classes, or a level outside (0, 1).
    """
    classes, labels = len(class_names), np.asarray(labels, dtype=np.int64)
    assert probabilities.ndim == 2
    assert probabilities.shape[1] == classes
    if len(labels) != len(probabilities) or not len(labels):
        raise UserError(
            f"{len(probabilities)} pictures and {len(labels)} labels: expected one label for each of one or more"
        )
    if labels.min() < 0 or labels.max() >= classes:
        outside = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(
            f"label {outside} is asked for, the judge knows 0 .. {classes - 1}: use a judge of the same data"
        )
    recognised = probabilities.argmax(axis=1)
    confusion = np.bincount(labels * classes + recognised, minlength=classes**2).reshape(classes, classes)
    top5 = None
    if classes > 10:
        highest = np.argsort(-probabilities, axis=1, kind="stable")[:, :_TOP]
        top5 = float((highest == labels[:, None]).any(axis=1).mean())
    per_class = {
        name: _share(int(confusion[label, label]), int(confusion[label].sum()), level)
        for label, name in enumerate(class_names)
    }
    return ClassFidelity(
        overall=_share(int(confusion.trace()), len(labels), level),
        per_class=per_class,
        confusion=confusion,
        confidence=float(probabilities.max(axis=1).mean()),
        top5=top5,
        level=level,
    )


def _share(correct: int, count: int, level: float) -> Share:
    return Share(correct, count, correct / count if count else None, wilson_interval(correct, count, level))


def confusion_picture(fidelity: ClassFidelity) -> Image.Image:
    """Draw which classes are taken for which: a row for each class asked for, its shares as shades and numbers.

    Up to 30 classes are named and their shares written; of more, the shades alone are shown.

    Returns:
        An RGB picture; `util.pictures.save_png` writes it.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: run pip install 'edt-diffusion[train]'") from None
    names, confusion = list(fidelity.per_class), fidelity.confusion
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    annotated = not fidelity.is_large
    side = 2.4 + (0.42 * len(names) if annotated else 6.0)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shades = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(shades, ax=axes, label="share of the class asked for", shrink=0.8)
    axes.set_xlabel("recognised as")
    axes.set_ylabel("asked for")
    low, high = fidelity.overall.interval
    axes.set_title(
        f"class fidelity {fidelity.accuracy:.1%} ({fidelity.level:.0%}: {low:.1%} to {high:.1%})", fontsize=10
    )
    if annotated:
        shown = [name if len(name) <= 18 else name[:17] + "…" for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90)
        axes.set_yticks(range(len(names)), shown)
        for row, column in zip(*np.nonzero(confusion), strict=True):
            share = shares[row, column]
            text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8, color="white" if share > 0.6 else "black"
            )
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
