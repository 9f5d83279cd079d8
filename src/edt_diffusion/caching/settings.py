"""A feature cache and its options as one word, such as "taylor:interval=4,order=1"."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..util.errors import UserError

Value = int | float | str | tuple[float, ...]


class Options(Mapping[str, Value]):
    """A mapping that cannot be changed and has a hash; the order of its names is kept but does not count."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = dict(values or {})

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return f"Options({self._values!r})"


@dataclass(frozen=True)
class CacheSetting:
    """A cache by name, with the options that were given; the others have the defaults of `CACHES`.

    Attributes:
        name: one of `CACHES`.
        options: option name -> number, word, or tuple of numbers; any mapping may be passed.
    """

    name: str
    options: Mapping[str, Value] = field(default_factory=Options)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", Options(self.options))

    def __str__(self) -> str:
        given = ",".join(f"{name}={_word(value)}" for name, value in self.options.items())
        return f"{self.name}:{given}" if given else self.name


def _word(value: Value) -> str:
    return "/".join(map(_word, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Option:
    """An option of a cache: its default, which also gives its kind, and what is allowed.

    Attributes:
        default: an integer, a number, a word, or a tuple of numbers (written 1.0/0.9/0.8).
        low, high: least and largest value of each number.
        words: what a word may be.
        text: one line for a user.
    """

    default: Value
    text: str
    low: float = 0.0
    high: float = float("inf")
    words: tuple[str, ...] = ()

    def check(self, where: str, given: Any) -> Value:
        """The value as the option's kind, from a value or its text.

        Raises:
            UserError: it is of another kind, or out of range; `where` ("cache 'taylor', option 'order'") is named.
        """
        if isinstance(self.default, str):
            if given not in self.words:
                raise UserError(f"{where}: got {given!r}, expected {' or '.join(self.words)}")
            return given
        if isinstance(self.default, tuple):
            parts = given.split("/") if isinstance(given, str) else given
            values = tuple(self._number(where, part) for part in parts)
            if len(values) != len(self.default):
                raise UserError(
                    f"{where}: got {len(values)} numbers, expected {len(self.default)}, written 1.0/0.9/..."
                )
            return values
        return self._number(where, given)

    def _number(self, where: str, given: Any) -> int | float:
        whole = isinstance(self.default, int)
        text = str(given)
        if not re.fullmatch(r"[+-]?\d+" if whole else r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
            raise UserError(f"{where}: got {given!r}, expected {'a whole' if whole else 'a'} number")
        value = int(text) if whole else float(text)
        if not self.low <= value <= self.high:
            upper = "or more" if self.high == float("inf") else f"to {self.high:g}"
            raise UserError(f"{where}: got {text}, expected {self.low:g} {upper}")
        return value
