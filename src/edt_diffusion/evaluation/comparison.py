"""Whether two results may be compared, and why not."""

from collections.abc import Mapping, Sequence
from typing import Any

from .result import AS_FOUND, Result

# What must be equal: a path into the manifest, and what it is called.
_MUST = {
    "protocol": "version of the metrics",
    "extractor.sha256": "weights of the extractor",
    "extractor.preprocessing": "preprocessing of the extractor",
    "reference.sha256": "reference pictures",
    "reference.statistics": "origin of the reference statistics",
    "reference.size": "size of the reference pictures",
    "reference.preparation": "preparation of the reference pictures",
    "samples.count": "number of samples",
    "samples.size": "size of the samples",
    "samples.preparation": "preparation of the samples",
    "settings": "settings of the metrics",
}

_LABELS = {"samples.labels": "label policy"}

# What may be equal or not, and is worth knowing.
_SHOULD = {
    "samples.seed": "seed",
    "samples.channels": "colour channels of the samples",
    "sampling.precision": "precision",
    "environment.device": "device",
    "environment.packages.torch": "torch",
    "environment.packages.edt-diffusion": "edt-diffusion",
}

_ABSENT = object()


def incomparable(one: Result, other: Result) -> list[str]:
    """Why the numbers of two results say nothing about each other; empty if they do."""
    return _differences(one.manifest, other.manifest, _LABELS | _MUST if _chosen(one, other) else _MUST)


def cautions(one: Result, other: Result) -> list[str]:
    """What else differs that may move the numbers a little."""
    return _differences(one.manifest, other.manifest, _SHOULD if _chosen(one, other) else _LABELS | _SHOULD)


def _chosen(one: Result, other: Result) -> bool:
    """Whether the classes of both were chosen here; those of pictures from elsewhere are as they are."""
    return all(_at(result.manifest, "samples.labels") != AS_FOUND for result in (one, other))


def comparable_groups(results: Sequence[Result]) -> list[list[int]]:
    """Cut results into groups whose members may be compared with one another, in their order."""
    groups: list[list[int]] = []
    for index, result in enumerate(results):
        home = next((group for group in groups if not incomparable(results[group[0]], result)), None)
        if home is None:
            groups.append([index])
        else:
            home.append(index)
    return groups


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    out = []
    for path, name in names.items():
        here, there = _at(one, path), _at(other, path)
        if here is _ABSENT and there is _ABSENT:
            continue
        if here != there:
            out += _told(name, here, there)
    return out


def _at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return _ABSENT
        tree = tree[name]
    return tree


def _told(name: str, here: Any, there: Any) -> list[str]:
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        keys = [key for key in {**here, **there} if here.get(key, _ABSENT) != there.get(key, _ABSENT)]
        return [f"{name}: {key} is {_text(here.get(key))} and {_text(there.get(key))}" for key in keys]
    return [f"{name}: {_text(here)} and {_text(there)}"]


def _text(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "unknown"
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    is_digest = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] + "..." if is_digest else text
