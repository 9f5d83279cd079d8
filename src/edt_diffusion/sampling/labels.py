"""Which classes samples are asked for."""

from typing import Literal, get_args

import numpy as np

from ..util import rng
from ..util.errors import UserError

LabelPolicy = Literal["auto", "balanced", "random", "reference"]
# The policies whose shares of the classes are no matter of chance.
FIXED_SHARES = ("balanced", "reference")
POLICIES: tuple[str, ...] = get_args(LabelPolicy)


def choose_labels(
    policy: str,
    count: int,
    class_names: list[str] | None,
    classes: int | None,
    seed: int,
    reference_labels: np.ndarray | None = None,
    reference_names: list[str] | None = None,
) -> tuple[np.ndarray | None, str]:
    """Labels of samples 0 to `count` - 1. Sample i has the same label however many samples there are, but for
    "reference".

    Args:
        policy: "balanced" goes round the classes; "random" draws each uniformly, as the evaluation of ADM, DiT and EDT
            does; "reference" has each class as often as the reference has, in a random order; "auto" is "reference"
            where the reference's classes are the model's, else "balanced".
        count: number of samples.
        class_names: of the model, if known.
        classes: number of the model's classes; None for an unconditional model.
        seed: of random labels and orders.
        reference_labels: of the reference's pictures.
        reference_names: the classes behind those.

    Returns:
        int64 (count,), None for an unconditional model; and the policy that was meant: "none" for such a model.

    Raises:
        UserError: an unknown policy, or the reference's classes are not the model's.
    """
    if policy not in POLICIES:
        raise UserError(f"label policy {policy!r}: expected {', '.join(POLICIES)}")
    if classes is None:
        return None, "none"
    known, why = _of_reference(class_names, classes, reference_labels, reference_names)
    if policy == "auto":
        policy = "balanced" if known is None else "reference"
    if policy == "balanced":
        return np.arange(count, dtype=np.int64) % classes, policy
    if policy == "random":
        draws = rng.uniforms(seed, rng.Purpose.LABEL, 0, list(range(count)))
        return np.minimum((draws * classes).astype(np.int64), classes - 1), policy
    if known is None:
        raise UserError(f"label policy 'reference': {why}; use balanced or random")
    spread = np.sort(known)[np.arange(count) * len(known) // count]
    return rng.stream(seed, rng.Purpose.LABEL, step=1).permutation(spread), policy


def _of_reference(
    class_names: list[str] | None, classes: int, labels: np.ndarray | None, names: list[str] | None
) -> tuple[np.ndarray | None, str]:
    """The reference's labels in the model's numbering; or None, and why."""
    if labels is None:
        return None, "the reference has no labels"
    if names is None or class_names is None:  # numbers only, as in .npz files
        fits = names is None and bool(labels.max() < classes and labels.min() >= 0)
        return (labels, "") if fits else (None, "the classes of the model or the reference have no names")
    strangers = [name for name in names if name not in class_names]
    if strangers:
        return None, f"the reference has classes that the model does not know, such as {strangers[0]!r}"
    return np.array([class_names.index(name) for name in names], dtype=np.int64)[labels], ""
