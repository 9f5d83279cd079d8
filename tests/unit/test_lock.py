import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edt_diffusion.util.disk import disk_full
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.lock import Lock

HOLD = """
import sys
from pathlib import Path
from edt_diffusion.util.lock import Lock
with Lock(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_one_at_a_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "folder":
        path.mkdir()
    first, second = Lock(path, "taken: wait"), Lock(path, "taken: wait")
    with first:
        first.acquire()  # nothing happens
        with pytest.raises(UserError, match="taken: wait"):
            second.acquire()
        Lock(path, "taken", active=False).acquire()
    with second:
        assert path.exists()
    assert path.exists()


def test_it_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="busy"):
            Lock(tmp_path, "busy").acquire()
        holder.kill()
        holder.wait()
    with Lock(tmp_path, "busy"):
        pass


def test_a_place_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        Lock(tmp_path / "absent/file", "busy").acquire()


def test_disk_full() -> None:
    assert disk_full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert disk_full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    assert disk_full(RuntimeError("Error while serializing: No space left on device (os error 28)"))
    assert not disk_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))
    assert not disk_full(ValueError("3 left"))


FORK = """
import os, sys, time
from pathlib import Path
from edt_diffusion.util.lock import Lock
lock = Lock(Path(sys.argv[1]), "taken")
lock.acquire()
child = os.fork()
if child == 0:
    del lock  # must not give back what is the parent's
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_neither_keeps_nor_gives_back_the_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match="busy"):
                Lock(tmp_path, "busy").acquire()
            holder.kill()
            holder.wait()
            with Lock(tmp_path, "busy"):
                os.kill(child, 0)  # it is still there
        finally:
            os.kill(child, 9)
