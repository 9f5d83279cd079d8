"""The mathematics of power-function averages (Karras et al. 2024, "EDM2", arXiv 2312.02696, section 3, appendix C).

After T updates, update t has the weight of its unit of time, t - 1 to t, under the profile
p(s) = (gamma + 1) s^gamma / T^(gamma + 1) on 0 <= s <= T. The relative width sigma_rel is the standard deviation of
that profile over T.
"""

import math

import numpy as np

from ..util.errors import UserError

MAX_WIDTH = 0.28
"""Upper end of the relative widths: a plain mean of all updates (gamma = 0) has 12^(-1/2) = 0.289."""


def width_name(sigma_rel: float) -> str:
    """The name of an average, "ema-0.050" for the relative width 0.05."""
    return f"ema-{sigma_rel:.3f}"


def power_exponent(sigma_rel: float) -> float:
    """gamma of a relative width: the one positive root of (g + 1)^(1/2) (g + 2)^-1 (g + 3)^(-1/2) = sigma_rel.

    Raises:
        UserError: if sigma_rel is not between 0 and `MAX_WIDTH`.
    """
    if not 0.0 < sigma_rel < MAX_WIDTH:
        raise UserError(f"relative EMA width {sigma_rel}: expected a number between 0 and {MAX_WIDTH}, such as 0.1")
    # Squared and cleared of fractions: g^3 + 7 g^2 + (16 - w) g + (12 - w) = 0 with w = sigma_rel^-2 > 12. One change
    # of sign in the coefficients, hence one positive root.
    w = sigma_rel**-2
    return float(max(root.real for root in np.roots([1.0, 7.0, 16.0 - w, 12.0 - w]) if abs(root.imag) < 1e-6 * w))


def power_width(gamma: float) -> float:
    """Relative width of an exponent gamma > -1, inverse of `power_exponent`."""
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def power_decay(gamma: float, t: int) -> float:
    """Share of the old average that update t = 1, 2, ... keeps: (1 - 1 / t)^(gamma + 1)."""
    return (1.0 - 1.0 / t) ** (gamma + 1.0)


def profile_products(
    gammas_a: np.ndarray, times_a: np.ndarray, gammas_b: np.ndarray, times_b: np.ndarray
) -> np.ndarray:
    """Integral of the product of two profiles, for all pairs.

    With T_a <= T_b it is (g_a + 1) (g_b + 1) / (g_a + g_b + 1) (T_a / T_b)^g_b / T_b.

    Args:
        gammas_a, times_a: exponents and lengths T of n profiles.
        gammas_b, times_b: those of m profiles.

    Returns:
        float64 array (n, m).
    """  # fmt: skip
    ga, ta = np.asarray(gammas_a, np.float64)[:, None], np.asarray(times_a, np.float64)[:, None]
    gb, tb = np.asarray(gammas_b, np.float64)[None, :], np.asarray(times_b, np.float64)[None, :]
    short, long = np.minimum(ta, tb), np.maximum(ta, tb)
    exponent = np.where(ta < tb, gb, ga)
    return (ga + 1.0) * (gb + 1.0) / (ga + gb + 1.0) * (short / long) ** exponent / long


def solve_profile(gammas: np.ndarray, times: np.ndarray, gamma: float, time: float) -> tuple[np.ndarray, float]:
    """Factors with which given profiles add up to a wanted one as nearly as can be, by least squares over time.

    The factors are made to add up to 1, as every profile does: what has not changed during the training comes out
    unchanged.

    Args:
        gammas: exponents of the n given profiles.
        times: their lengths.
        gamma: exponent of the wanted profile.
        time: its length.

    Returns:
        float64 factors (n,), and the root of the squared error over the wanted profile's own.
    """
    g, t = np.array([gamma]), np.array([time])
    gram = profile_products(gammas, times, gammas, times)
    right = profile_products(gammas, times, g, t)[:, 0]
    own = float(profile_products(g, t, g, t)[0, 0])
    # Profiles of unit norm, so that short and long ones count alike in the solver's idea of what is singular.
    norm = np.sqrt(np.diag(gram))
    count = len(norm)
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = gram / norm[:, None] / norm
    constraint = 1.0 / norm
    system[:count, count] = system[count, :count] = constraint / constraint.max()
    wanted = np.append(right / norm / math.sqrt(own), 1.0 / constraint.max() / math.sqrt(own))
    solution = np.linalg.lstsq(system, wanted, rcond=None)[0][:count]
    factors = solution * math.sqrt(own) / norm
    squared = factors @ gram @ factors - 2.0 * factors @ right + own
    return factors, math.sqrt(max(squared, 0.0) / own)
