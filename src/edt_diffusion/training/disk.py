"""What is said when the disk refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..util.disk import disk_full
from ..util.errors import UserError


@contextmanager
def told_by_the_disk(step: int, folder: Path) -> Iterator[None]:
    """Turn failures to write `step` of the run in `folder` into one line with the remedy.

    Raises:
        UserError: the block could not write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "make room" if disk_full(error) else "mend that"
        raise UserError(
            f"step {step} cannot be saved in {folder} ({error}): {remedy} and run the same command again; it goes on "
            "from the last step saved"
        ) from error
