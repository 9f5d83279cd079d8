"""What a search found, as a page and as lines for a terminal."""

from pathlib import Path
from typing import Any

from ...nn.modulation import AttentionModulation
from ...util.files import atomic_write_text
from .candidates import options, words
from .halving import Course

# Of a rung's candidates, so many are listed.
_LISTED = 8


def write_report(answer: dict[str, Any], path: Path) -> Path:
    """Write the page in Markdown, and return its path."""
    atomic_write_text(path, markdown(answer))
    return path


def course_facts(course: Course, lower_is_better: bool) -> list[dict[str, Any]]:
    """The rungs as JSON holds them, in the metric's own sign."""
    sign = 1 if lower_is_better else -1
    return [
        {
            "round": rung.round,
            "pictures": rung.pictures,
            "off": sign * rung.off,
            "candidates": [
                {"setting": setting.to_config(), "words": words(setting), "value": sign * value,
                 "difference": sign * (value - rung.off), "kept": setting in rung.kept}
                for setting, value in rung.values.items()
            ],
        }
        for rung in course.rungs
    ]  # fmt: skip


def conclusion(answer: dict[str, Any]) -> str:
    """The answer in one sentence."""
    found, title = answer["answer"], answer["metric"]["title"]
    rows = answer["confirmation"]["rows"]
    if not rows:
        return f"AMM off is best: {found['why']}"
    off, best = rows[:2]
    numbers = (
        f"{title} {off['value']:.4g} off, {best['value']:.4g} with {best['words']}, difference "
        f"{_interval(best, 'difference')} over {answer['confirmation']['pictures']} fresh pictures each"
    )
    if found["setting"] is None:
        lower = answer["metric"]["lower_is_better"]
        worst = (
            best["difference_high"] if lower else None if best["difference_low"] is None else -best["difference_low"]
        )
        said = "AMM stays off" if worst is not None and worst < 0 else "AMM off is best"
        return f"{said}: {found['why']} ({numbers})"
    return f"found {found['words']}: {numbers}"


def lines(answer: dict[str, Any]) -> list[str]:
    """The course of the search for a terminal, a line for each rung, and the cost."""
    out = []
    for number, rung in enumerate(answer["course"], start=1):
        best = rung["candidates"][0]
        out.append(
            f"rung {number}: {len(rung['candidates']):>3} candidates, {rung['pictures']} pictures each, off "
            f"{rung['off']:.4g}, best {best['words']} ({best['difference']:+.3g})"
        )
    return [*out, _cost(answer)]


def markdown(answer: dict[str, Any]) -> str:
    """The page: answer, confirmation, course, cost, and how to read it."""
    found, sampling, metric = answer["answer"], answer["sampling"], answer["metric"]
    setting = None if found["setting"] is None else AttentionModulation.from_config(found["setting"])
    saved = None if answer["saved"] is None else AttentionModulation.from_config(answer["saved"])
    page = [
        "# Attention modulation: where it helps this model",
        "",
        f"**{conclusion(answer)}.**",
        "",
        f"As an option: `edt sample {options(setting)}`."
        + (f" When it was asked the model had {words(saved)}." if saved is not None else ""),
        "",
        f"Model {answer['model']['transformer_sha256'][:12]}; guidance {sampling['guidance']:g}, "
        f"{sampling['scheduler']}, {sampling['steps']} steps, {sampling['precision']}; {metric['title']} through "
        f"{answer['extractor']['name']} ({answer['extractor']['sha256'][:12]}), reference "
        f"{answer['reference'].get('count')} pictures.",
    ]
    rows = answer["confirmation"]["rows"]
    if rows:
        level = 100 * answer["confirmation"]["level"]
        page += [
            "",
            f"## Confirmation, {answer['confirmation']['pictures']} fresh pictures each",
            "",
            f"| setting | {metric['title']} [{level:g} %] | difference to off, paired |",
            "|---|---:|---:|",
        ]
        for row in rows:
            role = f" ({row['role']})" if "role" in row else ""
            difference = _interval(row, "difference") if "difference" in row else ""
            page.append(f"| {row['words']}{role} | {_interval(row, 'value')} | {difference} |")
        noise = answer["confirmation"].get("noise")
        if noise is not None:
            page.append(f"| the noise that samples begin from | {noise:.4g} | |")
        page += [
            "",
            "Seeds and classes of the confirmation are none of the search's, and were fixed before it. That the best "
            "of many is partly luck does not enter it; a setting wins only if all of its interval is better than off"
            + (f" by {100 * answer['least_gain']:g} % of off's value" if answer["least_gain"] else "")
            + ("." if noise is None else ", and off clearly nearer than the noise its samples begin from."),
        ]
    page += ["", "## Course", "", "| rung | pictures | candidates | off | the best of them, difference to off |"]
    page += ["|---:|---:|---:|---:|---|"]
    for number, rung in enumerate(answer["course"], start=1):
        shown = "; ".join(f"{each['words']} ({each['difference']:+.3g})" for each in rung["candidates"][:_LISTED])
        more = " ..." if len(rung["candidates"]) > _LISTED else ""
        name = f"{number}" if rung["round"] == 1 else f"{number} (combinations {rung['round'] - 1})"
        page.append(f"| {name} | {rung['pictures']} | {len(rung['candidates'])} | {rung['off']:.4g} | {shown}{more} |")
    page += ["", _cost(answer) + "."]
    page += [
        "",
        "All candidates and off are made from the same seeds and classes. The value at few pictures is biased, alike "
        "for all of a rung as far as their spread is alike: compare within a rung, not across.",
    ]
    page += [f"\nNote: {note}." for note in answer["notes"]]
    return "\n".join(page) + "\n"


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = (row[end if name == "value" else f"{name}_{end}"] for end in ("low", "high"))
    sign = "+" if name == "difference" else ""
    between = "" if low is None or high is None else f" [{low:{sign}.4g}, {high:{sign}.4g}]"
    return f"{row[name]:{sign}.4g}{between}"


def _cost(answer: dict[str, Any]) -> str:
    search, confirm = answer["cost"]["search"], answer["cost"]["confirm"]
    return (
        f"cost: {search['pictures']} pictures in the search of {answer['candidates']['tried']} candidates "
        f"({search['passes']} network passes, {search['seconds']:.0f} s), {confirm['pictures']} in the confirmation "
        f"({confirm['passes']} passes, {confirm['seconds']:.0f} s)"
    )
