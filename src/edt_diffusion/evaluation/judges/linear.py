"""Multinomial logistic regression on the features of a fixed network."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import ImageDataset, stratified_split
from ...util import rng
from ...util.errors import UserError
from ..extractors.base import Extractor
from ..pixels import PictureSource, Progress, colour_tensor
from .base import Classifier, with_gradients

STRENGTHS = (1.0, 0.1, 0.01, 0.001, 0.0001)  # of the penalty, from strong to weak
CHOOSING = 0.2  # share of the training pictures that the strength is chosen on
LIMIT = 50_000  # training pictures
_BLOCK = 128


def settings() -> dict[str, Any]:
    """What decides, next to the pictures, the extractor and the seed, what is learned."""
    return {"strengths": list(STRENGTHS), "choosing": CHOOSING, "limit": LIMIT}


class LinearProbe(Classifier):
    """Logistic regression on standardised features.

    Args:
        extractor: the network that the features come from.
        tensors: float64 `mean` and `scale` of shape (D,), by which features are standardised as (x - mean) * scale,
            `weight` (D, K) and `bias` (K,).
    """

    kind = "linear"

    def __init__(
        self,
        extractor: Extractor,
        tensors: dict[str, Tensor],
        class_names: list[str],
        shape: tuple[int, int, int],
        facts: dict[str, Any],
    ) -> None:
        super().__init__(class_names, shape, {"extractor": extractor.identity(), **facts})
        self.extractor = extractor
        self.tensors = tensors

    def _logits(self, images: np.ndarray) -> np.ndarray:
        features = self.extractor(colour_tensor(images)).pooled.double()
        standardised = (features - self.tensors["mean"]) * self.tensors["scale"]
        return (standardised @ self.tensors["weight"] + self.tensors["bias"]).numpy()

    def _tensors(self) -> dict[str, Tensor]:
        return self.tensors

    @classmethod
    def from_files(cls, tree: dict[str, Any], tensors: dict[str, Tensor], extractor: Extractor | None) -> "LinearProbe":
        """Put together what `base.read_files` read.

        Raises:
            UserError: another extractor than the one it was trained on.
        """
        extractor = same_extractor(tree, extractor)
        return cls(extractor, tensors, tree["class_names"], tuple(tree["shape"]), tree["facts"])


def same_extractor(tree: dict[str, Any], extractor: Extractor | None) -> Extractor:
    """Make sure that an extractor is the one that a saved judge was made with.

    Raises:
        UserError: it is another, or there is none.
    """
    needed = tree["facts"]["extractor"]
    if extractor is None or extractor.identity() != needed:
        given = "none" if extractor is None else _told(extractor.identity())
        raise UserError(
            f"the judge was made with the extractor {_told(needed)}, given was {given}: name that one, or train anew"
        )
    return extractor


def _told(identity: dict[str, Any]) -> str:
    return f"{identity['name']} (sha256 {identity['sha256'][:12]}, {identity['preprocessing']})"


@with_gradients()
def train_linear(
    dataset: ImageDataset, extractor: Extractor, seed: int, progress: Progress | None = None
) -> LinearProbe:
    """Fit on the features of a labelled dataset.

    The strength of the penalty is the one of five that recognises most of a fifth of the training pictures, fitted on
    the others; then all are fitted with it. Of more than 50,000 pictures as many are drawn.

    Args:
        dataset: with labels and at least two pictures of some class.
        extractor: gives the features.
        seed: of the draws.
        progress: told the pictures whose features are known.
    """
    if len(dataset) > LIMIT:
        drawn = rng.stream(seed, rng.Purpose.JUDGE).permutation(len(dataset))[:LIMIT]
        dataset = dataset.subset(np.sort(drawn))
    assert dataset.labels is not None
    assert dataset.class_names is not None
    features = torch.from_numpy(pooled_features(dataset, extractor, progress)).double()
    labels, classes = torch.from_numpy(dataset.labels), len(dataset.class_names)
    positions = _Positions(dataset.source, dataset.labels)
    fitting, choosing = (part.rows for part in stratified_split(positions, CHOOSING, seed))
    strength, best, start = STRENGTHS[0], -1.0, None
    for candidate in STRENGTHS:
        start = _fit(features[fitting], labels[fitting], classes, candidate, start)
        scores = _scores(features[choosing], start)
        accuracy = float((scores.argmax(1) == labels[choosing]).double().mean())
        if accuracy > best:
            strength, best = candidate, accuracy
    facts = {
        "training_pictures": len(dataset),
        "seed": seed,
        "strength": strength,
        "accuracy_it_was_chosen_by": best,
        **settings(),
    }
    tensors = _fit(features, labels, classes, strength)
    return LinearProbe(extractor, tensors, dataset.class_names, (*dataset.size, dataset.channels), facts)


def pooled_features(pictures: PictureSource, extractor: Extractor, progress: Progress | None = None) -> np.ndarray:
    """float32 (N, D): the pooled features of all pictures."""
    features = np.empty((len(pictures), extractor.dimensions), dtype=np.float32)
    for start in range(0, len(pictures), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(pictures)))
        features[rows] = extractor(colour_tensor(pictures.images(rows))).pooled.numpy()
        if progress is not None:
            progress(int(rows[-1]) + 1, len(pictures))
    return features


@with_gradients()
def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, strength: float, start: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy plus `strength` / 2 times the sum of the squared weights, the bias left free.

    L-BFGS with a line search in float64, until no element of the gradient is above 1e-8.

    Args:
        features: float64 (N, D).
        labels: int64 (N,), values in 0 .. classes - 1.
        classes: K.
        strength: above 0.
        start: `weight` and `bias` to begin with; None begins with zeros. The minimum is the same.

    Returns:
        Weight (D, K) and bias (K,), float64.
    """
    given = start or {}
    weight = given.get("weight", torch.zeros(features.shape[1], classes, dtype=torch.float64)).clone()
    bias = given.get("bias", torch.zeros(classes, dtype=torch.float64)).clone()
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return weight.detach(), bias.detach()


def _fit(
    features: Tensor, labels: Tensor, classes: int, strength: float, start: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    mean, deviation = features.mean(0), features.std(0, correction=0)
    # A constant feature says nothing; what its mean is rounded by must not be blown up.
    scale = torch.where(deviation > 1e-6 * features.abs().amax(0), 1 / deviation, 0.0)
    weight, bias = logistic_regression((features - mean) * scale, labels, classes, strength, start)
    return {"mean": mean, "scale": scale, "weight": weight, "bias": bias}


def _scores(features: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return (features - tensors["mean"]) * tensors["scale"] @ tensors["weight"] + tensors["bias"]


class _Positions:
    """Row numbers with labels, for `stratified_split`."""

    labels: np.ndarray | None

    def __init__(self, source: str, labels: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.source, self.labels, self._known = source, labels, labels
        self.rows = np.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def class_counts(self) -> dict[str, int]:
        return {}

    def subset(self, indices: Sequence[int] | np.ndarray) -> "_Positions":
        return _Positions(self.source, self._known[indices], self.rows[indices])
