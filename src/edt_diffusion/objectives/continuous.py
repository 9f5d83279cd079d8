"""Fixed densities of continuous time, for flow matching.

They carry no importance weights: a density that is not uniform is chosen *as* the weighting of the loss over time
(Esser et al. 2024, "Scaling rectified flow transformers", arXiv 2403.03206, section 3.1), and dividing by it would undo
it.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .timesteps import State, at_least_one, check_state, checked_uniforms, inside

_STANDARD = NormalDist()


class Density(Protocol):
    """A distribution of s in (0, 1)."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> tuple[float, ...]: ...

    def quantile(self, u: float) -> float:
        """Return the s below which a share u in (0, 1) of the probability lies."""
        ...

    def cdf(self, s: float) -> float:
        """Return the probability below s in [0, 1]."""
        ...


@dataclass(frozen=True)
class LogitNormal:
    """logit(s) = ln(s / (1 - s)) is normal (arXiv 2403.03206, equation 19): the middle of time is seen most.

    Args:
        mean: positive for more noise.
        std: spread, positive.
    """

    mean: float = 0.0
    std: float = 1.0
    name = "logit_normal"

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"logit_mean = {self.mean}: expected a finite number")
        if not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"logit_std = {self.std}: expected a positive number")

    @property
    def parameters(self) -> tuple[float, ...]:
        return self.mean, self.std

    def quantile(self, u: float) -> float:
        logit = self.mean + self.std * _STANDARD.inv_cdf(u)
        return 1.0 / (1.0 + math.exp(-logit)) if logit > -700.0 else 0.0

    def cdf(self, s: float) -> float:
        if s <= 0.0 or s >= 1.0:
            return float(s >= 1.0)
        return _STANDARD.cdf((math.log(s / (1.0 - s)) - self.mean) / self.std)


@dataclass(frozen=True)
class Shifted:
    """s = a u / (1 + (a - 1) u) of uniform u (arXiv 2403.03206, equation 23): a above 1 for more noise, as is wanted
    of large pictures, where neighbouring pixels share what they show.

    Args:
        shift: a, positive; 1 is uniform. Sampling with the same shift visits the levels as training did.
    """

    shift: float = 3.0
    name = "shifted"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift = {self.shift}: expected a positive number (1 is uniform)")

    @property
    def parameters(self) -> tuple[float, ...]:
        return (self.shift,)

    def quantile(self, u: float) -> float:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)

    def cdf(self, s: float) -> float:
        return s / (self.shift - (self.shift - 1.0) * s)


class DensityTimesteps:
    """t = num_timesteps * s with s of a fixed density, every weight 1.

    Args:
        num_timesteps: T, at least 1.
        density: the distribution of s.

    Raises:
        ValueError: if num_timesteps is smaller.
    """

    continuous = True

    def __init__(self, num_timesteps: int, density: Density) -> None:
        self.num_timesteps = at_least_one("num_timesteps", num_timesteps)
        self.density = density
        self.rejected = 0

    def draw(self, u: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Map uniforms in [0, 1), (B,), to times (B,) float32 in (0, T) and weights (B,) float32, all 1."""
        # One by one: a vectorised exponential may round differently at the end of an array, and a sample's time must
        # not depend on its neighbours.
        shares = [self.density.quantile(max(float(value), 2.0**-54)) for value in checked_uniforms(u)]
        t = inside(np.array(shares, dtype=np.float64), self.num_timesteps)
        return t, np.ones(t.shape, dtype=np.float32)

    def update(self, t: ArrayLike, losses: ArrayLike) -> None:
        """Do nothing: the distribution is fixed."""

    def weights(self) -> NDArray[np.float64]:
        """Return the probability of every unit of time [k, k + 1), (T,)."""
        edges = [self.density.cdf(k / self.num_timesteps) for k in range(self.num_timesteps + 1)]
        return np.diff(edges)

    def state_dict(self) -> State:
        """Return what makes a resume with another distribution noticed."""
        return {"num_timesteps": self.num_timesteps, self.density.name: np.array(self.density.parameters)}

    def load_state_dict(self, state: State) -> None:
        """Check that the state is of a sampler of the same density.

        Raises:
            ValueError: if it is not.
        """
        own = self.state_dict()
        check_state(state, own)
        name = self.density.name
        if not np.array_equal(state[name], own[name]):
            raise ValueError(
                f"the saved timestep sampler has {name} parameters {state[name]}, this one {own[name]}: resume with "
                "equal values"
            )


def logit_normal_timesteps(num_timesteps: int, mean: float = 0.0, std: float = 1.0) -> DensityTimesteps:
    """Return a sampler of logit-normal times, see `LogitNormal`."""
    return DensityTimesteps(num_timesteps, LogitNormal(mean, std))


def shifted_timesteps(num_timesteps: int, shift: float = 3.0) -> DensityTimesteps:
    """Return a sampler of shifted uniform times, see `Shifted`."""
    return DensityTimesteps(num_timesteps, Shifted(shift))
