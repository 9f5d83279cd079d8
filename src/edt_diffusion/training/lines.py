"""Reading `log.jsonl` of a run: lines of metrics, and lines that tell of events. Needs no torch."""

import json
import math
from pathlib import Path
from typing import Any

from ..util.errors import UserError

# `train.steps` of a run that a budget of seconds ends: it has no number of steps, and so many are never made.
WITHOUT_END = 1_000_000_000


def log_path(folder: Path) -> Path:
    """Where the run in `folder` logs."""
    return folder / "log.jsonl"


def read_log(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run, one `{"step": ..., name: value, ...}` per logged line, in order; null is read as NaN.

    Lines of events are left out (see `read_events`), and so is a last line that was cut off by a kill or is just being
    written. Empty if the run has logged nothing.

    Raises:
        UserError: another line is not one of ours.
    """
    metrics = [line for line in _read(folder) if "event" not in line]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in metrics]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """What happened in a run, in order: `{"step": ..., "event": kind, "message": ...}`; otherwise as `read_log`."""
    return [line for line in _read(folder) if "event" in line]


def lines_until(text: str, step: int) -> list[str]:
    """The lines of a log that tell of `step` or of earlier ones; what is no whole line of ours goes."""
    return [line for line in text.splitlines() if (parsed := _parse(line)) is not None and parsed["step"] <= step]


def _read(folder: Path) -> list[dict[str, Any]]:
    path = log_path(folder)
    try:
        texts = path.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    lines = []
    for number, text in enumerate(texts, 1):
        line = _parse(text)
        if line is not None:
            lines.append(line)
        elif number < len(texts):
            raise UserError(f"line {number} of {path} is damaged ({text[:40]!r}): delete that line")
    return lines


def _parse(text: str) -> dict[str, Any] | None:
    """The content of a line, or None for half a line or anything else that is not of ours."""
    try:
        line = json.loads(text)
        return {**line, "step": int(line["step"])}
    except (ValueError, KeyError, TypeError):
        return None
