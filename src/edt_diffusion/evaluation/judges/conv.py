"""A small residual network, trained on the real pictures themselves within minutes on a CPU."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import ImageDataset
from ...util import rng
from ..pixels import Progress, area_reduced, reduced_size
from .base import Classifier, with_gradients

SIDE = 64  # larger pictures are reduced to it
EPOCHS = 20
SAMPLES = 240_000  # at most, however many pictures there are
BATCH = 64
WIDTH = 48
PEAK_RATE = 0.05
WEIGHT_DECAY = 5e-4
_MEMORY_BYTES = 1 << 30


def settings(flip: bool) -> dict[str, Any]:
    """What decides, next to the pictures and the seed, what is learned."""
    names = ("SIDE", "EPOCHS", "SAMPLES", "BATCH", "WIDTH", "PEAK_RATE", "WEIGHT_DECAY")
    return {"flip": flip, **{name.lower(): globals()[name] for name in names}}


class ConvClassifier(Classifier):
    """Three stages of one residual block each (He et al., arXiv 1512.03385), averaged over positions.

    Works from 4x4 pixels on; pictures above 64 are reduced to it by averaging areas.

    Args:
        network: as `build` makes it, in evaluation mode.
    """

    kind = "conv"

    def __init__(
        self, network: nn.Module, class_names: list[str], shape: tuple[int, int, int], facts: dict[str, Any]
    ) -> None:
        super().__init__(class_names, shape, facts)
        self.network = network.eval()

    def _logits(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.network(_scaled(area_reduced(images, SIDE))).numpy()

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in self.network.state_dict().items()}

    @classmethod
    def from_files(cls, tree: dict[str, Any], tensors: dict[str, Tensor]) -> "ConvClassifier":
        """Put together what `base.read_files` read."""
        shape = tuple(tree["shape"])
        network = build(shape, len(tree["class_names"]), seed=0)
        network.load_state_dict(tensors)
        return cls(network, tree["class_names"], shape, tree["facts"])


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, each with batch normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def build(shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """Make the network for pictures of (height, width, channels), with weights drawn from `seed` alone.

    The first convolution brings the shorter side to about 16.
    """
    height, width = reduced_size(*shape[:2], SIDE)
    stride = max(1, min(height, width) // 16)
    with torch.device("meta"):  # nothing is drawn from torch's own generator
        network = nn.Sequential(
            nn.Conv2d(shape[2], WIDTH, stride + 2, stride, 1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            _Block(WIDTH, WIDTH, 1),
            _Block(WIDTH, 2 * WIDTH, 2),
            _Block(2 * WIDTH, 4 * WIDTH, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * WIDTH, classes),
        )
    network.to_empty(device="cpu")
    for number, module in enumerate(network.modules()):
        if isinstance(module, nn.Conv2d):
            draw = rng.stream(seed, rng.Purpose.JUDGE, position=number, pass_index=1)
            deviation = math.sqrt(2 / (module.weight[0].numel()))  # He et al., arXiv 1502.01852
            values = draw.standard_normal(tuple(module.weight.shape), dtype=np.float32) * np.float32(deviation)
            module.weight.data.copy_(torch.from_numpy(values))
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


@with_gradients()
def train_conv(dataset: ImageDataset, seed: int, flip: bool, progress: Progress | None = None) -> ConvClassifier:
    """Train on all pictures of a labelled dataset.

    Stochastic gradient descent with a rate that rises for a fifth of the time and falls to zero; each picture comes
    shifted by up to an eighth of its side. It ends after 20 epochs or 240,000 samples, whichever is less.
    What is drawn depends on the seed only, so at one thread the outcome does too.

    Args:
        dataset: with labels and at least two pictures.
        seed: any integer.
        flip: show pictures mirrored half of the time; not for digits, letters or anything else with a handedness.
        progress: told the samples seen.
    """
    assert dataset.labels is not None
    assert dataset.class_names is not None
    shape = (*dataset.size, dataset.channels)
    pictures, labels = _Reduced(dataset), torch.from_numpy(dataset.labels)
    batch = min(BATCH, len(dataset))
    steps = max(1, min(EPOCHS * len(dataset), SAMPLES) // batch)
    network = build(shape, len(dataset.class_names), seed).train()
    decayed = [value for value in network.parameters() if value.ndim > 1]
    plain = [value for value in network.parameters() if value.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=PEAK_RATE, momentum=0.9, nesterov=True)
    for step, rows in enumerate(_batches(len(dataset), batch, steps, seed)):
        done = (step + 0.5) / steps
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(done / 0.2, (1 - done) / 0.8)
        images = _augmented(pictures.images(rows), rng.stream(seed, rng.Purpose.JUDGE, step=step), flip)
        loss = F.cross_entropy(network(_scaled(images)), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress((step + 1) * batch, steps * batch)
    facts = {"training_pictures": len(dataset), "seed": seed, "samples_seen": steps * batch, **settings(flip)}
    return ConvClassifier(network, dataset.class_names, shape, facts)


def _batches(count: int, batch: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of each step: one shuffled order of all pictures after the other, cut into batches of one size."""
    waiting, epoch = np.empty(0, dtype=np.int64), 0
    for _ in range(steps):
        while len(waiting) < batch:
            order = rng.stream(seed, rng.Purpose.JUDGE, step=epoch, pass_index=2).permutation(count)
            waiting, epoch = np.concatenate([waiting, order]), epoch + 1
        yield waiting[:batch]
        waiting = waiting[batch:]


def _augmented(images: np.ndarray, draw: np.random.Generator, flip: bool) -> np.ndarray:
    """Pictures shifted by up to an eighth of their sides, their edges continued; some mirrored if asked."""
    count, height, width, _ = images.shape
    down, across = height // 8, width // 8
    tops, lefts = draw.integers(0, 2 * down + 1, count), draw.integers(0, 2 * across + 1, count)
    mirrored = draw.random(count) < 0.5
    padded = np.pad(images, ((0, 0), (down, down), (across, across), (0, 0)), mode="edge")
    out = np.empty_like(images)
    for row in range(count):
        top, left = tops[row], lefts[row]
        cut = padded[row, top : top + height, left : left + width]
        out[row] = cut[:, ::-1] if flip and mirrored[row] else cut
    return out


def _scaled(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, C) to float32 (N, C, H, W) in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return tensor.float() / 127.5 - 1


class _Reduced:
    """A dataset's pictures at the network's size, kept in memory if they fit, else made again each time."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset
        self._kept: np.ndarray | None = None
        height, width = reduced_size(*dataset.size, SIDE)
        if len(dataset) * height * width * dataset.channels <= _MEMORY_BYTES:
            kept = np.empty((len(dataset), height, width, dataset.channels), dtype=np.uint8)
            for start in range(0, len(dataset), 256):
                rows = np.arange(start, min(start + 256, len(dataset)))
                kept[rows] = area_reduced(dataset.images(rows), SIDE)
            self._kept = kept

    def images(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C)."""
        return area_reduced(self._dataset.images(rows), SIDE) if self._kept is None else self._kept[rows]
