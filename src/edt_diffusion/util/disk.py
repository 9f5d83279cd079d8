"""Telling a full disk from other failures to write."""

import errno

# A full disk or quota; some libraries tell the number in words only.
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_FULL_WORDS = ("No space left", "quota exceeded")


def disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)
