"""One result: what was measured, and everything it depends on.

A result is a JSON file with `label`, `metrics`, `manifest` and more; see `Result`. The manifest is what makes two
numbers comparable, or says why they are not (`comparison`).
"""

import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..util.errors import UserError
from ..util.files import atomic_write_json

# Raise it when a metric comes to give another number for the same features.
PROTOCOL = 1

# What all results of a folder share, beside them.
SHARED = "evaluation.json"

# The label policy of pictures from elsewhere.
AS_FOUND = "as found"

_PACKAGES = ("edt-diffusion", "torch", "diffusers", "numpy", "pillow", "transformers")


@dataclass
class Result:
    """What was measured at one setting.

    Attributes:
        label: short name, such as "guidance=2 amm=on".
        metrics: of each metric `value`, `low`, `high` (the interval), `error`, `label`, `lower_is_better`, `notes`.
        manifest: what the numbers depend on: `samples`, `model`, `sampling`, `extractor`, `reference`, `settings` (of
            the metrics) and `environment`.
        seconds_per_image: what sampling took, None for pictures that were there.
        against: by axis of a sweep, the difference of the Fréchet distances to the setting with the first value of that
            axis and all else equal, from the same seeds.
        judge: class fidelity, if it was judged.
        memorisation: nearest neighbours in the training set, if they were looked for.
        warnings: what a reader must know.
    """

    label: str
    metrics: dict[str, dict[str, Any]]
    manifest: dict[str, Any]
    seconds_per_image: float | None = None
    against: dict[str, Any] | None = None
    judge: dict[str, Any] | None = None
    memorisation: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write as JSON, in one step."""
        atomic_write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Read what `save` wrote.

        Raises:
            UserError: missing, or not a result.
        """
        try:
            tree = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: expected a result of edt evaluate") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): expected a result of edt evaluate") from None
        known = set(cls.__dataclass_fields__)
        if not _is_result(tree, known):
            raise UserError(f"{path} is no result of edt evaluate: expected JSON with label, metrics and manifest")
        return cls(**tree)


def _is_result(tree: Any, known: set[str]) -> bool:
    if not isinstance(tree, dict) or not {"label", "metrics", "manifest"} <= set(tree) <= known:
        return False
    numbers = tree["metrics"]
    return (
        isinstance(tree["label"], str)
        and isinstance(tree["manifest"], dict)
        and isinstance(numbers, dict)
        and all(isinstance(one, dict) and {"value", "low", "high", "label"} <= set(one) for one in numbers.values())
    )


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions and hardware, for the manifest."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.device(device)
    return {
        "packages": versions,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def load_results(paths: Sequence[Path]) -> list[tuple[str, Result]]:
    """Results of files, of folders, and of the evaluations below run folders and their `evaluation`, with their names.

    Raises:
        UserError: a file is no result, a folder holds none, or fewer than one is named.
    """
    out: list[tuple[str, Result]] = []
    for path in paths:
        if path.is_dir():
            # A run folder has JSON files of other kinds beside them.
            below = [*path.glob("evaluation/*.json"), *path.glob("evaluation/*/*.json")]
            inside = [file for shared in path.glob(f"*/{SHARED}") for file in shared.parent.glob("*.json")]
            files = sorted(below or [*path.glob("*.json"), *inside])
            found = [(str(file), Result.load(file)) for file in files if file.name != SHARED]
            if not found:
                raise UserError(f"{path} holds no results: expected a folder of edt evaluate")
            out += found
        elif path.name != SHARED:
            out.append((str(path), Result.load(path)))
    if not out:
        raise UserError("no results were named: expected JSON files of edt evaluate")
    return out
