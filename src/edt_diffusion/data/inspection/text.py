"""Facts of pictures and stores as text for people: names before numbers, long lists cut with a count of the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .summary import shown

_CLASSES = 12
_ENTRIES = 5
_INDENT = 13


def describe(facts: dict[str, Any], out: Path | None = None) -> str:
    """The text of what `inspect_pictures` or `inspect_store` found.

    Args:
        facts: their result.
        out: the folder they wrote to, if any.
    """
    lines = _pictures(facts) if facts["kind"] == "pictures" and "unreadable" in facts else _store(facts)
    lines += _duplicates(facts["duplicates"])
    if out is not None:
        sheets = [entry["sheet"] for entry in facts["classes"] or [facts] if entry["sheet"]]
        drawn = f"{len(sheets)} contact {'sheet' if len(sheets) == 1 else 'sheets'} in {out / 'sheets'}; " * bool(
            sheets
        )
        lines.append(_line("written", f"{drawn}everything found in {out / 'inspect.json'}"))
    return "\n".join(lines)


def listed(entries: Sequence[str], most: int, unit: str = "") -> str:
    """Entries with commas, at most `most` of them, and how many more there are."""
    more = len(entries) - most
    rest = f", and {more} more{' ' + unit if unit else ''}" if more > 0 else ""
    return ", ".join(entries[:most]) + rest


def _line(name: str, text: str) -> str:
    return f"{name:<{_INDENT}}{text}"


def _pictures(facts: dict[str, Any]) -> list[str]:
    lines = [shown(f"{facts['source']}: {facts['pictures']} pictures{_of_classes(facts)}")]
    lines += _classes(facts)
    if sizes := facts["sizes"]:
        height, width, aspect = (sizes[name] for name in ("height", "width", "aspect"))
        lines.append(_line("height", _spread(height, "g")))
        lines.append(_line("width", _spread(width, "g")))
        shapes = f"{sizes['landscape']} landscape, {sizes['portrait']} portrait, {sizes['square']} square"
        lines.append(_line("width/height", f"{_spread(aspect, '.2f')}; {shapes}"))
        common = [f"{entry['height']}x{entry['width']} ({entry['pictures']})" for entry in sizes["common"]]
        rest = f"; {sizes['distinct']} different" if sizes["distinct"] > _ENTRIES else ""
        lines.append(_line("sizes", ", ".join(common[:_ENTRIES]) + rest))
        counted = [", ".join(f"{name} {count}" for name, count in facts[part].items()) for part in ("formats", "modes")]
        lines.append(_line("formats", f"{counted[0]}; modes {counted[1]}"))
    if channels := facts["channels"]:
        height, width = channels["size"]
        of = f"pixels in [-1, 1] of {channels['pictures']} pictures at {height}x{width}"
        lines.append(_line("channels", f"{_mean_std(channels)}; {of}"))
    lines += _reasons("unreadable", facts["unreadable"], "picture")
    lines += _reasons("passed over", facts["passed_over"], "file")
    return lines


def _store(facts: dict[str, Any]) -> list[str]:
    lines = [shown(f"{facts['source']}: {facts['rows']} rows of {facts['kind']}{_of_classes(facts)}")]
    codec = facts["codec"]
    made = f"{codec['class_name']} {codec['id']} (weights {codec['sha256'][:12]})" if codec else "none"
    lines.append(_line("codec", shown(made)))
    sizes = [
        f"{entry['height']}x{entry['width']} as {'x'.join(map(str, entry['shape']))} ({entry['rows']})"
        for entry in facts["sizes"]
    ]
    lines.append(_line("sizes", listed(sizes, _CLASSES)))
    preparation = facts["preparation"]
    views = "plain and flipped" if len(facts["views"]) > 1 else "plain"
    lines.append(
        _line("stored", f"{facts['dtype']}, {views}, crop {preparation['crop']}, {facts['bytes'] / 2**20:.1f} MiB")
    )
    lines += _classes(facts)
    lines.append(_line("channels", f"{_mean_std(facts['statistics'])}; unscaled, by the manifest"))
    measured = facts["measured"]
    lines.append(_line("", f"{_mean_std(measured)}; measured over {measured['rows']} rows"))
    scaling = facts["scaling"]
    lines.append(_line("scaling", f"(latent - {_numbers(scaling['shift'])}) * {_numbers(scaling['scale'])}"))
    lines += _reasons("skipped", facts["skipped"], "picture")
    lines += _reasons("passed over", facts["passed_over"], "file")
    return lines


def _of_classes(facts: dict[str, Any]) -> str:
    return ", unlabelled" if facts["classes"] is None else f", {len(facts['classes'])} classes"


def _classes(facts: dict[str, Any]) -> list[str]:
    if facts["classes"] is None:
        return []
    counts = [f"{shown(entry['name'])} {entry['pictures']}" for entry in facts["classes"]]
    lines = [_line("classes", listed(counts, _CLASSES, "classes"))]
    if spread := facts["balance"]:
        (most, many), (least, few) = spread["largest"], spread["smallest"]
        ratio = f", {spread['ratio']:.2f} times as many" if spread["ratio"] else ""
        lines.append(_line("balance", f"largest {shown(most)} {many}, smallest {shown(least)} {few}{ratio}"))
        lines.append(_line("", f"as even as {spread['effective_classes']:.2f} equally large classes"))
        if spread["empty"]:
            names = listed([shown(name) for name in spread["empty"]], _ENTRIES)
            lines.append(_line("", f"{len(spread['empty'])} without pictures: {names}"))
    return lines


def _duplicates(found: dict[str, Any]) -> list[str]:
    if not found["groups"]:
        return [_line("duplicates", "none")]
    lines = [_line("duplicates", f"{_copies(found['pictures'])}, in {_groups(len(found['groups']))}")]
    lines += _cut([" = ".join(shown(name) for name in group[:4]) for group in found["groups"]], "groups")
    if found["across_classes"]:
        lines.append(_line("MISLABELLED", f"{_groups(len(found['across_classes']))} in more than one class:"))
        several = [
            " = ".join(f"{shown(name)} ({shown(label)})" for name, label in group[:4])
            for group in found["across_classes"]
        ]
        lines += _cut(several, "groups")
    return lines


def _copies(count: int) -> str:
    return "1 picture is a copy of another" if count == 1 else f"{count} pictures are copies of others"


def _groups(count: int) -> str:
    return f"{count} group{'' if count == 1 else 's'}"


def _reasons(name: str, entries: list[dict[str, str]], what: str) -> list[str]:
    if not entries:
        return [_line(name, "none")]
    told = [f"{shown(entry[what])}: {shown(entry['reason'])}" for entry in entries]
    return [_line(name, str(len(entries))), *_cut(told, f"{what}s")]


def _cut(entries: list[str], unit: str) -> list[str]:
    lines = [_line("", entry) for entry in entries[:_ENTRIES]]
    if len(entries) > _ENTRIES:
        lines.append(_line("", f"and {len(entries) - _ENTRIES} more {unit}"))
    return lines


def _spread(values: dict[str, float], form: str) -> str:
    smallest, median, largest = (format(values[name], form) for name in ("smallest", "median", "largest"))
    return f"{smallest} to {largest}, median {median}"


def _mean_std(values: dict[str, Any]) -> str:
    return f"mean {_numbers(values['mean'])}, std {_numbers(values['std'])}"


def _numbers(values: Sequence[float]) -> str:
    """Numbers of channels; one where all are the same."""
    few = values[:1] if len(set(values)) == 1 else values
    return " ".join(f"{value:.4g}" for value in few)
