"""What a run records: JSON lines, TensorBoard where it is installed, and the trackers that the user named."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..util.files import atomic_write_text
from ..util.pictures import to_pil
from .lines import lines_until, log_path, read_events, read_log
from .meters import MeanMetrics

__all__ = ["MeanMetrics", "MetricLog", "read_events", "read_log"]

logger = logging.getLogger(__name__)


class MetricLog:
    """`log.jsonl` of a run, and everything that is told the same: TensorBoard where installed, and trackers.

    A tracker that fails (a network that is down, say) is told nothing more; the run goes on.

    Args:
        folder: the run folder.
        start_step: lines of later steps, left by an interrupted process, are dropped, events included.
        trackers: accelerate's trackers, started; see `trackers.build_trackers`.
    """

    def __init__(self, folder: Path, start_step: int, trackers: Sequence[Any] = ()) -> None:
        self.folder, self.path = folder, log_path(folder)
        self._trackers = list(trackers)
        self._open(start_step)

    def _open(self, step: int) -> None:
        if self.path.exists():
            text = self.path.read_text("utf-8", errors="replace")
            kept = "".join(line + "\n" for line in lines_until(text, step))
            if kept != text:
                atomic_write_text(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line `{"step": ..., **values}`; what is not finite becomes null, for JSON has no NaN."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._append({"step": step, **{name: finite.get(name) for name in values}})
        for name, value in values.items():
            self._show(lambda board, name=name, value=value: board.add_scalar(name, value, step))
        self._tell(lambda tracker: tracker.log(finite, step=step))

    def image(self, name: str, step: int, array: np.ndarray) -> None:
        """Show a picture, uint8 (H, W, 1) or (H, W, 3), in TensorBoard and in those trackers that take pictures."""
        self._show(lambda board: board.add_image(name, array, step, dataformats="HWC"))

        def show(tracker: Any) -> None:
            if hasattr(tracker, "log_images"):
                picture = to_pil(array)
                tracker.log_images({name: picture if tracker.name == "aim" else [picture]}, step=step)

        self._tell(show)

    def event(self, step: int, kind: str, message: str) -> None:
        """Append one line `{"step": ..., "event": kind, "message": ...}`.

        Args:
            step: steps made when it happened.
            kind: one word, as "skip", "rollback" or "spike".
            message: one sentence for people.
        """
        self._append({"step": step, "event": kind, "message": message})
        self._show(lambda board: board.add_text("events", f"{kind}: {message}", step))

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, to which the run has gone back; tell the event of that afterwards.

        Trackers keep what they were told: none of them can forget.
        """
        self._file.close()
        self._show(lambda board: board.close())
        self._open(step)

    def sync(self) -> None:
        """Flush to the disk, so that lines of a step are there before its checkpoint is."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, TensorBoard and the trackers; may be called twice."""
        self._file.close()
        self._show(lambda board: board.close())
        self._tell(lambda tracker: tracker.finish())
        self._trackers = []

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def _show(self, call: Callable[[Any], None]) -> None:
        try:
            if self._board is not None:
                call(self._board)
        except OSError as error:  # a full disk, or none: what matters is in log.jsonl and the checkpoints
            self._board = None
            logger.warning("TensorBoard failed (%s): nothing more is written there", error)

    def _tell(self, call: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # of any third party: none is worth a run
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split())
                logger.warning("tracker %s failed (%s): nothing more is sent to it", tracker.name, reason)
