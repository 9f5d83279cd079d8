"""What is said when the disk refuses."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..util.errors import UserError

# A full disk or quota; safetensors tells the number in words only.
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_FULL_WORDS = ("No space left", "quota exceeded")


@contextmanager
def told_by_the_disk(step: int, folder: Path) -> Iterator[None]:
    """Turn failures to write `step` of the run in `folder` into one line with the remedy.

    Raises:
        UserError: the block could not write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)
        raise UserError(
            f"step {step} cannot be saved in {folder} ({error}): {'make room' if full else 'mend that'} and run the "
            "same command again; it goes on from the last step saved"
        ) from error
