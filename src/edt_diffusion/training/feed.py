"""A run's stream of micro-batches, which outlives its loader processes."""

from collections.abc import Callable, Iterator
from typing import Any

from ..data.loader import WorkerLost
from ..util.errors import UserError

_RESTARTS = 3


class Feed:
    """Micro-batches from a step on; a loader whose process was killed is started anew where it was.

    The batches are functions of the step, so that none is lost and none comes twice.

    Args:
        make_loader: endless micro-batches from a given step on.
        step: the first step.
        micro_batches: of a step.
        told: is told what happened, in one sentence.
    """

    def __init__(
        self,
        make_loader: Callable[[int], Iterator[dict[str, Any]]],
        step: int,
        micro_batches: int,
        told: Callable[[str], None],
    ) -> None:
        self._make_loader, self._micro_batches, self._told = make_loader, micro_batches, told
        self._deaths = 0
        self.restart(step)

    def restart(self, step: int) -> None:
        """Go on with the first micro-batch of `step`."""
        if hasattr(self, "_loader"):
            self.close()
        self._loader = self._make_loader(step)
        self._place = step * self._micro_batches
        self._behind = 0

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> dict[str, Any]:
        """The next micro-batch.

        Raises:
            UserError: loader processes have been killed several times with no batch between.
        """
        while True:
            try:
                while self._behind:  # what this step has had already
                    next(self._loader)
                    self._behind -= 1
                batch = next(self._loader)
            except WorkerLost as error:
                self._start_anew(error)
                continue
            self._deaths = 0
            self._place += 1
            return batch

    def _start_anew(self, error: WorkerLost) -> None:
        self._deaths += 1
        if self._deaths > _RESTARTS:
            raise UserError(
                f"loader processes were killed {self._deaths} times in a row ({error}): set data.workers=0, or lower "
                "it, and run the same command again"
            ) from error
        step, self._behind = divmod(self._place, self._micro_batches)
        self.close()
        self._loader = self._make_loader(step)
        self._told(f"a loader process was killed ({error}); the loader was started anew, nothing is lost")

    def close(self) -> None:
        """End the loader processes."""
        close = getattr(self._loader, "close", None)
        if close is not None:
            close()
