"""How the timestep of each training sample is drawn.

A sampler turns uniform numbers into timesteps and importance weights, and may learn from the losses that come back. It
holds numpy state only and draws nothing itself: the uniforms come from `util.rng`, keyed by sample.

Of a discrete process, timesteps are integers in `{0..T-1}`. On continuous time (flow matching) they are float32 in
(0, T), and what is learned about them is learned of the unit [k, k + 1) that they fall into.
"""

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

State = dict[str, "np.ndarray | int"]
Drawn = NDArray[np.int64] | NDArray[np.float32]  # of a discrete process, of continuous time

# Times keep this distance (of T) from both ends, where the signal-to-noise ratio is 0 or infinite.
_MARGIN = 1e-5


class TimestepSampler(Protocol):
    """What `MaskedTraining` and the trainer need of a sampler.

    Attributes:
        num_timesteps: T, the number of timesteps.
        rejected: how many losses were ignored because they would have spoilt what was learned.

    One for continuous time also has `continuous = True`.
    """

    num_timesteps: int
    rejected: int

    def draw(self, u: ArrayLike) -> tuple[Drawn, NDArray[np.float32]]:
        """Map uniforms in [0, 1), (B,), to timesteps (B,) and importance weights 1 / (T p_t), (B,)."""
        ...

    def update(self, t: ArrayLike, losses: ArrayLike) -> None:
        """Learn from the losses (B,) of timesteps (B,), in the order given."""
        ...

    def weights(self) -> NDArray[np.float64]:
        """Return the unnormalised probability of every timestep, (T,)."""
        ...

    def state_dict(self) -> State:
        """Return everything a resume needs, as numpy arrays and integers."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned."""
        ...


class UniformTimesteps:
    """Every timestep is equally likely, every weight is 1.

    Args:
        num_timesteps: T, at least 1.
        continuous: draw float32 times in (0, T) instead of integers.

    Raises:
        ValueError: if num_timesteps is smaller.
    """

    def __init__(self, num_timesteps: int, continuous: bool = False) -> None:
        self.num_timesteps = at_least_one("num_timesteps", num_timesteps)
        self.continuous = continuous
        self.rejected = 0

    def draw(self, u: ArrayLike) -> tuple[Drawn, NDArray[np.float32]]:
        """Map uniforms in [0, 1), (B,), to timesteps (B,) int64 in `{0..T-1}` and weights (B,) float32, all 1."""
        if self.continuous:
            t = inside(checked_uniforms(u), self.num_timesteps)
        else:
            t, _ = invert(self.weights(), u)
        return t, np.ones(t.shape, dtype=np.float32)

    def update(self, t: ArrayLike, losses: ArrayLike) -> None:
        """Do nothing: the distribution is fixed."""

    def weights(self) -> NDArray[np.float64]:
        """Return ones, (T,)."""
        return np.ones(self.num_timesteps)

    def state_dict(self) -> State:
        """Return the number of timesteps, so that a resume with another process is noticed."""
        return {"num_timesteps": self.num_timesteps}

    def load_state_dict(self, state: State) -> None:
        """Check that the state is of a uniform sampler over as many timesteps.

        Raises:
            ValueError: if it is not.
        """
        check_state(state, self.state_dict())


def invert(weights: NDArray[np.float64], u: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Timesteps of the uniforms under p = weights / sum(weights), and p."""
    uniforms = checked_uniforms(u)
    p = weights / weights.sum()
    cumulative = p.cumsum()
    # Dividing by the last entry makes it exactly 1, so that no u < 1 falls past the end.
    cumulative /= cumulative[-1]
    return cumulative.searchsorted(uniforms, side="right").astype(np.int64), p


def checked_uniforms(u: ArrayLike) -> NDArray[np.float64]:
    """Return uniforms as float64, or raise a ValueError if one is outside [0, 1)."""
    uniforms = np.asarray(u, dtype=np.float64)
    if not np.all((uniforms >= 0.0) & (uniforms < 1.0)):
        raise ValueError(f"u = {uniforms}: expected uniforms in [0, 1)")
    return uniforms


def inside(shares: NDArray[np.float64], num_timesteps: int) -> NDArray[np.float32]:
    """Return the times of shares of T, strictly between 0 and T also after rounding to float32."""
    return (shares.clip(_MARGIN, 1.0 - _MARGIN) * num_timesteps).astype(np.float32)


def at_least_one(name: str, value: int) -> int:
    """Return a count, or raise a ValueError if it is smaller than 1."""
    if value < 1:
        raise ValueError(f"{name} = {value}: expected at least 1")
    return value


def check_state(state: State, own: State) -> None:
    """Raise a ValueError unless `state` has the keys, sizes and array shapes of `own`."""
    if state.keys() != own.keys():
        raise ValueError(
            f"the saved timestep sampler has entries {sorted(state)}, expected {sorted(own)}: it was saved by another "
            "kind of sampler; resume with the sampler the run was started with"
        )
    for name in ("num_timesteps", "history"):
        if name in own and int(state[name]) != own[name]:
            raise ValueError(
                f"the saved timestep sampler has {name} = {state[name]}, this one {own[name]}: resume with equal values"
            )
    for name in ("losses", "seen"):
        if name in own and np.shape(state[name]) != np.shape(own[name]):
            raise ValueError(
                f"{name} of the saved timestep sampler has shape {np.shape(state[name])}, expected "
                f"{np.shape(own[name])}: the saved state is damaged"
            )
