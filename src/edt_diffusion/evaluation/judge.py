"""A judge trained on real pictures only: are generated ones recognised, are they copies, are they all the same?"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .neighbours import nearest_neighbours

Pictures = NDArray[np.uint8]
Labels = NDArray[np.int64]


def _vectors(images: Pictures) -> NDArray[np.float64]:
    """uint8 (N, H, W, C) to float64 (N, H * W * C) in [0, 1]."""
    return images.reshape(len(images), -1) / 255.0


class PixelJudge:
    """Support-vector classifier on raw pixels, for small pictures such as digits.

    Args:
        images: real pictures, uint8 (N, H, W, C).
        labels: their classes, int64 (N,).
    """

    def __init__(self, images: Pictures, labels: Labels) -> None:
        from sklearn.svm import SVC

        self._classifier: Any = SVC(C=10.0, gamma="scale").fit(_vectors(images), labels)

    def accuracy(self, images: Pictures, labels: Labels) -> float:
        """Share of pictures recognised as the class given, in [0, 1]."""
        return float((self._classifier.predict(_vectors(images)) == labels).mean())


def nearest_distances(images: Pictures, others: Pictures) -> NDArray[np.float64]:
    """Euclidean distance, in pixel values of [0, 1], from each picture to the nearest of `others`: (N,)."""
    return nearest_neighbours(_vectors(images), _vectors(others))[0][:, 0]


def memorisation_ratio(generated: Pictures, training: Pictures, held_out: Pictures) -> float:
    """Median distance of generated pictures to the nearest training picture, over that of held-out real ones.

    Near 1: as new as unseen real pictures. Near 0: copies of the training set.
    """
    return float(np.median(nearest_distances(generated, training)) / np.median(nearest_distances(held_out, training)))


def mean_pairwise_distance(images: Pictures, labels: Labels) -> float:
    """Mean distance of two different pictures of one class, averaged over classes."""
    means = []
    for label in np.unique(labels):
        a = _vectors(images[labels == label])
        if len(a) > 1:
            squared = (a * a).sum(1)[:, None] + (a * a).sum(1)[None, :] - 2 * a @ a.T
            means.append(np.sqrt(np.maximum(squared, 0.0))[np.triu_indices(len(a), 1)].mean())
    return float(np.mean(means))


def diversity_ratio(generated: Pictures, labels: Labels, real: Pictures, real_labels: Labels) -> float:
    """Mean distance within a class of generated pictures, over that of real ones; near 0 means collapsed."""
    return mean_pairwise_distance(generated, labels) / mean_pairwise_distance(real, real_labels)
