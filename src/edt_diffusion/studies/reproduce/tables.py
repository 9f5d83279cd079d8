"""The tables and figures that can be reproduced. To add one: a line in `TABLES`, and a study or a function."""

import functools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...evaluation.result import environment
from ...util.lookup import lookup
from .costs import table5, table6, table7
from .page import Page
from .quality import reproduce_study
from .quality_tables import STUDIES
from .request import Request
from .speed import device_for

_SECONDS, _TRAINS = "seconds", "trains"


@dataclass(frozen=True)
class Table:
    """One table or figure of the paper.

    Attributes:
        title: what it shows.
        cost: what making it takes.
        make: makes the page.
        folder: name of its folder, where it is shared with another one.
    """

    title: str
    cost: str
    make: Callable[[Request], Page]
    folder: str | None = None

    @property
    def trains(self) -> bool:
        """Whether it needs pictures and a budget."""
        return self.cost.endswith(_TRAINS)


def _trained(name: str, folder: str | None = None) -> Table:
    study = STUDIES[name]
    return Table(study.title, f"{len(study.arms)} {_TRAINS}", functools.partial(reproduce_study, name, study), folder)


def _figure9(request: Request) -> Page:
    return replace(reproduce_study("table9", STUDIES["table9"], request), name="figure9")


TABLES: dict[str, Table] = {
    "table1": _trained("table1"),
    "table2": _trained("table2"),
    "table3": _trained("table3"),
    "table4": _trained("table4"),
    "table5": Table("model details of EDT-S, B and XL", _SECONDS, table5),
    "table6": Table("FLOPs and parameters of the operations of a DiT block", _SECONDS, table6),
    "table7": Table("cost of training EDT, MDTv2 and DiT; --measure times it here", _SECONDS, table7),
    "table8": _trained("table8"),
    "table9": _trained("table9"),
    "table10": _trained("table10"),
    "table11": _trained("table11"),
    "table12": _trained("table12"),
    "table13": _trained("table13"),
    "table14": _trained("table14"),
    "figure6": _trained("figure6"),
    "figure9": Table("table 9 as a figure", f"1 {_TRAINS}", _figure9, folder="table9"),
    "figure10": _trained("figure10"),
}


def find_table(name: str) -> Table:
    """The table of a name such as "table5".

    Raises:
        UserError: there is none; the nearest is named.
    """
    return lookup(TABLES, name.lower().replace(" ", "").replace(".", ""), "table or figure")


def default_folder(name: str) -> Path:
    """Where a table's page goes unless the command says otherwise."""
    return Path("reproduced") / (find_table(name).folder or name)


def reproduce(request: Request) -> Page:
    """Make a table's page and write it into its folder.

    Raises:
        UserError: for anything the user can put right.
    """
    table = find_table(request.table)
    page = table.make(request)
    page.command, page.made = request.command, _made(request)
    page.write(request.out)
    return page


def listing() -> list[str]:
    """A line for each table: its name, what it takes, what it shows."""
    lines = []
    for name, table in TABLES.items():
        count = table.cost.removesuffix(f" {_TRAINS}")
        seeds = "" if name in STUDIES and STUDIES[name].single else " x seeds"
        cost = "seconds" if not table.trains else f"{count}{seeds} x budget"
        lines.append(f"{name:<9} {cost:<19} {table.title}")
    return lines


def _made(request: Request) -> dict[str, Any]:
    facts = environment(device_for(request.device))
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return {
        "machine": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": facts["device"],
        "threads": torch.get_num_threads(),
        "versions": {**facts["packages"], "python": facts["python"]},
        "date": facts["date"],
    }
