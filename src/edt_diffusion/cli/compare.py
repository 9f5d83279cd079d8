"""`edt compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .output import finish

if TYPE_CHECKING:
    from ..evaluation.result import Result

# What a comparison returns that says nothing.
INCOMPARABLE = 1


def compare(
    results: list[Path] = typer.Argument(metavar="RESULT", help="JSON files of edt evaluate, or folders of them."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Put results side by side if they may be compared, and say why where they may not (exit code 1).

    Two numbers say something about each other only with the same extractor, reference, number of samples, label policy,
    sizes and metric settings.

    Example: edt compare runs/a/evaluation/*/*.json
    """
    from ..evaluation.comparison import comparable_groups
    from ..evaluation.report import text_table
    from ..evaluation.result import load_results

    named = load_results(results)
    loaded = [result for _, result in named]
    groups = comparable_groups(loaded)
    reasons = [_reasons(named, groups[0], group) for group in groups[1:]]
    found = [_notes(named, group) for group in groups]
    notes = [note for _, said in found for note in said]
    if not as_json:
        for group, (without, _) in zip(groups, found, strict=True):
            names = [named[index][0] for index in group]
            print(text_table([loaded[index] for index in group], names, without), end="\n\n")
        for reason in reasons:
            print(f"not comparable: {reason['one']} and {reason['other']} ({'; '.join(reason['reasons'])})")
        for note in notes:
            print(f"note: {note}")
    facts = {"groups": [[named[index][0] for index in group] for group in groups], "reasons": reasons, "notes": notes}
    whole = len(groups) == 1
    finish(
        f"compared {len(named)} results" if whole else f"{len(groups)} groups that cannot be compared", facts, as_json
    )
    if not whole:
        raise typer.Exit(INCOMPARABLE)


def _reasons(named: "Sequence[tuple[str, Result]]", one: list[int], other: list[int]) -> dict[str, Any]:
    """The first two members of two groups that may not be compared, and why."""
    from ..evaluation.comparison import incomparable

    pairs = ((here, there, incomparable(named[here][1], named[there][1])) for there in other for here in one)
    here, there, why = next(pair for pair in pairs if pair[2])
    return {"one": named[here][0], "other": named[there][0], "reasons": why}


def _notes(named: "Sequence[tuple[str, Result]]", group: list[int]) -> tuple[set[str], list[str]]:
    """Which columns of a group would put side by side what is not comparable; and what a reader has to know."""
    from ..evaluation.comparison import JUDGED_COLUMNS, cautions, otherwise_judged

    notes, without = [], set()
    first = named[group[0]][1]
    for index in group[1:]:
        notes += [f"{named[index][0]}: other {reason}" for reason in cautions(first, named[index][1])]
    for place, one in enumerate(group):
        for other in group[place + 1 :]:
            for name, reasons in otherwise_judged(named[one][1], named[other][1]).items():
                if name not in without:
                    without.add(name)
                    notes.append(
                        f"no column of {JUDGED_COLUMNS[name]}: {named[one][0]} and {named[other][0]} were judged "
                        f"otherwise ({'; '.join(reasons)})"
                    )
    return without, notes
