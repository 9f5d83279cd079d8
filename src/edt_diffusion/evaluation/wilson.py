"""The interval of a share."""

import math
from statistics import NormalDist

from ..util.errors import UserError


def wilson_interval(correct: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927), which stays in [0, 1] and is of use even at 0 and at all.

    Args:
        correct: successes.
        count: trials; with none the interval is (0, 1).
        level: probability that the interval covers the true share, above 0 and below 1.
    """
    if not 0 < level < 1:
        raise UserError(f"level is {level}: expected a number above 0 and below 1, such as 0.95")
    assert 0 <= correct <= count
    if not count:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = correct / count, z * z / count
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == count else middle + half)
