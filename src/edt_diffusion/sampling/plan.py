"""Which pictures a job makes: the class, the seed and the name of each, by its number."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.inspection.summary import safe_names
from ..util.errors import UserError
from ..util.lookup import nearest
from ..util.rng import image_seed
from .labels import choose_labels

# Words that `--labels` takes beside the name of a file.
POLICIES = ("balanced", "random")


@dataclass(frozen=True)
class Plan:
    """The pictures of a job. Picture i of a larger job of the same kind is picture i of a smaller one.

    Attributes:
        policy: how the labels came about: "each class", "balanced", "random", "given" or "none".
        labels: int64 (N,), None for an unconditional model.
        seeds: one per picture.
        numbers: the number in the name of each picture: the one that its seed was made of.
        class_names: of the model, in label order; empty for an unconditional one.
        batch: pictures computed at once; batch b has the pictures b * batch to (b + 1) * batch - 1.
    """

    policy: str
    labels: np.ndarray | None
    seeds: Sequence[int]
    numbers: Sequence[int]
    class_names: Sequence[str]
    batch: int

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self) // self.batch)

    def rows(self, batch: int) -> range:
        """Numbers of the pictures of a batch."""
        return range(batch * self.batch, min((batch + 1) * self.batch, len(self)))

    def label(self, row: int) -> int | None:
        """Label of a picture."""
        return None if self.labels is None else int(self.labels[row])

    def class_of(self, row: int) -> str | None:
        """Class name of a picture."""
        label = self.label(row)
        return None if label is None else self.class_names[label]

    def files(self) -> list[str]:
        """Name of each picture's file, relative to the job's folder: "tench/000007.png" or "000007.png"."""
        folders = [f"{name}/" for name in safe_names(self.class_names)]
        names = [f"{number:06d}.png" for number in self.numbers]
        if self.labels is None:
            return names
        return [folders[label] + name for label, name in zip(self.labels.tolist(), names, strict=True)]

    def digest(self, count: int) -> str:
        """SHA-256 of the labels, seeds and numbers of the first `count` pictures."""
        labels = [-1] * count if self.labels is None else self.labels[:count].tolist()
        digest = hashlib.sha256()
        for label, seed, number in zip(labels, self.seeds[:count], self.numbers[:count], strict=True):
            digest.update(f"{label} {seed} {number}\n".encode())
        return digest.hexdigest()

    def by_class(self) -> dict[int | None, list[int]]:
        """The pictures of each class that there is, in the order in which classes first come."""
        if self.labels is None:
            return {None: list(range(len(self)))}
        out: dict[int | None, list[int]] = {}
        for row, label in enumerate(self.labels.tolist()):
            out.setdefault(label, []).append(row)
        return out


def plan_classes(
    labels: Sequence[int] | None,
    each: int,
    class_names: Sequence[str],
    batch: int,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """`each` pictures of every class in `labels`; picture i of a class has the same seed as picture i of any other.

    Classes take turns, so that a larger `each` adds pictures at the end.

    Args:
        labels: of the classes; None for an unconditional model.
        each: pictures of a class.
        class_names: of the model.
        batch: see `Plan`.
        seed: picture i of a class has the seed `image_seed(seed, i)`.
        seeds: these instead, `each` of them.
    """
    turns = [0] if labels is None else list(labels)
    own = [image_seed(seed, index) for index in range(each)] if seeds is None else list(seeds)
    return Plan(
        "none" if labels is None else "each class",
        None if labels is None else np.tile(np.asarray(turns, np.int64), each),
        [one for one in own for _ in turns],
        [index for index in range(each) for _ in turns],
        class_names,
        batch,
    )


def plan_labels(
    how: str,
    count: int | None,
    class_names: Sequence[str],
    classes: int | None,
    resolve: Callable[[list[int | str]], list[int] | None],
    batch: int,
    seed: int = 0,
) -> Plan:
    """Pictures whose labels are drawn or listed; picture i has the seed `image_seed(seed, i)`.

    Args:
        how: "balanced", "random", or a file: a class name or number a line, or an `.npy` array of numbers.
        count: how many; None is one per class, or what the file has.
        class_names: of the model.
        classes: number of the model's classes; None for an unconditional model.
        resolve: class names and numbers to labels, raising for those that are none.
        batch: see `Plan`.
        seed: of the pictures, and of random labels.

    Raises:
        UserError: neither a word nor a file, a file that cannot be read, has too few lines or names unknown classes, or
            a model without classes.
    """
    if classes is None:
        raise UserError(f"--labels {how}: this model is unconditional: leave it out")
    if how in POLICIES:
        labels, policy = choose_labels(how, count or classes, list(class_names), classes, seed)
        assert labels is not None
    else:
        entries = read_labels(how)
        if count is not None and count > len(entries):
            raise UserError(f"{how} has {len(entries)} labels: expected {count} (-n), or a smaller -n")
        try:
            resolved = resolve(entries[:count])
        except UserError as error:
            raise UserError(f"{how}: {error}") from None
        labels, policy = np.asarray(resolved, np.int64), "given"
    numbers = range(len(labels))
    return Plan(policy, labels, [image_seed(seed, number) for number in numbers], numbers, class_names, batch)


def read_labels(path: str) -> list[int | str]:
    """Class names or numbers in a file, one a line, or an `.npy` array of numbers.

    Raises:
        UserError: there is no such file, or it holds something else or nothing.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        guess = nearest(path, POLICIES)
        hint = f" (did you mean {guess!r}?)" if guess else ""
        raise UserError(f"--labels {path}: expected balanced, random, or a file with a class a line{hint}")
    try:
        if file.suffix == ".npy":
            array = np.load(file, allow_pickle=False)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise UserError(f"{path} holds {array.dtype} of shape {array.shape}: expected integers (N,)")
            entries: list[int | str] = array.tolist()
        else:
            entries = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as labels: expected text with a class a line, or .npy") from None
    if not entries:
        raise UserError(f"{path} holds no labels: expected a class name or number a line")
    return entries
