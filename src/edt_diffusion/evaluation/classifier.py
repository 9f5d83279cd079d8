"""A judge of generated pictures: a classifier trained on the real ones, with its own accuracy on unseen real ones.

`judges` has one file for each kind, `fidelity` what is made of a judge's answers.
"""

import contextlib
import hashlib
import json
import os
from typing import Any

import numpy as np

from ..data import ImageDataset, stratified_split
from ..data.shard_files import cache_folder
from ..util.errors import UserError
from ..util.files import make_folder
from ..util.lookup import lookup
from .extractors.base import Extractor
from .fidelity import ClassFidelity, Share, class_fidelity, confusion_picture
from .judges import conv, linear, logits
from .judges.base import FACTS, Classifier, read_files, size_text
from .judges.conv import ConvClassifier
from .judges.linear import LinearProbe
from .judges.logits import LogitsClassifier
from .pixels import Progress
from .wilson import wilson_interval

__all__ = [
    "KINDS",
    "ClassFidelity",
    "Classifier",
    "ConvClassifier",
    "LinearProbe",
    "LogitsClassifier",
    "Share",
    "check_judge",
    "class_fidelity",
    "classifier_for",
    "confusion_picture",
    "load_classifier",
    "pictures_digest",
    "train_classifier",
    "wilson_interval",
]

HELD_OUT = 0.2
KINDS = {"auto": "", "conv": "conv", "linear": "linear", "logits": "logits"}  # "auto" depends on the extractor
_NEEDS_EXTRACTOR = ("linear", "logits")
_FORMAT = 2  # of the digests: a change of what they cover, or of how a kind learns, makes old judges unknown


def train_classifier(
    kind: str,
    dataset: ImageDataset,
    held_out: ImageDataset | None = None,
    extractor: Extractor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    flip: bool = False,
) -> Classifier:
    """Train a judge on real pictures, and measure its accuracy on others.

    Its facts (`Classifier.identity`) then hold `held_out_pictures`, `held_out_accuracy` and `held_out_interval` (95 %,
    Wilson): class fidelity means little without them.

    Args:
        kind: "conv" (a small network, trained from scratch), "linear" (logistic regression on an extractor's features),
            "logits" (an extractor's own classes, which must be the data's in label order), or "auto": linear with an
            extractor, conv without.
        dataset: real pictures with labels.
        held_out: other real pictures of the same classes; without them a fifth of each class of `dataset` is kept out.
        extractor: for "linear" and "logits".
        seed: of the split and of all that training draws.
        progress: told (done, in all) of one stage after the other.
        flip: whether "conv" sees pictures mirrored half of the time; not for digits, letters and the like.

    Returns:
        The judge.

    Raises:
        UserError: an unknown kind, no extractor where one is needed, pictures without labels, a class without
            pictures, held-out pictures of other classes or another size, or an extractor whose classes do not fit.
    """
    kind = _resolved(kind, extractor)
    training, held_out = _parts(dataset, held_out, seed)
    return _train(kind, training, held_out, extractor, seed, progress, flip)


def classifier_for(
    kind: str,
    dataset: ImageDataset,
    held_out: ImageDataset | None = None,
    extractor: Extractor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    flip: bool = False,
    digests: tuple[str, str | None] | None = None,
) -> Classifier:
    """Like `train_classifier`, but trains once: judges are kept in `$EDT_CACHE/judges/<digest>`.

    The digest is of everything that decides the outcome: the decoded pixels, labels and class names of both sets, the
    kind and its settings, the extractor, and the seed. Of two processes that train the same one, either's is kept.

    Args:
        kind, dataset, held_out, extractor, seed, progress, flip: as there.
        digests: `pictures_digest` of both sets, where they are known already.
    """
    kind = _resolved(kind, extractor)
    training, unseen = _parts(dataset, held_out, seed)
    if digests is None:
        other = None if held_out is None else pictures_digest(held_out, progress)
        digests = pictures_digest(dataset, progress), other
    settings: dict[str, Any] = {"conv": conv.settings(flip), "linear": linear.settings(), "logits": {}}[kind]
    key = {
        "format": _FORMAT,
        "kind": kind,
        "settings": settings,
        "seed": seed,
        "training": digests[0],
        "held_out": digests[1] or HELD_OUT,
        "extractor": extractor.identity() if extractor is not None and kind in _NEEDS_EXTRACTOR else None,
    }
    folder = cache_folder() / "judges" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    with contextlib.suppress(UserError):  # absent or damaged: it is made anew
        return load_classifier(folder, extractor)
    make_folder(folder.parent)
    judge = _train(kind, training, unseen, extractor, seed, progress, flip)
    with contextlib.suppress(FileExistsError):  # another process was faster
        judge.save(folder, replace=folder.exists() and not _readable(folder, extractor))
    return judge


def check_judge(
    kind: str, dataset: ImageDataset, held_out: ImageDataset | None = None, extractor: Extractor | None = None
) -> None:
    """Raise the mistakes that `train_classifier` would find before it reads any picture."""
    _resolved(kind, extractor)
    _parts(dataset, held_out, 0)


def load_classifier(path: str | os.PathLike[str], extractor: Extractor | None = None) -> Classifier:
    """Open a judge that `Classifier.save` wrote.

    Args:
        path: its folder.
        extractor: the one it was made with, for "linear" and "logits"; others pass it over.

    Raises:
        UserError: it is no judge, was damaged, or needs another extractor.
    """
    tree, tensors = read_files(path)
    try:
        if tree["kind"] == "conv":
            return ConvClassifier.from_files(tree, tensors)
        if tree["kind"] == "linear":
            return LinearProbe.from_files(tree, tensors, extractor)
        if tree["kind"] == "logits":
            return LogitsClassifier.from_files(tree, extractor)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(path)!r}: {FACTS} and its weights do not fit ({reason}): train a judge anew") from None
    raise UserError(
        f"{str(path)!r} is a judge of kind {tree['kind']!r}, expected one of {', '.join(KINDS)}: train anew"
    )


def pictures_digest(dataset: ImageDataset, progress: Progress | None = None) -> str:
    """SHA-256 over what a dataset shows: size, number, class names, labels, and the decoded pixels, block by block."""
    facts = [*dataset.size, dataset.channels, len(dataset), dataset.class_names]
    digest = hashlib.sha256(json.dumps(facts).encode())
    if dataset.labels is not None:
        digest.update(dataset.labels.astype("<i8").tobytes())
    for start in range(0, len(dataset), 256):
        rows = np.arange(start, min(start + 256, len(dataset)))
        digest.update(dataset.images(rows).tobytes())
        if progress is not None:
            progress(int(rows[-1]) + 1, len(dataset))
    return digest.hexdigest()


def _resolved(kind: str, extractor: Extractor | None) -> str:
    kind = lookup(KINDS, kind, "kind of judge") or ("conv" if extractor is None else "linear")
    if kind in _NEEDS_EXTRACTOR and extractor is None:
        raise UserError(f"a judge of kind {kind} looks at an extractor's output, none was given: name one, or use conv")
    return kind


def _parts(dataset: ImageDataset, held_out: ImageDataset | None, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """The pictures to train on and those to measure the accuracy on."""
    if dataset.labels is None or dataset.class_names is None or len(dataset.class_names) < 2:
        raise UserError(
            f"{dataset.source} has {'no' if dataset.labels is None else 'fewer than two'} classes: a judge tells "
            "classes apart; sort the pictures into one sub-folder per class, or evaluate without a judge"
        )
    empty = [name for name, count in dataset.class_counts().items() if not count]
    if empty:
        raise UserError(
            f"{dataset.source} has no pictures of class {empty[0]!r}: a judge cannot learn it; use more of the data"
        )
    if held_out is None:
        return stratified_split(dataset, HELD_OUT, seed)
    if held_out.labels is None or held_out.class_names != dataset.class_names or not len(held_out):
        raise UserError(
            f"held-out pictures of {held_out.source} have not the classes of {dataset.source}: expected labelled "
            "pictures of the same classes in the same order"
        )
    ours, theirs = (*dataset.size, dataset.channels), (*held_out.size, held_out.channels)
    if ours != theirs:
        raise UserError(
            f"held-out pictures are {size_text(theirs)}, the others {size_text(ours)}: open both at the same size"
        )
    return dataset, held_out


def _train(
    kind: str,
    training: ImageDataset,
    held_out: ImageDataset,
    extractor: Extractor | None,
    seed: int,
    progress: Progress | None,
    flip: bool,
) -> Classifier:
    assert held_out.labels is not None
    assert training.class_names is not None
    if kind == "conv":
        judge: Classifier = conv.train_conv(training, seed, flip, progress)
    else:
        assert extractor is not None
        if kind == "linear":
            judge = linear.train_linear(training, extractor, seed, progress)
        else:
            shape = (*training.size, training.channels)
            judge = LogitsClassifier(extractor, training.class_names, shape, {"seed": seed})
    shares = class_fidelity(judge.predict_source(held_out, progress), held_out.labels, judge.class_names).overall
    assert shares.share is not None
    judge.facts |= {
        "held_out_pictures": shares.count,
        "held_out_accuracy": shares.share,
        "held_out_interval": list(shares.interval),
    }
    if kind == "logits":
        assert extractor is not None
        logits.check_order(shares.share, len(judge.class_names), extractor.name)
    return judge


def _readable(folder: os.PathLike[str], extractor: Extractor | None) -> bool:
    try:
        load_classifier(folder, extractor)
    except UserError:
        return False
    return True
