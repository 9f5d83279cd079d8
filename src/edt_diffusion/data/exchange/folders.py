"""A folder that appears whole or not at all, and may hold millions of files."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...util.errors import UserError
from ...util.files import make_folder


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that is renamed to `out` when the block ends, and removed when it raises.

    As `util.files.atomic_directory`, but the disk is flushed once for all files: flushing each of millions takes hours.

    Raises:
        UserError: `out` exists and is not an empty folder, or cannot be made.
    """
    out = Path(os.path.abspath(out.expanduser()))
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} exists already: name a new folder")
    make_folder(out.parent)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _flush()
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()  # empty
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush()


def _flush() -> None:
    if hasattr(os, "sync"):  # Windows has none, and writes renames through by itself
        os.sync()
