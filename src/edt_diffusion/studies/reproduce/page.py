"""A reproduced table as a page: Markdown for people, JSON for programs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...util.files import atomic_write_json, atomic_write_text, make_folder

UNKNOWN = "Empty cells in columns of the paper: not known to this project."


@dataclass(frozen=True)
class Interval:
    """A value, and where it lies with 95 % confidence: None where there is only one seed."""

    value: float
    low: float | None = None
    high: float | None = None


Cell = str | float | int | Interval | None


@dataclass(frozen=True)
class Column:
    """A column of a grid.

    Attributes:
        key: name in rows and in JSON.
        title: heading.
        form: format of numbers.
        published: whether its cells are the paper's, and so empty where this project does not know them.
    """

    key: str
    title: str
    form: str = "{:.4g}"
    published: bool = False

    def show(self, cell: Cell) -> str:
        """A cell as Markdown."""
        if cell is None:
            return ""
        if isinstance(cell, str):
            return cell.replace("|", "\\|")
        if isinstance(cell, Interval):
            alone = self.form.format(cell.value)
            if cell.low is None or cell.high is None:
                return alone
            return f"{alone} [{self.form.format(cell.low)}, {self.form.format(cell.high)}]"
        return self.form.format(cell)


@dataclass
class Grid:
    """One table of a page: rows hold cells by the keys of columns; what a row lacks is empty."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    caption: str = ""

    def markdown(self) -> list[str]:
        """Lines of a Markdown table."""
        lines = [f"**{self.caption}**", ""] if self.caption else []
        lines.append("| " + " | ".join(column.title for column in self.columns) + " |")
        lines.append("|" + "|".join(" --- " for _ in self.columns) + "|")
        for row in self.rows:
            lines.append("| " + " | ".join(column.show(row.get(column.key)) for column in self.columns) + " |")
        return lines

    def facts(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite becomes None."""
        return {
            "caption": self.caption,
            "columns": [
                {"key": column.key, "title": column.title, "published": column.published} for column in self.columns
            ],
            "rows": [{column.key: _plain(row.get(column.key)) for column in self.columns} for row in self.rows],
        }


@dataclass
class Page:
    """A reproduced table or figure.

    Attributes:
        name: of the table, such as "table5".
        title: what it shows.
        grids: its tables.
        differs: in what this differs from the paper's, a sentence each.
        notes: what else a reader should know, a sentence each.
        sources: where published values come from, a sentence each.
        command: what made it.
        made: machine and versions.
        figure: file name of the picture beside it, or None.
        more: further plain values for the JSON.
    """

    name: str
    title: str
    grids: Sequence[Grid]
    differs: Sequence[str] = ()
    notes: Sequence[str] = ()
    sources: Sequence[str] = ()
    command: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)
    figure: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """The page."""
        lines = [f"# {self.name}: {self.title}", ""]
        for grid in self.grids:
            lines += [*grid.markdown(), ""]
        if any(column.published for grid in self.grids for column in grid.columns):
            lines += [UNKNOWN, ""]
        if self.figure:
            lines += [f"![{self.title}]({self.figure})", ""]
        for heading, sentences in (
            ("What differs from the paper", self.differs),
            ("Notes", self.notes),
            ("Where published values come from", self.sources),
        ):
            if sentences:
                lines += [f"## {heading}", "", *(f"- {sentence}" for sentence in sentences), ""]
        lines += ["## How it was made", "", f"    {self.command}", ""]
        lines += [f"- {name}: {_words(value)}" for name, value in self.made.items()]
        return "\n".join(lines).rstrip() + "\n"

    def facts(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "table": self.name,
            "title": self.title,
            "grids": [grid.facts() for grid in self.grids],
            "differs": list(self.differs),
            "notes": list(self.notes),
            "sources": list(self.sources),
            "command": self.command,
            "made": dict(self.made),
            "figure": self.figure,
            **self.more,
        }

    def write(self, folder: Path) -> Path:
        """Write table.json and table.md; returns the latter's path.

        Raises:
            UserError: the folder cannot be written to.
        """
        make_folder(folder)
        atomic_write_json(folder / "table.json", self.facts())
        atomic_write_text(folder / "table.md", self.markdown())
        return folder / "table.md"


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Interval):
        return {"value": _plain(cell.value), "low": _plain(cell.low), "high": _plain(cell.high)}
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value)
