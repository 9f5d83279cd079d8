"""How the timestep of each training sample is drawn.

A sampler turns uniform numbers into timesteps and importance weights, and may learn from the losses that come back. It
holds numpy state only and draws nothing itself: the uniforms come from `util.rng`, keyed by sample.
"""

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

State = dict[str, "np.ndarray | int"]


class TimestepSampler(Protocol):
    """What `MaskedTraining` and the trainer need of a sampler.

    Attributes:
        num_timesteps: T, the number of timesteps.
        rejected: how many non-finite losses were ignored.
    """

    num_timesteps: int
    rejected: int

    def draw(self, u: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
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

    Raises:
        ValueError: if num_timesteps is smaller.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = _at_least_one("num_timesteps", num_timesteps)
        self.rejected = 0

    def draw(self, u: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Map uniforms in [0, 1), (B,), to timesteps (B,) int64 in `{0..T-1}` and weights (B,) float32, all 1."""
        t, _ = _invert(self.weights(), u)
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
        _check_state(state, self.state_dict())


class LossSecondMomentTimesteps:
    """Importance sampling: p_t proportional to sqrt(E[loss_t^2]), over the last few losses of each timestep.

    Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.3. Until every timestep has `history` losses the distribution
    is uniform. Afterwards p_t = (1 - uniform_prob) * sqrt(mean(loss_t^2)) / sum + uniform_prob / T, and the weight
    1 / (T p_t) keeps the expected gradient that of uniform sampling.

    Correct on many processes: the caller gathers (t, loss) of the whole global batch in position order before
    `update`, so that every process holds the same history. Losses are those before importance weighting.

    A non-finite loss is ignored and counted: in the history it would turn p into NaN for all timesteps.

    Args:
        num_timesteps: T, at least 1.
        history: losses remembered per timestep, at least 1.
        uniform_prob: share of uniform sampling mixed in, in [0, 1].

    Attributes:
        rejected: number of non-finite losses ignored so far.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(self, num_timesteps: int, history: int = 10, uniform_prob: float = 0.001) -> None:
        if not 0.0 <= uniform_prob <= 1.0:
            raise ValueError(f"uniform_prob = {uniform_prob}: expected a share between 0 and 1")
        self.num_timesteps = _at_least_one("num_timesteps", num_timesteps)
        self.history = _at_least_one("history", history)
        self.uniform_prob = uniform_prob
        self.rejected = 0
        # Ring buffer: the k-th loss ever seen at a timestep is in column k mod history.
        self._losses = np.zeros((num_timesteps, history), dtype=np.float64)
        self._seen = np.zeros(num_timesteps, dtype=np.int64)

    def draw(self, u: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Map uniforms to timesteps by the inverse distribution function, as `numpy.random.choice` does.

        Args:
            u: uniforms in [0, 1), (B,).

        Returns:
            Timesteps (B,) int64 in `{0..T-1}` and importance weights 1 / (T p_t), (B,) float32.

        Raises:
            ValueError: if a uniform is outside [0, 1).
        """
        t, p = _invert(self.weights(), u)
        return t, (1.0 / (self.num_timesteps * p[t])).astype(np.float32)

    def update(self, t: ArrayLike, losses: ArrayLike) -> None:
        """Remember losses, in the order given; equal to remembering them one after the other.

        Args:
            t: timesteps (B,), integers in `{0..T-1}`, repeats allowed.
            losses: their losses (B,), before importance weighting.

        Raises:
            ValueError: if the shapes differ or a timestep is outside its range.
        """
        steps, values = np.asarray(t, dtype=np.int64), np.asarray(losses, dtype=np.float64)
        if steps.ndim != 1 or steps.shape != values.shape:
            raise ValueError(f"t has shape {steps.shape}, losses {values.shape}: expected two vectors of one length")
        if np.any((steps < 0) | (steps >= self.num_timesteps)):
            raise ValueError(f"t ranges over {steps.min()}..{steps.max()}: expected 0..{self.num_timesteps - 1}")
        finite = np.isfinite(values)
        self.rejected += int(np.count_nonzero(~finite))
        steps, values = steps[finite], values[finite]

        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        distinct, first, repeats = np.unique(steps, return_index=True, return_counts=True)
        occurrence = np.arange(steps.size) - np.repeat(first, repeats)
        # Of more repeats than the history holds only the last survive; writing a cell twice has no defined order.
        kept = occurrence >= np.repeat(repeats, repeats) - self.history
        column = (self._seen[steps] + occurrence) % self.history
        self._losses[steps[kept], column[kept]] = values[kept]
        self._seen[distinct] += repeats

    def weights(self) -> NDArray[np.float64]:
        """Return the probability of every timestep, (T,); ones while some timestep still lacks losses."""
        if np.any(self._seen < self.history):
            return np.ones(self.num_timesteps)
        # Oldest first: the order of summation, hence the last bit, is then that of a queue that is shifted.
        columns = (self._seen[:, None] + np.arange(self.history)) % self.history
        moments = np.sqrt(np.mean(np.take_along_axis(self._losses, columns, axis=1) ** 2, axis=1))
        total = moments.sum()
        if total == 0.0:
            return np.ones(self.num_timesteps)
        return (moments / total) * (1.0 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def state_dict(self) -> State:
        """Return copies of the history (T, history), of the losses seen per timestep (T,), and the counter."""
        return {
            "num_timesteps": self.num_timesteps,
            "history": self.history,
            "rejected": self.rejected,
            "losses": self._losses.copy(),
            "seen": self._seen.copy(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if the state is of another kind of sampler, or of another T or history.
        """
        _check_state(state, self.state_dict())
        self._losses = np.array(state["losses"], dtype=np.float64)
        self._seen = np.array(state["seen"], dtype=np.int64)
        self.rejected = int(state["rejected"])


def _invert(weights: NDArray[np.float64], u: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Timesteps of the uniforms under p = weights / sum(weights), and p."""
    uniforms = np.asarray(u, dtype=np.float64)
    if not np.all((uniforms >= 0.0) & (uniforms < 1.0)):
        raise ValueError(f"u = {uniforms}: expected uniforms in [0, 1)")
    p = weights / weights.sum()
    cumulative = p.cumsum()
    # Dividing by the last entry makes it exactly 1, so that no u < 1 falls past the end.
    cumulative /= cumulative[-1]
    return cumulative.searchsorted(uniforms, side="right").astype(np.int64), p


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} = {value}: expected at least 1")
    return value


def _check_state(state: State, own: State) -> None:
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
