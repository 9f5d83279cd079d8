"""One process at a time."""

import contextlib
import os
import time
import weakref
from pathlib import Path
from types import TracebackType

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Busy(UserError):
    """Somebody else holds a lock."""


class Lock:
    """Advisory lock on a file or folder, held from `acquire` to `release` or to the end of the process.

    A file system without locks, or a system without `fcntl`, does without.

    Args:
        path: a folder that exists when the lock is acquired, or a file that is made if absent.
        refusal: what to tell a user when somebody else holds it.
        active: False for the processes of a job that only help the one that writes.
        shared: keep out those only who want it for themselves.
    """

    def __init__(self, path: Path, refusal: str, active: bool = True, shared: bool = False) -> None:
        self.path = path
        self.refusal = refusal
        self.shared = shared
        self.active = active and fcntl is not None
        self._descriptor: int | None = None
        _LOCKS.add(self)

    def acquire(self) -> None:
        """Take the lock; nothing happens if this object holds it.

        Raises:
            Busy: if somebody else holds it.
            UserError: if it cannot be opened.
        """
        if not self.active or fcntl is None or self._descriptor is not None:
            return
        try:
            # For reading only: the file may be another user's.
            descriptor = os.open(self.path, os.O_RDONLY | (0 if self.path.is_dir() else os.O_CREAT), 0o666)
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened ({error.strerror}): choose another --out") from None
        kind = (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        try:
            try:
                fcntl.flock(descriptor, kind)
            except BlockingIOError:
                time.sleep(0.05)  # whoever only asks whether it is taken holds it for a moment
                fcntl.flock(descriptor, kind)
        except BlockingIOError:
            os.close(descriptor)
            raise Busy(self.refusal) from None
        except OSError:
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held. The file stays: removing it would be a race."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None and fcntl is not None:
            # Closing alone would leave it to a process of another program's making that has a copy of the descriptor.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()

    def forget(self) -> None:
        """Close a forked copy of the descriptor; the lock stays with the process that took it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _forget_all() -> None:
    for lock in list(_LOCKS):
        lock.forget()


_LOCKS: "weakref.WeakSet[Lock]" = weakref.WeakSet()

# A loader process outlives a training process that is killed by some seconds, and would hold its locks as long.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
