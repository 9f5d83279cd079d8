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
    "samples.statistics": "origin of the samples' statistics",
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

# What must be equal for what judging says of the samples, by the field of `Result` that holds it.
_JUDGED = {
    "judge": {"judged_by.classifier.sha256": "classifier"},
    "memorisation": {
        "judged_by.training.sha256": "training pictures",
        "judged_by.training.mirrored": "mirroring of the training pictures",
        "judged_by.space": "space of the distances",
        "judged_by.baseline": "baseline",
        "judged_by.held_out.sha256": "held-out pictures",
    },
}

# How the columns of these fields are called.
JUDGED_COLUMNS = {"judge": "class fidelity", "memorisation": "novelty"}

_ABSENT = object()


def incomparable(one: Result, other: Result) -> list[str]:
    """Why the numbers of two results say nothing about each other; empty if they do."""
    return _differences(one.manifest, other.manifest, _LABELS | _MUST if _chosen(one, other) else _MUST)


def cautions(one: Result, other: Result) -> list[str]:
    """What else differs that may move the numbers a little."""
    return _differences(one.manifest, other.manifest, _SHOULD if _chosen(one, other) else _LABELS | _SHOULD)


def otherwise_judged(one: Result, other: Result) -> dict[str, list[str]]:
    """Why the class fidelity ("judge") or the novelty ("memorisation") of two results say nothing about each other.

    A field that one of them lacks, or that may be compared, is not in it. What is not known of a side does not count
    as equal, but for held-out pictures where there are none.
    """
    out = {}
    for name, paths in _JUDGED.items():
        if getattr(one, name) is None or getattr(other, name) is None:
            continue
        must = next(iter(paths))
        reasons = _differences(one.manifest, other.manifest, paths)
        if not reasons and _at(one.manifest, must) is _ABSENT:
            reasons = _told(paths[must], _ABSENT, _ABSENT)
        if reasons:
            out[name] = reasons
    return out


def _chosen(one: Result, other: Result) -> bool:
    """Whether the classes of both were chosen here; those of pictures from elsewhere are as they are."""
    return all(_at(result.manifest, "samples.labels") != AS_FOUND for result in (one, other))


def comparable_groups(results: Sequence[Result]) -> list[list[int]]:
    """Cut results into groups, each member of which may be compared with every other, in their order.

    A result that may be compared with members of several groups is put into the first that it fits whole.
    """
    groups: list[list[int]] = []
    for index, result in enumerate(results):
        home = next((group for group in groups if not any(incomparable(results[of], result) for of in group)), None)
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
