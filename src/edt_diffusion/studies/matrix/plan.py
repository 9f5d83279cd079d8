"""A matrix of trainings as data: what is compared, at which budget, how it is sampled and scored."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ...config import RunConfig, load_config
from ...evaluation.measure import choose_metrics
from ...sampling.labels import POLICIES
from ...sampling.settings import SamplingSetting, parse_setting
from ...training.pace import Pace
from ...util.errors import UserError
from .budget import Budget

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*(-[A-Za-z0-9_.+]+)*")

# What a training of a matrix is not to do by itself: its samples and scores are made afterwards, from the points.
_QUIET: Mapping[str, Any] = {
    "train.sample_every": 0,
    "train.save_every": 1_000_000_000,  # by the clock instead
    "train.keep_checkpoints": 1,
    "evaluation": {},
    "optimizer.decay_steps": None,
}


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: in names of files: letters, digits, "_", ".", "+" and "-".
        title: for people.
        settings: of the configuration, by dotted names, over those of the matrix; a group such as "model" may be
            replaced as a whole by a mapping.
    """

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One way of sampling what was trained.

    Attributes:
        name, title: as of an arm.
        sampling: fields of `sampling.settings.SamplingSetting`; attention modulation is off unless they say otherwise.
    """

    name: str
    title: str
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def setting(self) -> SamplingSetting:
        """The fields, checked."""
        return parse_setting({"amm": "off", **self.sampling})


@dataclass(frozen=True)
class Matrix:
    """Arms x seeds, each trained within the same budget, kept at points, sampled in variants and scored.

    Attributes:
        base: preset or YAML file that all arms start from.
        arms: what is trained.
        budget: of each run.
        settings: of the configuration, for all arms, over those of the base.
        variants: how each is sampled.
        seeds: `seed` of the configuration; runs of one seed see the same pictures, noise and timesteps.
        points: shares of the budget at which the averaged weights are kept and scored.
        images: samples per point and variant; 0 trains only.
        extractor: as `evaluation.extractors.open_extractor` takes it.
        score_size: height and width that samples, reference and ceiling are brought to before the extractor; None
            gives them as they are.
        metrics: names, or None for the usual ones that are possible.
        reference: real pictures or their statistics; None takes those that are trained on.
        ceiling: held-out real pictures, scored in place of samples: what a perfect model would get; None is none.
        labels: which classes are sampled; see `sampling.labels.choose_labels`.
        sample_seed: sample i is made from the same noise in all arms, seeds, points and variants.
        batch: pictures sampled at once; None is 64, and 16 where an autoencoder decodes them.
        save_every: charged seconds between two checkpoints of a run.
        keep: what stays of samples that are scored; see `evaluation.sweep.Evaluation`.
    """

    base: str
    arms: tuple[Arm, ...]
    budget: Budget
    settings: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[Variant, ...] = (Variant("plain", "as trained"),)
    seeds: tuple[int, ...] = (0,)
    points: tuple[float, ...] = (1.0,)
    images: int = 2000
    extractor: str = "inception"
    score_size: int | None = None
    metrics: tuple[str, ...] | None = None
    reference: str | None = None
    ceiling: str | None = None
    labels: str = "balanced"
    sample_seed: int = 1
    batch: int | None = None
    save_every: float = 60.0
    keep: Literal["none", "features", "pictures"] = "features"

    def __post_init__(self) -> None:
        for what, entries in (("arm", self.arms), ("variant", self.variants)):
            names = [entry.name for entry in entries]
            if not names:
                raise UserError(f"a matrix without any {what}: name at least one")
            for name in names:
                if not _NAME.fullmatch(name):
                    raise UserError(f"{what} {name!r}: expected letters, digits, '_', '.', '+' and '-' in its name")
                if names.count(name) > 1:
                    raise UserError(f"two {what}s are called {name!r}: give each its own name")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds {list(self.seeds)}: expected at least one, and each once")
        rising = all(a < b for a, b in zip(self.points, self.points[1:], strict=False))
        if not self.points or not rising or not all(0 < point <= 1 for point in self.points):
            raise UserError(f"points {list(self.points)}: expected rising shares of the budget, above 0 and up to 1")
        if self.images < 0 or self.images == 1:
            raise UserError(f"images={self.images}: expected at least 2 samples to score, or 0 to train only")
        if self.score_size is not None and self.score_size < 1:
            raise UserError(f"score_size={self.score_size}: expected a side in pixels, of at least 1")
        if self.labels not in POLICIES:
            raise UserError(f"labels={self.labels!r}: expected {', '.join(POLICIES)}")
        if self.metrics is not None:
            choose_metrics(",".join(self.metrics))
        for variant in self.variants:
            variant.setting()

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def config(self, arm: Arm, seed: int, source: str | Path | None = None) -> RunConfig:
        """The configuration of one run.

        Args:
            arm: which.
            seed: which.
            source: the base as it was when the matrix was begun; None reads it anew.

        Raises:
            UserError: a setting that is unknown or does not fit.
        """
        given = {**_QUIET, **self.settings, **arm.settings}
        try:
            # What an arm says of a setting within a group that another layer replaces is said after it.
            words = [f"{name}={_yaml(value)}" for name, value in sorted(given.items(), key=lambda each: "." in each[0])]
            config = load_config(source or self.base, [*words, f"seed={seed}"])
            self.budget.check(config.optimizer)
            if self.budget.kind == "cpu" and config.data.workers:
                raise UserError(
                    f"data.workers={config.data.workers} with a budget of CPU time, which counts one process only: "
                    "leave it out"
                )
        except UserError as error:
            raise UserError(f"arm {arm.name!r}: {error}") from None
        data, steps = config.data, self.budget.steps(config.train.batch_size)
        if self.budget.kind == "cpu":
            data = data.model_copy(update={"workers": 0})
        return config.model_copy(update={"data": data, "train": config.train.model_copy(update={"steps": steps})})

    def pace(self, config: RunConfig, kept: Mapping[float, Path]) -> Pace:
        """The budget of one run as its trainer takes it; `kept` says where each point's weights go."""
        allowed = self.budget.allowed(config.train.batch_size)
        return Pace(self.budget.unit, allowed, kept, self.save_every)

    def as_tree(self) -> dict[str, Any]:
        """Plain values, for `matrix.json`."""
        tree = dataclasses.asdict(self)
        return {**tree, "budget": str(self.budget)}

    @classmethod
    def of_tree(cls, tree: Mapping[str, Any]) -> "Matrix":
        """What `as_tree` gave, perhaps after it was JSON."""

        def entries(kind: Any, values: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
            return tuple(kind(**value) for value in values)

        made = {
            **tree,
            "arms": entries(Arm, tree["arms"]),
            "variants": entries(Variant, tree["variants"]),
            "budget": Budget.parse(tree["budget"]),
        }
        for name in ("seeds", "points", "metrics"):
            made[name] = None if tree[name] is None else tuple(tree[name])
        return cls(**made)


def _yaml(value: Any) -> str:
    """A value as one line of YAML."""
    return yaml.safe_dump(_plain(value), default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
