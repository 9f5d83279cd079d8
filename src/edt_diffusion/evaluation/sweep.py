"""From samples to results: one setting after another, each kept as soon as it is done.

In the folder of an evaluation lie `evaluation.json` (what all its results share), one JSON per result, `table.md`,
`table.csv`, `pareto.png`, and `features/`, from which an interrupted sweep goes on and a later metric is computed
without sampling anew.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..sampling.labels import FIXED_SHARES
from ..sampling.samples import Samples
from ..sampling.settings import SamplingSetting
from ..util.errors import UserError
from ..util.files import atomic_write_json, make_folder
from ..util.progress import CountProgress
from .digests import digest_of
from .extractors.base import Extractor
from .feature_set import FeatureSet
from .judging import Judging
from .measure import measure
from .metrics import MetricSettings, paired_difference
from .parts import FeatureParts, Gathered, MakePictures
from .pixels import PictureSource
from .reference import Known
from .report import write_tables
from .result import PROTOCOL, SHARED, Result, environment

PICTURES = "pictures"

Keep = Literal["none", "features", "pictures"]

# Sets of so many bytes of pixels are kept beside their features, larger ones only if somebody needs them.
_SMALL_BYTES = 1 << 30


@dataclass
class Evaluation:
    """What all results of one folder share.

    Attributes:
        out: the folder.
        extractor: of the features.
        reference: real pictures or statistics of them, or None.
        samples: facts of the samples for the manifest: `count`, `labels` (the policy), `seed`, `size` and so on.
        model: facts of the model for the manifest; None for pictures that were there.
        metrics: names of `METRICS`, or None for the usual ones.
        settings: of the metrics.
        labels: int64 (count,), the classes of the samples, or None.
        judging: class fidelity and memorisation, or None.
        needs_pictures: whether the samples themselves are needed, for judging or for a file.
        keep: what stays when the sweep is done: "features", from which later metrics are computed, and small sets of
            samples, which can be judged later; "pictures" of any size too; or "none".
        quiet: no progress.
        rank, world_size: of the processes that share the sampling.
        device: that of the network.
        notes: what a reader of the table should be told.
    """

    out: Path
    extractor: Extractor
    reference: Known | None
    samples: dict[str, Any]
    model: dict[str, Any] | None = None
    metrics: Sequence[str] | None = None
    settings: MetricSettings = field(default_factory=MetricSettings)
    labels: np.ndarray | None = None
    judging: Judging | None = None
    needs_pictures: bool = False
    keep: Keep = "features"
    quiet: bool = True
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)

    def shared(self) -> dict[str, Any]:
        """What is the same for all results of the folder."""
        return {
            "protocol": PROTOCOL,
            "samples": self.samples,
            "model": self.model,
            "extractor": self.extractor.identity(),
            "reference": None if self.reference is None else {**self.reference.facts, "sha256": self.reference.sha256},
            "settings": self.settings.model_dump(mode="json"),
        }

    def begin(self) -> None:
        """Make the folder, or make sure that it is of this evaluation.

        Raises:
            UserError: it holds results of another evaluation, or cannot be written to.
        """
        make_folder(self.out)
        path = self.out / SHARED
        self.all_results()  # a folder with JSON files of other kinds is refused
        here = json.loads(json.dumps(self.shared()))
        try:
            there = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            if self.rank == 0:
                atomic_write_json(path, here)
            return
        except ValueError:
            there = None
        if not isinstance(there, dict):
            raise UserError(f"{path} is damaged: remove it, or name another folder by --out")
        changed = [name for name in here if _content(here[name]) != _content(there.get(name))]
        if changed:
            raise UserError(
                f"{self.out} holds results of another evaluation (other {', '.join(changed)}): name another folder by "
                "--out"
            )

    def run(self, plan: Sequence[Samples]) -> list[Result]:
        """Evaluate the samples of several settings, in their order; what is done already is not done again.

        Along each axis of the sweep a setting is compared with the one that has the first value there and is equal
        otherwise, from the same seeds. Metrics that a result has from an earlier run stay in it.

        Returns:
            The results; none on processes other than the main one.
        """
        self.begin()
        results: list[Result] = []
        for number, samples in enumerate(plan):
            result = None
            if not (self.rank and self.needs_pictures):  # only the main process knows how it is judged
                result = self.known(slug(samples.setting), sampling=samples.facts())
            if result is None:
                label, name = samples.setting.label(), slug(samples.setting)
                gathered = self.gather(
                    self.parts(samples), samples.make, f"setting {number + 1} of {len(plan)} ({label})"
                )
                if gathered is None:
                    continue
                result = self.result(label, name, gathered, gathered.extras.get(PICTURES), samples.facts())
                self.save(result, name)
            if self.rank == 0:
                results.append(result)
                write_tables(self.out, self.all_results())
        if self.rank == 0 and self._compare(plan, results):
            write_tables(self.out, self.all_results())
        return results

    def _compare(self, plan: Sequence[Samples], results: Sequence[Result]) -> bool:
        """Add the differences along each axis that are not there yet; whether any was added."""
        reference = None if self.reference is None else self.reference.features
        if reference is None:
            return False
        settings = [samples.setting for samples in plan]
        varied = [axis for axis in SamplingSetting.model_fields if len({getattr(each, axis) for each in settings}) > 1]
        changed = False
        for samples, result in zip(plan, results, strict=True):
            wanted = partners(samples.setting, settings)
            found = {axis: old for axis, old in (result.against or {}).items() if axis in wanted or axis not in varied}
            for axis, partner in wanted.items():
                other = settings.index(partner)
                to = SamplingSetting.shown(axis, getattr(partner, axis))
                both_have = "fid" in result.metrics and "fid" in results[other].metrics
                if not both_have or found.get(axis, {}).get("label") == partner.label():
                    continue
                here, there = self.parts(samples), self.parts(plan[other])
                if not (here.is_whole() and there.is_whole()):
                    self.notes.append(f"{result.label}: no difference to {to}, since features were not kept (--keep)")
                    continue
                pair = self._told(here.load().features), self._told(there.load().features)
                estimate = paired_difference(*pair, reference, "fid", self.settings)
                found[axis] = {
                    "to": to, "label": partner.label(), "metric": "fid", "difference": estimate.value,
                    "low": estimate.low, "high": estimate.high, "error": estimate.error,
                }  # fmt: skip
            if found != (result.against or {}):
                result.against, changed = found or None, True
                result.save(self.out / f"{slug(samples.setting)}.json")
        return changed

    def gather(self, parts: FeatureParts, make: MakePictures, what: str) -> Gathered | None:
        """The features of one set; None on processes other than the main one."""
        with CountProgress(what, "pictures", self.quiet or self.rank > 0) as told:
            return parts.gather(
                make,
                self.extractor,
                rank=self.rank,
                world_size=self.world_size,
                progress=lambda done, total: told(done, total),
                extras={PICTURES: lambda pictures: pictures} if self._with_pictures() else {},
            )

    def result(
        self,
        label: str,
        name: str,
        gathered: Gathered,
        pictures: np.ndarray | PictureSource | None,
        sampling: dict[str, Any] | None = None,
    ) -> Result:
        """Measure one set of pictures.

        Args:
            label: see `Result`.
            name: of its files, without an extension.
            gathered: the features.
            pictures: the set itself, for judging.
            sampling: facts for the manifest; None for pictures that were there.
        """
        known = None if self.reference is None else self.reference.features
        features = self._told(gathered.features)
        numbers, warnings = measure(features, known, self.extractor, self.metrics, self.settings)
        warnings += [] if self.reference is None else self.reference.notes
        manifest = {**self.shared(), "sampling": sampling, "environment": environment(self.device)}
        manifest["judged_by"] = None if self.judging is None else self.judging.identity
        manifest["samples"] = {**self.samples, "sha256": gathered.pictures_sha256}
        seconds = gathered.seconds if sampling is not None else None
        result = Result(label, numbers, manifest, seconds, warnings=warnings)
        if self.judging is not None:
            assert pictures is not None
            self.judging(result, pictures, self.labels, self.out / name)
        return result

    def _told(self, features: FeatureSet) -> FeatureSet:
        """Features that know whether their classes were chosen or drawn."""
        return replace(features, stratified=self.samples["labels"] in FIXED_SHARES)

    def save(self, result: Result, name: str) -> None:
        """Write a result, adding what was measured of the same pictures before and is not in it."""
        path = self.out / f"{name}.json"
        if path.is_file():
            earlier, manifest = Result.load(path), result.manifest
            if _same_pictures(earlier, result):
                result.metrics = {**earlier.metrics, **result.metrics}
                result.against = earlier.against
                result.warnings = list(dict.fromkeys([*earlier.warnings, *result.warnings]))
                if self.judging is None:
                    result.judge, result.memorisation = earlier.judge, earlier.memorisation
                    manifest["judged_by"] = earlier.manifest.get("judged_by")
        result.save(path)

    def _with_pictures(self) -> bool:
        return self.model is not None and (self.needs_pictures or self.keep == "pictures" or self._small())

    def _small(self) -> bool:
        return self.picture_bytes() <= _SMALL_BYTES

    def picture_bytes(self) -> int:
        """Size of one setting's samples."""
        return int(self.samples["count"]) * int(np.prod(self.samples["size"])) * int(self.samples["channels"])

    def disk_bytes(self, settings: int) -> int:
        """About what the features of so many settings, and the samples that are kept with them, take on the disk."""
        features = 4 * int(self.samples["count"]) * self.extractor.dimensions
        return settings * (features + (self.picture_bytes() if self._with_pictures() else 0))

    def tidy(self, plan: Sequence[Samples]) -> None:
        """Remove what is not to be kept; see `keep`."""
        if self.rank or self.keep == "pictures":
            return
        for samples in plan:
            plain, full = self._places(samples)
            if self.keep == "none":
                plain.remove()
                full.remove()
            elif not self._small():
                if full.is_whole() and not plain.is_whole():
                    full.replace(plain)  # first: who looks for samples in the other place finds them or nothing
                full.remove()
                plain.drop(PICTURES)

    def all_results(self) -> list[Result]:
        """Every result in the folder, by name, the numbers in names by size."""
        paths = [path for path in self.out.glob("*.json") if path.name != SHARED]
        return [Result.load(path) for path in sorted(paths, key=lambda path: _by_size(path.stem))]

    def known(
        self, name: str, pictures_sha256: str | None = None, sampling: dict[str, Any] | None = None
    ) -> Result | None:
        """The result of that name that is there, if it has all that is asked for.

        Args:
            name: of its file, without an extension.
            pictures_sha256: what it must be of, where pictures were there.
            sampling: how its samples must have been made, where they were sampled.
        """
        path = self.out / f"{name}.json"
        if not path.is_file():
            return None
        result = Result.load(path)
        whole = set(self.metrics or ()) <= set(result.metrics)
        judged = self.judging is None or result.manifest.get("judged_by") == self.judging.identity
        same = result.manifest["sampling"] == sampling
        if pictures_sha256 is not None:
            same = same and result.manifest["samples"].get("sha256") == pictures_sha256
        return result if whole and same and judged else None

    def parts(self, samples: Samples) -> FeatureParts:
        """Where the features of a setting are gathered."""
        plain, full = self._places(samples)
        if self._small() or (plain.has(PICTURES) and not full.is_whole()):
            return plain
        return full if self._with_pictures() or full.is_whole() else plain

    def _places(self, samples: Samples) -> tuple[FeatureParts, FeatureParts]:
        """Where features lie alone (or with a small set of samples), and where with a large one."""
        packages = environment("cpu")["packages"]
        shared = {
            name: _content(facts) for name, facts in self.shared().items() if name not in ("reference", "settings")
        }
        key = [
            shared, samples.facts(), samples.batch, torch.device(self.device).type,
            torch.get_float32_matmul_precision(),
            [packages[name] for name in ("edt-diffusion", "torch", "diffusers")],
        ]  # fmt: skip
        name, count = digest_of(key)[:16], int(self.samples["count"])
        plain = FeatureParts(self.out / "features" / name, count, samples.batch, self.labels)
        full = FeatureParts(self.out / "features" / f"{name}-{PICTURES}", count, samples.batch, self.labels)
        return plain, full


def partners(setting: SamplingSetting, plan: Sequence[SamplingSetting]) -> dict[str, SamplingSetting]:
    """With which settings of a sweep one is compared: by axis, the one with that axis's first value, else equal."""
    out = {}
    for axis in SamplingSetting.model_fields:
        partner = setting.model_copy(update={axis: getattr(plan[0], axis)})
        if partner != setting and partner in plan:
            out[axis] = partner
    return out


def _same_pictures(one: Result, other: Result) -> bool:
    digests = [result.manifest.get("samples", {}).get("sha256") for result in (one, other)]
    return digests[0] == digests[1] and one.manifest.get("sampling") == other.manifest["sampling"]


def _by_size(name: str) -> list[tuple[bool, float, str]]:
    """A key that sorts "a-2" before "a-10" and "a-1.5" after "a-1"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(number % 2 == 1, float(part) if number % 2 else 0.0, part) for number, part in enumerate(parts)]


def slug(setting: SamplingSetting) -> str:
    """A file name for a setting, different for different ones."""
    return setting.label().replace(" ", "_").replace("=", "-").replace("/", "-")


def _content(facts: Any) -> Any:
    """Facts without what says only where something lay."""
    return {name: value for name, value in facts.items() if name != "from"} if isinstance(facts, dict) else facts
