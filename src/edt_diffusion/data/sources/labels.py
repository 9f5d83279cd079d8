"""The one rule by which a list of labels becomes class numbers and names, whatever the layout."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ...util.errors import UserError
from .options import NO_LABELS

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")


def read_labels(
    values: list[Any], names: list[str] | None, origin: str, row_name: Callable[[int], str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Turn a column of labels into int64 numbers and class names.

    Strings become classes in sorted order. Integers keep their values, so that a class's number and, where the schema
    has no names, its name are the same.

    Args:
        values: one label per row.
        names: the class names behind integers, where the source states them.
        origin: what the labels are, for messages.
        row_name: row number -> what to call that row in a message.

    Raises:
        UserError: a row has no label or one of another type, or the integers do not fit the number of classes.
    """
    if all(isinstance(value, str) for value in values):
        class_names = sorted(set(values))
        number = {name: label for label, name in enumerate(class_names)}
        return np.array([number[value] for value in values], dtype=np.int64), class_names
    first = next((value for value in values if value is not None), None)
    kind = str if isinstance(first, str) else int
    for row, value in enumerate(values):
        if not isinstance(value, kind):
            where = f"row {row}" if row_name is None else row_name(row)
            raise UserError(f"{origin} holds {value!r} in {where}: expected integers or strings in every row")
    lowest, highest = min(values), max(values)
    distinct = len(set(values))
    if names is None:
        # A wild number would otherwise silently make a model with that many classes.
        if lowest < 0 or highest >= 2 * distinct:
            raise UserError(
                f"{origin} holds {distinct} different labels from {lowest} to {highest}: labels out of range, expected "
                f"0 to {distinct - 1}; renumber them or write them as names"
            )
        names = [str(label) for label in range(highest + 1)]
    elif lowest < 0 or highest >= len(names):
        raise UserError(
            f"{origin} holds labels from {lowest} to {highest}: labels out of range, expected 0 to "
            f"{len(names) - 1} for its {len(names)} classes; correct the rows, or set {NO_LABELS}"
        )
    return np.array(values, dtype=np.int64), list(names)


def labels_from_text(values: list[str | None]) -> list[Any]:
    """Read labels that a format keeps as text: integers where all of them are written as integers, else names.

    "007" is a name, not an integer. Empty text is a missing label, None.
    """
    present = [value or None for value in values]
    if all(value is None or _INTEGER.fullmatch(value) for value in present):
        return [None if value is None else int(value) for value in present]
    return present
