"""Class fidelity and memorisation of one set of pictures after another, in one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import ImageDataset
from ..util.errors import UserError
from ..util.files import atomic_path
from ..util.pictures import save_png
from ..util.progress import CountProgress
from .classifier import KINDS, Classifier, check_judge, classifier_for, load_classifier, pictures_digest
from .extractors.base import Extractor
from .fidelity import ClassFidelity, class_fidelity, confusion_picture
from .memorisation import CopySearch
from .pairs import pairs_picture
from .pixels import PictureSource, as_source
from .result import Result

# Copies are looked for among pixels up to this side, among an extractor's features above it.
_SMALL_SIDE = 64


@dataclass(frozen=True)
class JudgeSettings:
    """How samples are judged.

    Attributes:
        kind: of the classifier, a name of `classifier.KINDS`, or the folder of a saved one.
        closest: pairs of samples and training pictures to show.
        level: of the intervals.
        seed: of the classifier's training.
    """

    kind: str = "auto"
    closest: int = 10
    level: float = 0.95
    seed: int = 0


class Judging:
    """A classifier trained on real pictures, and the pictures in which copies are looked for.

    Args:
        settings: how to judge.
        training: the pictures that the model was trained on.
        held_out: real pictures that it was not trained on, or None.
        mirrored: whether it saw the training pictures mirrored too.
        class_names: of the labels of the samples; None if they are the training set's.
        extractor: of a judge that needs one.
        quiet: no progress.
        labelled: whether the samples have classes; without them there is no class fidelity.

    Attributes:
        identity: what the answers depend on, as JSON holds it: the classifier, the training and held-out pictures, and
            what distances are measured in.

    Raises:
        UserError: the classes of samples and training pictures differ, or as `train_classifier`.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        training: ImageDataset,
        held_out: ImageDataset | None,
        mirrored: bool,
        class_names: list[str] | None,
        extractor: Extractor,
        quiet: bool = True,
        labelled: bool = True,
    ) -> None:
        self.settings, self.training, self.quiet = settings, training, quiet
        # Pixels say no more of a class than the network that is trained on them.
        judged_by = None if extractor.name == "pixels" else extractor
        # The pixels of large pictures say little of what is on them.
        looking = judged_by if min(training.size) > _SMALL_SIDE else None
        self.classifier: Classifier | None = None
        self._rows: np.ndarray | None = None
        self._lack = None if labelled else "the samples have no classes"
        if labelled and training.class_names is None:
            self._lack = f"the pictures of {training.source} have no classes"
        if self._lack is None:
            names = training.class_names
            if settings.kind in KINDS:
                check_judge(settings.kind, training, held_out, judged_by)
            else:
                self.classifier = load_classifier(settings.kind, judged_by)
                names = self.classifier.class_names
            assert names is not None
            self._rows = _numbering(class_names, names)
        self._copies = CopySearch(training, held_out, looking, mirrored)
        with CountProgress("training pictures", "pictures", quiet) as told:
            ours = pictures_digest(training, told)
            theirs = None if held_out is None else pictures_digest(held_out, told)
        if self._lack is None and self.classifier is None:
            with CountProgress("judge", "pictures", quiet) as told:
                self.classifier = classifier_for(
                    settings.kind, training, held_out, judged_by, settings.seed, told,
                    flip=mirrored, digests=(ours, theirs),
                )  # fmt: skip
        self.identity: dict[str, Any] = {
            "classifier": None if self.classifier is None else self.classifier.identity(),
            "training": {"pictures": len(training), "sha256": ours, "mirrored": mirrored},
            "held_out": None if held_out is None else {"pictures": len(held_out), "sha256": theirs},
            "baseline": self._copies.baseline,
            "space": self._copies.space,
            "closest": settings.closest,
            "level": settings.level,
        }

    def __call__(
        self, result: Result, pictures: np.ndarray | PictureSource, labels: np.ndarray | None, path: Path
    ) -> None:
        """Add what there is to say of `pictures` to their result, and draw `path`-confusion.png and -closest.png.

        The confusions of more than 30 classes are in `path`-confusion.npy, int64 (asked for, recognised as).
        """
        rows = None
        if self._lack is not None:
            result.warnings.append(f"no class fidelity: {self._lack}")
        if self.classifier is not None and labels is not None:
            rows = labels if self._rows is None else self._rows[labels]
            probabilities = self.classifier.predict_source(as_source(pictures))
            found = class_fidelity(probabilities, rows, self.classifier.class_names, self.settings.level)
            save_png(confusion_picture(found), path.with_name(f"{path.name}-confusion.png"))
            beside = _matrix_file(found, path.with_name(f"{path.name}-confusion.npy"))
            result.judge = {
                "class_fidelity": found.accuracy,
                "interval": list(found.overall.interval),
                "held_out_accuracy": self.classifier.facts.get("held_out_accuracy"),
                **found.as_dict(),
                **beside,
            }
        with CountProgress("looking for copies", "pictures", self.quiet) as told:
            report = self._copies.compare(pictures, self.settings.closest, progress=told)
        sheet = pairs_picture(report, pictures, self.training, self.training.class_names, rows, self.training.labels)
        save_png(sheet, path.with_name(f"{path.name}-closest.png"))
        result.memorisation = report.as_dict()


def _matrix_file(found: ClassFidelity, path: Path) -> dict[str, Any]:
    """Write a matrix that is too large for a result; what the result says of it."""
    if not found.is_large:
        return {}
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        np.save(file, found.confusion)
    return {"confusion_file": path.name}


def _numbering(samples: list[str] | None, judge: list[str]) -> np.ndarray | None:
    """The judge's number of each class of the samples; None if both count alike.

    Raises:
        UserError: the judge does not know a class.
    """
    if samples is None or samples == judge:
        return None
    strangers = [name for name in samples if name not in judge]
    if strangers:
        raise UserError(
            f"the judge was trained on other classes: it does not know {strangers[0]!r}; give pictures of the model's "
            "classes by --training"
        )
    return np.array([judge.index(name) for name in samples], dtype=np.int64)
