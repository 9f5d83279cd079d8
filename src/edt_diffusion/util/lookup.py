"""Look a name up in an explicit table, with an error that names what is there."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from .errors import UserError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the member of `names` spelled most like `name` (upper and lower case alike), or None if none is close."""
    by_lower = {candidate.lower(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[matches[0]] if matches else None


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`.

    Args:
        table: the names that exist, in the order in which an error should list them.
        name: the name as the user gave it.
        what: what the table holds, in the singular ("objective"), for the error message.

    Raises:
        UserError: `name` is not in the table; the message lists the names that are, and the nearest one.
    """
    if name in table:
        return table[name]
    message = f"unknown {what} {name!r}: expected one of {', '.join(table)}"
    guess = nearest(name, table)
    raise UserError(message if guess is None else f"{message} (did you mean {guess!r}?)")
