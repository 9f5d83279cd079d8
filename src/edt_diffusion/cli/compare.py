"""`edt compare`."""

from pathlib import Path

import typer

from .output import finish

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
    from ..evaluation.comparison import cautions, comparable_groups, incomparable
    from ..evaluation.report import text_table
    from ..evaluation.result import load_results

    named = load_results(results)
    loaded = [result for _, result in named]
    groups = comparable_groups(loaded)
    reasons = [
        {
            "one": named[groups[0][0]][0],
            "other": named[group[0]][0],
            "reasons": incomparable(loaded[groups[0][0]], loaded[group[0]]),
        }
        for group in groups[1:]
    ]
    notes = []
    for group in groups:
        for index in group[1:]:
            notes += [f"{named[index][0]}: other {reason}" for reason in cautions(loaded[group[0]], loaded[index])]
    if not as_json:
        for group in groups:
            print(text_table([loaded[index] for index in group], [named[index][0] for index in group]), end="\n\n")
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
