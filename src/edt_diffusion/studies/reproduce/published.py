"""Published values that this project knows, each with where it stands. What is not here is not known to it.

EDT is arXiv 2410.23788. Nothing is added from memory: a value needs a place where it can be read.
"""

from dataclasses import dataclass

README = "README of the authors' repository"
ABSTRACT = "abstract of the paper (arXiv 2410.23788)"
ANNOTATION = "annotation in the authors' repository"
AUTHORS = "given by the authors with the paper"


@dataclass(frozen=True)
class Published:
    """A value and its place."""

    value: float
    source: str


# GFLOPs (multiply-adds of one picture, 256 px) and parameters in millions, by size of EDT.
GFLOPS = {size: Published(value, AUTHORS) for size, value in {"S": 2.66, "B": 10.20, "XL": 51.83}.items()}
PARAMETERS = {"XL": Published(708.44, ANNOTATION)}

# FID and Inception Score of 50,000 samples, ImageNet at 256 px, by size and thousands of iterations, without guidance.
FID = {
    ("S", 400): Published(34.27, README),
    ("B", 400): Published(19.18, README),
    ("B", 1000): Published(13.58, README),
    ("XL", 400): Published(7.52, README),
}
INCEPTION_SCORE = {
    ("S", 400): Published(42.6, README),
    ("B", 400): Published(74.4, README),
    ("B", 1000): Published(94.1, README),
    ("XL", 400): Published(142.4, README),
}
# The same with guidance.
GUIDED_FID = {("XL", 2000): Published(3.54, README)}
GUIDED_INCEPTION_SCORE = {("XL", 2000): Published(355.8, README)}

# How many times as fast as MDTv2 of the same size.
TRAINING_SPEED = {size: Published(value, ABSTRACT) for size, value in {"S": 3.93, "B": 2.84, "XL": 1.92}.items()}
SAMPLING_SPEED = {size: Published(value, ABSTRACT) for size, value in {"S": 2.29, "B": 2.29, "XL": 2.22}.items()}

# The paper's trainings: ImageNet's training set in batches of 256.
BATCH = 256
IMAGENET_PICTURES = 1_281_167


def sentence(what: str, *values: Published) -> str:
    """Where values come from, in words."""
    places = dict.fromkeys(value.source for value in values)
    return f"{what}: {', '.join(places)}."
