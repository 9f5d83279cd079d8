"""The files of the authors' layout: a folder of features and one of labels, a numbered `.npy` file of each picture."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...util.errors import UserError

CLASSES = "classes.json"


@dataclass(frozen=True)
class NpyPair:
    """The two folders, and the names without extension of the files that are in both, by number."""

    features: Path
    labels: Path
    numbers: list[str]
    unlabelled: bool
    class_names: list[str] | None

    def feature(self, row: int) -> Path:
        return self.features / f"{self.numbers[row]}.npy"

    def latent(self, row: int) -> np.ndarray:
        """float32 of shape (C, h, w)."""
        path = self.feature(row)
        values = _load(path)
        if values.ndim == 4 and values.shape[0] == 1:
            values = values[0]
        if values.ndim != 3 or values.dtype.kind != "f" or not values.size:
            raise UserError(f"{str(path)!r} holds {_form(values)}: expected float32 of shape (1, C, h, w)")
        return values.astype(np.float32)

    def label(self, row: int) -> int:
        path = self.labels / f"{self.numbers[row]}.npy"
        values = _load(path)
        if values.size != 1 or values.dtype.kind not in "iu":
            raise UserError(f"{str(path)!r} holds {_form(values)}: expected int64 of shape (1,)")
        label = int(values.reshape(()))
        if not 0 <= label < len(self.class_names or range(2**31)):
            known = f", and {CLASSES} names {len(self.class_names)} classes" if self.class_names else ""
            raise UserError(f"{str(path)!r} holds the label {label}{known}: expected the number of a class")
        return label


def is_npy_layout(source: Path) -> bool:
    """Whether a folder is one of the pair, or holds them."""
    return source.is_dir() and (source.name.endswith("_features") or bool(_features_in(source)))


def _features_in(source: Path) -> list[Path]:
    return sorted(path for path in source.iterdir() if path.name.endswith("_features") and path.is_dir())


def find_pair(source: Path) -> NpyPair:
    """List the two folders.

    Args:
        source: the folder of features, or the one in which it and the folder of labels lie.

    Raises:
        UserError: it is neither, a file is missing in one of the two, or does not belong there.
    """
    source = Path(os.path.abspath(source.expanduser()))
    if not source.is_dir():
        raise UserError(f"{str(source)!r} is no folder: expected imagenet256_features, or the folder it lies in")
    features = source
    if not source.name.endswith("_features"):
        found = _features_in(source)
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise UserError(f"{str(source)!r} has to hold one folder *_features, it holds {names}: name the folder")
        features = found[0]
    labels = features.with_name(features.name.removesuffix("features") + "labels")
    if not labels.is_dir():
        raise UserError(f"{str(labels)!r} does not exist: expected the labels beside {features.name}")
    of_features, of_labels = _numbered(features), _numbered(labels)
    for here, there, other in ((of_features, of_labels, labels), (of_labels, of_features, features)):
        if alone := sorted(here.keys() - there.keys()):
            more = f" (and {len(alone) - 1} more)" if alone[1:] else ""
            raise UserError(
                f"{str(other / here[alone[0]])!r}.npy does not exist{more}: expected a file for each in "
                f"{(features if other == labels else labels).name}".replace("'.npy", ".npy'")
            )
    numbers = sorted(of_features)
    if not numbers:
        raise UserError(f"{str(features)!r} holds no files: expected 0.npy, 1.npy, ...")
    for number in numbers:
        if of_features[number] != of_labels[number]:
            raise UserError(
                f"{str(features / of_features[number])!r} and {str(labels / of_labels[number])!r} (.npy) are written "
                "differently: give both the same name"
            )
    unlabelled, names = _read_classes(features.parent / CLASSES)
    return NpyPair(features, labels, [of_features[number] for number in numbers], unlabelled, names)


def _numbered(folder: Path) -> dict[int, str]:
    """Number -> name without extension of each file; hidden files do not count."""
    found: dict[int, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name, extension = os.path.splitext(entry.name)
            if extension != ".npy" or not re.fullmatch("[0-9]{1,18}", name) or not entry.is_file():
                raise UserError(f"{entry.path!r} does not belong there: expected only 0.npy, 1.npy, ...; move it away")
            if found.setdefault(int(name), name) != name:
                raise UserError(f"{entry.path!r} has the number of {found[int(name)]}.npy: remove one of them")
    return found


def _read_classes(path: Path) -> tuple[bool, list[str] | None]:
    """Whether the pictures have no labels, and the names of the classes if they are known."""
    try:
        names = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return False, None
    except (OSError, ValueError):
        names = 0
    if names is None:
        return True, None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{str(path)!r} is damaged: expected a list of class names, or null for unlabelled pictures")
    return False, names


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{str(path)!r} cannot be read ({reason[:120]}): copy it anew") from None


def _form(values: np.ndarray) -> str:
    return f"{values.dtype} of shape {values.shape}"
