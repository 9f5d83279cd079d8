"""Timesteps drawn in proportion to the size of their recent losses."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .timesteps import Drawn, State, at_least_one, check_state, invert

# Once _TYPICAL_COUNT losses are remembered, one above _OUTLIER times their mean is no news about the timestep: a step
# that went wrong gave it. In the history its square would leave nothing for the other timesteps.
_TYPICAL_COUNT = 100
_OUTLIER = 1000.0


class LossSecondMomentTimesteps:
    """Importance sampling: p_t proportional to sqrt(E[loss_t^2]), over the last few losses of each timestep.

    Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.3. Until every timestep has `history` losses the distribution
    is uniform. Afterwards p_t = (1 - uniform_prob) * sqrt(mean(loss_t^2)) / sum + uniform_prob / T, and the weight
    1 / (T p_t) keeps the expected gradient that of uniform sampling.

    Correct on many processes: the caller gathers (t, loss) of the whole global batch in position order before
    `update`, so that every process holds the same history. Losses are those before importance weighting.

    A non-finite loss is ignored and counted: in the history it would turn p into NaN for all timesteps. So is, once 100
    losses are remembered, one above 1000 times the mean of those remembered before the call.

    Args:
        num_timesteps: T, at least 1.
        history: losses remembered per timestep, at least 1.
        uniform_prob: share of uniform sampling mixed in, in [0, 1].
        continuous: draw the middle k + 0.5 of each unit of time, as float32, instead of k.

    Attributes:
        rejected: number of losses ignored so far.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self, num_timesteps: int, history: int = 10, uniform_prob: float = 0.001, continuous: bool = False
    ) -> None:
        if not 0.0 <= uniform_prob <= 1.0:
            raise ValueError(f"uniform_prob = {uniform_prob}: expected a share between 0 and 1")
        self.num_timesteps = at_least_one("num_timesteps", num_timesteps)
        self.history = at_least_one("history", history)
        self.uniform_prob = uniform_prob
        self.continuous = continuous
        self.rejected = 0
        # Ring buffer: the k-th loss ever seen at a timestep is in column k mod history.
        self._losses = np.zeros((num_timesteps, history), dtype=np.float64)
        self._seen = np.zeros(num_timesteps, dtype=np.int64)

    def draw(self, u: ArrayLike) -> tuple[Drawn, NDArray[np.float32]]:
        """Map uniforms to timesteps by the inverse distribution function, as `numpy.random.choice` does.

        Args:
            u: uniforms in [0, 1), (B,).

        Returns:
            Timesteps (B,) int64 in `{0..T-1}` (float32, larger by 0.5, on continuous time) and importance weights
            1 / (T p_t), (B,) float32.

        Raises:
            ValueError: if a uniform is outside [0, 1).
        """
        t, p = invert(self.weights(), u)
        weight = (1.0 / (self.num_timesteps * p[t])).astype(np.float32)
        return (t + 0.5).astype(np.float32) if self.continuous else t, weight

    def update(self, t: ArrayLike, losses: ArrayLike) -> None:
        """Remember losses, in the order given; equal to remembering them one after the other.

        Args:
            t: timesteps (B,), integers in `{0..T-1}`, or times whose integer part is meant; repeats allowed.
            losses: their losses (B,), before importance weighting.

        Raises:
            ValueError: if the shapes differ or a timestep is outside its range.
        """
        steps, values = np.asarray(t, dtype=np.int64), np.asarray(losses, dtype=np.float64)
        if steps.ndim != 1 or steps.shape != values.shape:
            raise ValueError(f"t has shape {steps.shape}, losses {values.shape}: expected two vectors of one length")
        if np.any((steps < 0) | (steps >= self.num_timesteps)):
            raise ValueError(f"t ranges over {steps.min()}..{steps.max()}: expected 0..{self.num_timesteps - 1}")
        usable = np.isfinite(values) & (values <= self._largest_usable())
        self.rejected += int(np.count_nonzero(~usable))
        steps, values = steps[usable], values[usable]

        order = np.argsort(steps, kind="stable")
        steps, values = steps[order], values[order]
        distinct, first, repeats = np.unique(steps, return_index=True, return_counts=True)
        occurrence = np.arange(steps.size) - np.repeat(first, repeats)
        # Of more repeats than the history holds only the last survive; writing a cell twice has no defined order.
        kept = occurrence >= np.repeat(repeats, repeats) - self.history
        column = (self._seen[steps] + occurrence) % self.history
        self._losses[steps[kept], column[kept]] = values[kept]
        self._seen[distinct] += repeats

    def _largest_usable(self) -> float:
        count = int(np.minimum(self._seen, self.history).sum())
        mean = self._losses.sum() / max(count, 1)
        return _OUTLIER * mean if count >= _TYPICAL_COUNT and mean > 0.0 else np.inf

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
        check_state(state, self.state_dict())
        self._losses = np.array(state["losses"], dtype=np.float64)
        self._seen = np.array(state["seen"], dtype=np.int64)
        self.rejected = int(state["rejected"])
