"""What a quality table is: arms that are trained, variants in which they are sampled, and how the page is laid out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import Base
from .published import Published

# What a setting may say depends on the base where it names blocks of the network.
Settings = Mapping[str, Any] | Callable[[Base], Mapping[str, Any]]


def settled(settings: Settings, base: Base) -> dict[str, Any]:
    """The settings for a base."""
    return dict(settings(base) if callable(settings) else settings)


@dataclass(frozen=True)
class ArmOf:
    """One way of training.

    Attributes:
        name: in file names.
        title: for people.
        backbone: a name of `models.BACKBONES`.
        settings: dotted, over those of the base and of the backbone's layout.
    """

    name: str
    title: str
    backbone: str = "EDT"
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class VariantOf:
    """One way of sampling: fields of `sampling.settings.SamplingSetting` over those of the budget."""

    name: str
    title: str
    sampling: Settings = field(default_factory=dict)


PLAIN = VariantOf("plain", "")

# Columns of scores: what they are called, and whether less is better.
METRICS: dict[str, str] = {
    "fid": "Fréchet distance", "is": "IS", "sfid": "sFID", "precision": "precision", "recall": "recall",
}  # fmt: skip
DEFAULT_METRICS = ("fid", "is")
ALL_METRICS = tuple(METRICS)


@dataclass(frozen=True)
class Study:
    """A quality table or figure.

    Attributes:
        title: what it shows.
        arms: what is trained.
        variants: how each arm is sampled.
        metrics: columns, as far as the extractor has them.
        points: shares of the budget at which there is a row.
        baseline: arm and variant that the others are compared with, seed by seed; None compares none.
        published: (arm, variant, size) -> metric -> the paper's value, for 256 pixels.
        published_of: what these values are of, said where they are shown.
        differs: in what this differs from the paper's by design, a sentence each.
        notes: a sentence each.
        speed: whether training steps and forward passes are timed side by side.
        doubled: whether pictures have twice the usual side.
        figure: "bars", "curves", "pictures" or "losses"; None is bars.
        single: one seed is enough, and no score is shown.
    """

    title: str
    arms: tuple[ArmOf, ...]
    variants: tuple[VariantOf, ...] = (PLAIN,)
    metrics: tuple[str, ...] = DEFAULT_METRICS
    points: tuple[float, ...] = (1.0,)
    baseline: tuple[str, str] | None = None
    published: Mapping[tuple[str, str, str], Mapping[str, Published]] = field(default_factory=dict)
    published_of: str = ""
    differs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    speed: bool = False
    doubled: bool = False
    figure: str | None = None
    single: bool = False

    def places_amm(self) -> bool:
        """Whether an arm or a variant modulates the blocks that the base names."""
        return any(callable(each) for each in (*(a.settings for a in self.arms), *(v.sampling for v in self.variants)))

    def reference(self) -> str:
        """The arm that speeds are compared with."""
        return next((arm.name for arm in self.arms if arm.backbone == "MDTv2"), self.arms[0].name)
