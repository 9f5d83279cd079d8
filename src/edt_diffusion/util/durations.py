"""Lengths of time as people write them."""

import re

from .errors import UserError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([dhms])")


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "30m", "1h30m", "2d" or "1:30:00" (hours, minutes, seconds).

    Raises:
        UserError: for anything else, or no time at all.
    """
    told = text.strip().lower()
    seconds = None
    if re.fullmatch(r"\d+(\.\d+)?", told):
        seconds = float(told)
    elif re.fullmatch(r"\d+(:\d{2}){1,2}", told):
        seconds = 0.0
        for part in told.split(":"):
            seconds = seconds * 60 + int(part)
        seconds *= 60.0 if told.count(":") == 1 else 1.0  # two parts are hours and minutes, as schedulers write them
    elif re.fullmatch(rf"({_PART.pattern}\s*)+", told):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(told))
    if not seconds:
        raise UserError(f"time {text!r}: expected such as 90s, 30m, 1h30m or 1:30:00 (hours, minutes, seconds)")
    return seconds
