"""What a run remembers of its pictures (`data.json`): labels are numbers, and must go on meaning the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..data import ImageDataset, LatentStore
from ..data.manifest import to_json
from ..util.errors import UserError
from ..util.files import atomic_write_json

_FILE = "data.json"


def picture_facts(dataset: ImageDataset | LatentStore, class_names: list[str] | None) -> dict[str, Any]:
    """Number of pictures; for a model with classes, their names in label order and a digest of all labels.

    Of a latent store also a digest of its manifest, and so of every byte of it.
    """
    facts: dict[str, Any] = {"pictures": len(dataset), "class_names": class_names}
    if class_names is not None and dataset.labels is not None:
        facts["labels_sha256"] = hashlib.sha256(dataset.labels.astype("<i8").tobytes()).hexdigest()
    if isinstance(dataset, LatentStore):
        facts["store_sha256"] = hashlib.sha256(to_json(dataset.manifest).encode()).hexdigest()
    return facts


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` wrote; empty if there is none, as in the folders of older versions."""
    try:
        record = json.loads((folder / _FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(folder: Path, facts: dict[str, Any], preset: str | None) -> None:
    """Remember `picture_facts`, and the name of the preset if the run is one's."""
    atomic_write_json(folder / _FILE, {**facts, "preset": preset})


def refuse_other_pictures(folder: Path, facts: dict[str, Any]) -> None:
    """Refuse to go on with pictures that the run in `folder` was not begun with.

    Raises:
        UserError: the class names, their order, the number of pictures or their labels differ.
    """
    changed = _changes(read_record(folder), facts)
    if changed:
        raise UserError(
            f"{folder} holds a run with other pictures ({'; '.join(changed)}): bring those back, choose another --out, "
            "or go on all the same with --allow-changes"
        )


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changed = []
    before, after = old.get("class_names"), new["class_names"]
    if old and before != after:
        before, after = before or [], after or []
        if len(before) != len(after):
            changed.append(f"{len(before)} -> {len(after)} classes")
        pairs = zip([*before, None], [*after, None], strict=False)
        label, (was, now) = next((index, pair) for index, pair in enumerate(pairs) if pair[0] != pair[1])
        changed.append(f"class {label}: {was} -> {now}")
    if old and old.get("pictures") != new["pictures"]:
        changed.append(f"{old.get('pictures')} -> {new['pictures']} pictures")
    if old and not changed and old.get("labels_sha256") != new.get("labels_sha256"):
        changed.append("other labels")
    if old and not changed and old.get("store_sha256") != new.get("store_sha256"):
        changed.append("another latent store")
    return changed
