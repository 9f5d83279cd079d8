"""Evaluation as a callback of the trainer: the metrics of `edt evaluate` while a run trains."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..sampling.labels import FIXED_SHARES
from ..sampling.samples import Samples
from ..util.errors import UserError
from ..util.files import make_folder
from .digests import combined_digest, picture_digests
from .extract import arrays_of, joined
from .extractors.base import Extractor
from .measure import measure, possible_metrics
from .metrics import MetricSettings
from .pixels import colour_tensor
from .reference import Known
from .result import PROTOCOL, Result, environment


class MetricsDuringTraining:
    """Makes the same samples every time it is called, and measures them; every process of the job calls it.

    Args:
        samples: made with the weights that are in the network when this is called.
        extractor: of the features, on this process's device.
        reference: real pictures, or statistics of them.
        facts: of the samples for the manifest; see `sweep.Evaluation`.
        accelerator: the processes that share the work.
        folder: of the results, `step-00001000.json` and so on, which `edt compare` takes.
        metrics: names, or None for the usual ones.
        settings: of the metrics.

    Calling it with the number of steps made returns, on the main process, each metric by its name.
    """

    def __init__(
        self,
        samples: Samples,
        extractor: Extractor,
        reference: Known,
        facts: dict[str, Any],
        accelerator: Accelerator,
        folder: Path,
        metrics: Sequence[str] | None = None,
        settings: MetricSettings | None = None,
    ) -> None:
        self.samples, self.extractor, self.reference = samples, extractor, reference
        self.facts, self.accelerator, self.folder = facts, accelerator, folder
        self.metrics, self.settings = metrics, settings or MetricSettings()

    def check(self) -> None:
        """Raise a `UserError` where a metric cannot be had of so many pictures, this extractor and this reference.

        It is told before the training, not at its first evaluation.
        """
        size, count = (int(self.facts["size"][0]), int(self.facts["size"][1])), len(self.samples)
        try:
            possible_metrics(self.extractor, size, self.reference.features, self.metrics, count, self.settings)
        except UserError as error:
            raise UserError(f"evaluation.samples={count} cannot be measured: {error}") from None

    def __call__(self, step: int) -> dict[str, float]:
        begun = time.perf_counter()
        mine = self._batches()
        gathered = dict(gather_object(mine)) if self.accelerator.num_processes > 1 else dict(mine)
        if not self.accelerator.is_main_process:
            return {}
        parts = [gathered[number] for number in sorted(gathered)]
        whole = joined([part["arrays"] for part in parts], self.samples.labels)
        features = replace(whole, stratified=self.facts["labels"] in FIXED_SHARES)
        numbers, warnings = measure(features, self.reference.features, self.extractor, self.metrics, self.settings)
        warnings += self.reference.notes
        manifest = {
            "protocol": PROTOCOL,
            "samples": {**self.facts, "sha256": combined_digest(part["digest"] for part in parts)},
            "model": {"step": step},
            "sampling": self._sampling(),
            "extractor": self.extractor.identity(),
            "reference": {**self.reference.facts, "sha256": self.reference.sha256},
            "settings": self.settings.model_dump(mode="json"),
            "environment": environment(self.accelerator.device),
        }
        seconds = sum(part["seconds"] for part in parts) / len(self.samples)
        make_folder(self.folder)
        result = Result(f"step {step}", numbers, manifest, seconds, warnings=warnings)
        result.save(self.folder / f"step-{step:08d}.json")
        values = {name: float(found["value"]) for name, found in numbers.items()}
        return {**values, "evaluation_seconds": time.perf_counter() - begun}

    def _sampling(self) -> dict[str, Any]:
        facts = self.samples.facts()
        precision = self.accelerator.mixed_precision  # the forward passes of the network keep it
        return facts if precision == "no" else {**facts, "precision": f"{precision} autocast"}

    def _batches(self) -> list[tuple[int, dict[str, Any]]]:
        """This process's batches by number. A sharded network needs every process in every forward pass."""
        size, count, world = self.samples.batch, len(self.samples), self.accelerator.num_processes
        number_of = -(-count // size)
        out = []
        for turn in range(-(-number_of // world)):
            number = turn * world + self.accelerator.process_index
            start = min(number, number_of - 1) * size
            pictures, seconds = self.samples.make(start, min(start + size, count))
            if number >= number_of:
                continue  # took part, and counts for nothing
            labels = None if self.samples.labels is None else self.samples.labels[start : start + len(pictures)]
            part = {
                "arrays": arrays_of(self.extractor(colour_tensor(pictures))),
                "seconds": seconds,
                "digest": picture_digests(pictures, labels),
            }
            out.append((number, part))
        return out
