"""Writing the files of statistics that `adm_npz` reads."""

import os
import zipfile
from dataclasses import asdict, dataclass

import numpy as np

from ..sampling.sample_npz import write_array
from ..util.files import atomic_path
from .statistics import GaussianStatistics


@dataclass(frozen=True)
class StatisticsOrigin:
    """What statistics were taken with, and of what.

    In a file each stands under its name here after `edt_`. ADM's evaluator reads by name and passes them over.

    Attributes:
        extractor: its name.
        extractor_sha256: digest of its weights.
        preprocessing: what it does to pixels first, in one line.
        count: number of pictures, at least 2.
        pictures_sha256: digest of their pixels and labels.
    """

    extractor: str
    extractor_sha256: str
    preprocessing: str
    count: int
    pictures_sha256: str


def write_statistics_npz(
    path: str | os.PathLike[str],
    statistics: GaussianStatistics,
    spatial: GaussianStatistics | None = None,
    origin: StatisticsOrigin | None = None,
) -> None:
    """Write `mu` and `sigma` (and `mu_s`, `sigma_s`), float64, in one step, with what is known of their origin."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "x") as archive:
        for suffix, gaussian in (("", statistics), ("_s", spatial)):
            if gaussian is not None:
                write_array(archive, f"mu{suffix}", gaussian.mean)
                write_array(archive, f"sigma{suffix}", gaussian.covariance)
        for name, value in ({} if origin is None else asdict(origin)).items():
            write_array(archive, f"edt_{name}", np.array(value))
