"""A profile as a person reads it, in a terminal of 80 columns."""

import io
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 80


def table(facts: dict[str, Any]) -> str:
    """What `Profile.facts` holds, as lines of text."""
    settings, machine, forward = facts["settings"], facts["machine"], facts["forward"]
    where = machine["name"] or f"{machine['threads']} of {machine['cores']} cores"
    modes = settings["precision"] + (" compiled" if settings["compiled"] else "")
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    rows.add_column("stage", justify="right")
    rows.add_column("part")
    for heading in ("ms", "quartiles", "share", "G mult-adds", "G/s"):
        rows.add_column(heading, justify="right")
    for part in forward["parts"]:
        rows.add_row(*(Text(cell) for cell in _cells(part, forward["batch"])))
    whole = {**forward, "stage": None, "kind": "a pass", "share": 1.0}
    rows.add_row(*(Text(cell) for cell in _cells(whole, forward["batch"])))
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, color_system=None, highlight=False)
    console.print(Text(f"{settings['model']}: {modes} on {machine['device']} ({where})"))
    console.print(Text(f"one forward pass of {forward['batch']} pictures, {forward['repeats']} times:"))
    console.print(rows)
    for line in _lines(facts):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _cells(part: dict[str, Any], batch: int) -> list[str]:
    work = part["multiply_adds"] * batch
    return [
        "" if part["stage"] is None else str(part["stage"]),
        part["kind"],
        _milliseconds(part["seconds"]),
        f"{_milliseconds(part['low'])} - {_milliseconds(part['high'])}",
        f"{part['share']:.1%}",
        f"{work / 1e9:.3f}" if work else "",
        f"{part['per_second'] / 1e9:.3g}" if work and part["per_second"] else "",
    ]


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    forward, memory, sampling = facts["forward"], facts["memory"], facts["sampling"]
    yield (
        f"speed     {forward['per_second'] / 1e9:.3g} G multiply-adds/s, {forward['share_of_peak']:.0%} of what "
        f"matrix products reach here"
    )
    yield (
        f"memory    weights {_bytes(memory['weights'])}, kept position biases {_bytes(memory['kept'])}, "
        f"a pass {_bytes(memory['forward'])} more"
    )
    if sampling is None:
        return
    settings, whole = facts["settings"], sum(sampling["seconds"].values())
    guidance = "" if sampling["passes"] <= sampling["calls"] else f", guidance {settings['guidance']:g}"
    yield (
        f"sampling  {sampling['seconds_per_picture']:.3g} s a picture: {sampling['scheduler']}, {sampling['steps']} "
        f"steps{guidance}"
    )
    shares = [f"{name} {seconds / whole:.1%}" for name, seconds in sampling["seconds"].items() if seconds]
    yield f"          {', '.join(shares)}"
    passes = f"          {sampling['calls']} calls of the network, {sampling['passes']:g} passes for each picture"
    yield passes
    if settings["cache"] != "none" and sampling["blocks_skipped"] is not None:
        yield (
            f"          {settings['cache']}: {sampling['blocks_skipped']:.1%} of blocks and "
            f"{sampling['work_skipped']:.1%} of multiply-adds skipped"
        )


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
