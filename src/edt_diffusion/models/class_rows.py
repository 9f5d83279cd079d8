"""Which rows of one class table belong to which of another, and what new rows start from."""

from collections.abc import Callable, Sequence

from torch import Tensor

# What a class that the source does not know starts from. The null row is an input the network knows: it was trained to
# answer it with a picture of any class, so a new class starts there, and guidance starts without effect. The mean of
# the class rows is an input it has never seen; it serves models trained without label dropout, whose null row is noise.
NEW_CLASS_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "null": lambda rows: rows[-1],
    "mean": lambda rows: rows[:-1].mean(dim=0),
}


def match_classes(source: Sequence[str], target: Sequence[str]) -> list[int | None]:
    """For each target name the index of the source name that is meant, or None.

    Equal names belong together; of a name that occurs several times, the first to the first and so on, if it occurs as
    often on both sides. Names left over belong together where they are unique on both sides once case is ignored.
    """
    pairs: list[int | None] = [None] * len(target)

    def join(key: Callable[[str], str], repeated: bool) -> None:
        free = [row for row in range(len(source)) if row not in pairs]
        open_rows = [row for row in range(len(target)) if pairs[row] is None]
        for name in {key(target[row]) for row in open_rows}:
            theirs = [row for row in free if key(source[row]) == name]
            ours = [row for row in open_rows if key(target[row]) == name]
            if len(theirs) == len(ours) and (repeated or len(ours) == 1):
                for row, origin in zip(ours, theirs, strict=True):
                    pairs[row] = origin

    join(str, repeated=True)
    join(str.casefold, repeated=False)
    return pairs
