"""One process at a time in a run folder."""

from pathlib import Path

from ..util.lock import Lock


class RunLock(Lock):
    """Exclusive advisory lock on a run folder; see `util.lock.Lock`.

    Args:
        folder: the run folder; must exist when the lock is acquired.
        active: False for the processes of a job that only help the one that writes.
    """

    def __init__(self, folder: Path, active: bool = True) -> None:
        refusal = f"another process is training in {folder}: wait for it, or choose another --out"
        super().__init__(folder / ".lock", refusal, active)
