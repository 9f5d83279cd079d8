"""Whether the losses of the full and of the masked input fall together (the paper's figure 10)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

PARTS = 12  # of a training


def fall_together(lines: Mapping[str, list[float]]) -> dict[str, float] | None:
    """What the logged losses of a run say of its two passes; None if there are fewer lines than parts.

    Args:
        lines: "step", "full" and "masked", as `Results.losses` gives them.

    Returns:
        `full_end`, `masked_end` (means over the last of twelve parts of the training), `full_fall`, `masked_fall`
        (shares by which they fell since the second part, the first being the start from nothing), `same_way` (share of
        steps between parts, from the second on, in which both rose or both fell) and `correlation` of these changes.
    """
    if not {"full", "masked"} <= set(lines):
        return None
    full, masked = (np.array(windows(lines["step"], lines[name], PARTS)[1]) for name in ("full", "masked"))
    if len(full) < PARTS or len(masked) != len(full):
        return None
    a, b = np.diff(full[1:]), np.diff(masked[1:])
    spread = float(a.std() * b.std())
    return {
        "full_end": float(full[-1]),
        "masked_end": float(masked[-1]),
        "full_fall": 1 - float(full[-1] / full[1]),
        "masked_fall": 1 - float(masked[-1] / masked[1]),
        "same_way": float(np.mean(np.sign(a) == np.sign(b))),
        "correlation": float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 0 else 0.0,
    }


def windows(places: Sequence[float], values: Sequence[float], count: int) -> tuple[list[float], list[float]]:
    """Means of neighbouring entries, at most `count` of them, entries that are not finite left out."""
    known = [(x, y) for x, y in zip(places, values, strict=True) if math.isfinite(y)]
    parts = [part for part in np.array_split(np.array(known, dtype=np.float64).reshape(-1, 2), count) if len(part)]
    return [float(part[:, 0].mean()) for part in parts], [float(part[:, 1].mean()) for part in parts]
