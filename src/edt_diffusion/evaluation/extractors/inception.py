"""The Inception-v3 that published FIDs are measured with.

It is the classifier of TensorFlow's `inception-2015-12-05` graph (Szegedy et al., arXiv 1512.00567), which differs from
the Inception-v3 of torchvision and of the paper: average pools inside the blocks leave padding out of the mean, the
last block has a max pool in the place of the average pool, there are 1008 classes, and no auxiliary head. Names of
modules are those of pytorch-fid's state dict, so that its file loads as it is.

- `FidInception`        the network: pictures of 299x299 in [-1, 1) -> pooled and spatial features
- `resize_as_tf1`       TensorFlow 1's bilinear resize
- `InceptionExtractor`  both, with the public weights
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Features
from .inception_weights import load_inception
from .network import NetworkExtractor

SIZE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class _Conv:
    """A convolution of a block; `padding` None keeps the size."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: int | None = None


# A branch is what its input goes through in turn: convolutions, pools by name, and forks, tuples of convolutions that
# all see the same and are concatenated.
_Step = _Conv | str | tuple[_Conv, ...]
_Branch = list[_Step]

_POOLS = {
    "average": lambda x: functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: functional.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: functional.max_pool2d(x, 3, stride=2),
}


class _BasicConv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, spec: _Conv) -> None:
        super().__init__()
        rows, columns = spec.kernel
        padding = (rows // 2, columns // 2) if spec.padding is None else spec.padding
        self.conv = nn.Conv2d(channels, spec.channels, spec.kernel, spec.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches side by side, concatenated along the channels; their convolutions are submodules by their names."""

    def __init__(self, channels: int, *branches: _Branch) -> None:
        super().__init__()
        self._branches = branches
        self.channels = sum(self._add(channels, branch) for branch in branches)

    def _add(self, channels: int, branch: _Branch) -> int:
        for step in branch:
            if isinstance(step, str):
                continue
            convs = (step,) if isinstance(step, _Conv) else step
            for conv in convs:
                self.add_module(conv.name, _BasicConv(channels, conv))
            channels = sum(conv.channels for conv in convs)
        return channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch(branch, x) for branch in self._branches], dim=1)

    def branch(self, steps: _Branch, x: Tensor) -> Tensor:
        for step in steps:
            if isinstance(step, str):
                x = _POOLS[step](x)
            elif isinstance(step, _Conv):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in step], dim=1)
        return x


def _block_35(channels: int, pooled: int) -> _Block:
    """One of the three blocks at 35x35 pixels: 64 + 64 + 96 + `pooled` channels."""
    return _Block(
        channels,
        [_Conv("branch1x1", 64)],
        [_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5))],
        [_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3))],
        ["average", _Conv("branch_pool", pooled)],
    )


def _block_35_to_17(channels: int) -> _Block:
    return _Block(
        channels,
        [_Conv("branch3x3", 384, (3, 3), stride=2, padding=0)],
        [
            _Conv("branch3x3dbl_1", 64),
            _Conv("branch3x3dbl_2", 96, (3, 3)),
            _Conv("branch3x3dbl_3", 96, (3, 3), stride=2, padding=0),
        ],
        ["halve"],
    )


def _block_17(channels: int, inner: int) -> _Block:
    """One of the four blocks at 17x17 pixels: 4 * 192 channels, `inner` ones between the 7x7 factors."""
    return _Block(
        channels,
        [_Conv("branch1x1", 192)],
        [_Conv("branch7x7_1", inner), _Conv("branch7x7_2", inner, (1, 7)), _Conv("branch7x7_3", 192, (7, 1))],
        [
            _Conv("branch7x7dbl_1", inner),
            _Conv("branch7x7dbl_2", inner, (7, 1)),
            _Conv("branch7x7dbl_3", inner, (1, 7)),
            _Conv("branch7x7dbl_4", inner, (7, 1)),
            _Conv("branch7x7dbl_5", 192, (1, 7)),
        ],
        ["average", _Conv("branch_pool", 192)],
    )


def _block_17_to_8(channels: int) -> _Block:
    return _Block(
        channels,
        [_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), stride=2, padding=0)],
        [
            _Conv("branch7x7x3_1", 192),
            _Conv("branch7x7x3_2", 192, (1, 7)),
            _Conv("branch7x7x3_3", 192, (7, 1)),
            _Conv("branch7x7x3_4", 192, (3, 3), stride=2, padding=0),
        ],
        ["halve"],
    )


def _block_8(channels: int, pool: str) -> _Block:
    """One of the two blocks at 8x8 pixels: 320 + 768 + 768 + 192 channels."""
    return _Block(
        channels,
        [_Conv("branch1x1", 320)],
        [
            _Conv("branch3x3_1", 384),
            (_Conv("branch3x3_2a", 384, (1, 3)), _Conv("branch3x3_2b", 384, (3, 1))),
        ],
        [
            _Conv("branch3x3dbl_1", 448),
            _Conv("branch3x3dbl_2", 384, (3, 3)),
            (_Conv("branch3x3dbl_3a", 384, (1, 3)), _Conv("branch3x3dbl_3b", 384, (3, 1))),
        ],
        [pool, _Conv("branch_pool", 192)],
    )


class FidInception(nn.Module):
    """The network of the `inception-2015-12-05` graph, without weights of its own; use it in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _BasicConv(3, _Conv("", 32, (3, 3), stride=2, padding=0))
        self.Conv2d_2a_3x3 = _BasicConv(32, _Conv("", 32, (3, 3), padding=0))
        self.Conv2d_2b_3x3 = _BasicConv(32, _Conv("", 64, (3, 3)))
        self.Conv2d_3b_1x1 = _BasicConv(64, _Conv("", 80))
        self.Conv2d_4a_3x3 = _BasicConv(80, _Conv("", 192, (3, 3), padding=0))
        self.Mixed_5b = _block_35(192, pooled=32)
        self.Mixed_5c = _block_35(256, pooled=64)
        self.Mixed_5d = _block_35(288, pooled=64)
        self.Mixed_6a = _block_35_to_17(288)
        self.Mixed_6b = _block_17(768, inner=128)
        self.Mixed_6c = _block_17(768, inner=160)
        self.Mixed_6d = _block_17(768, inner=160)
        self.Mixed_6e = _block_17(768, inner=192)
        self.Mixed_7a = _block_17_to_8(768)
        self.Mixed_7b = _block_8(1280, "average")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: float (N, 3, 299, 299), pixels in [-1, 1).

        Returns:
            The mean of the last block's 8x8 outputs (N, 2048), and the first 7 channels of what the graph calls
            `mixed_6/conv`, the ReLU outputs of the 1x1 branch of its seventh block, as (row, column, channel)
            flattened: (N, 2023).
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_POOLS["halve"](x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_POOLS["halve"](x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        # The graph calls its blocks mixed (5b), mixed_1 (5c), mixed_2 (5d), mixed_3 (6a) and so on: 6d is mixed_6.
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3)), spatial

    def logits(self, pooled: Tensor, *, bias: bool) -> Tensor:
        """Scores of the 1008 classes (N, 1008) of pooled features, with or without the bias of the last layer."""
        return functional.linear(pooled, self.fc.weight, self.fc.bias if bias else None)


def resize_as_tf1(images: Tensor, height: int, width: int) -> Tensor:
    """Resize as TensorFlow 1's `resize_bilinear` does by default, corners not aligned and pixel centres not halved.

    Output pixel i takes the source coordinate i * (source size / output size), between its two neighbours, of which
    the last repeats at the border. There is no antialiasing, and the picture moves by up to half a pixel; published
    FIDs are measured through this.

    Args:
        images: float (N, C, H, W).
        height: of the output, in pixels.
        width: of the output, in pixels.

    Returns:
        float (N, C, height, width).
    """
    left, right, across = _neighbours(images.shape[3], width, images)
    images = torch.lerp(images[..., left], images[..., right], across)
    top, bottom, down = _neighbours(images.shape[2], height, images)
    return torch.lerp(images[..., top, :], images[..., bottom, :], down[:, None])


def _neighbours(source: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the two source pixels of each output pixel along an axis, and the weight of the second in [0, 1)."""
    places = torch.arange(size, dtype=torch.float32, device=like.device) * (source / size)
    first = places.floor().clamp(max=source - 1)
    second = (first + 1).clamp(max=source - 1)
    return first.long(), second.long(), (places - first).to(like.dtype)


class InceptionExtractor(NetworkExtractor):
    """Features of published FID, sFID and Inception Scores, as ADM's evaluator takes them (arXiv 2105.05233).

    `Features.pooled` are the 2048 of FID; `spatial` the 2023 of sFID (arXiv 2103.03841); `logits` those of the 1008
    classes without the bias of the last layer, because the original Inception Score leaves it out.

    Checked without the weights, which are not part of this package: the number of parameters, their names and shapes,
    the shapes of all layers, the resize, and the network with random weights against a second implementation. Not
    checked: a published FID, from pictures to figure.

    Args:
        source: the file of the weights; without one, see `inception_weights.load_inception`.

    Raises:
        UserError: the weights cannot be had, or are another network's.
    """

    def __init__(self, source: str | os.PathLike[str] | None = None) -> None:
        with torch.device("meta"):
            network = FidInception()
        weights, self.sha256 = load_inception(network.state_dict(), source)
        network.load_state_dict(weights, assign=True)
        self._inception = network.eval().requires_grad_(False)
        # Convolutions run faster so, on CPUs too.
        self.network = self._inception.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.name = "inception"
        self.preprocessing = f"TensorFlow 1 bilinear to {SIZE}x{SIZE} without antialiasing, (x - 128) / 128"
        self.dimensions = 2048

    def _extract(self, images: Tensor) -> Features:
        pixels = resize_as_tf1(images.to(self._device, torch.float32), SIZE, SIZE)
        pooled, spatial = self._inception((pixels - 128) / 128)
        return Features(pooled, self._inception.logits(pooled, bias=False), spatial)
