"""Features of pictures in memory."""

import numpy as np
import pytest
import torch

from edt_diffusion.data import open_images
from edt_diffusion.evaluation.extract import extract
from edt_diffusion.evaluation.extractors.base import Extractor, Features
from edt_diffusion.evaluation.metrics import METRICS


class Channels(Extractor):
    name, sha256, preprocessing, dimensions = "channels", "0" * 64, "none", 3

    def __call__(self, images: torch.Tensor) -> Features:
        means = images.float().mean(dim=(2, 3))
        return Features(means, -means, torch.cat([means, 2 * means], dim=1))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_features_are_those_of_each_picture(batch):
    pictures = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), np.uint8)
    labels = np.arange(30) % 3
    found = extract(pictures, Channels(), labels, batch)
    means = pictures.astype(np.float64).mean(axis=(1, 2))
    assert np.allclose(found.pooled, means, rtol=1e-6)
    assert np.allclose(found.logits, -means, rtol=1e-6)
    assert np.allclose(found.statistics.covariance, np.cov(means.T), rtol=1e-6)
    assert np.allclose(found.spatial.mean[3:], 2 * means.mean(axis=0), rtol=1e-6)
    assert found.labels is labels


def test_gray_pictures_of_a_dataset_and_a_metric():
    digits = open_images("digits", size=8, channels=1)
    ours, theirs = (extract(digits.subset(range(start, 1700, 2)), Channels()) for start in (0, 1))
    assert np.ptp(ours.pooled, axis=1).max() == 0  # three equal channels
    # Of one number three times, the Fréchet distance is three times that of two normal distributions on a line.
    a, b = ours.pooled[:, 0].astype(np.float64), theirs.pooled[:, 0].astype(np.float64)
    expected = 3 * ((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2)
    assert METRICS["fid"](ours, theirs).value == pytest.approx(expected, rel=1e-6)
