"""The FID Inception: its structure against documented figures, its arithmetic against a second implementation."""

import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from edt_diffusion.evaluation.extractors import inception_weights, open_extractor
from edt_diffusion.evaluation.extractors.inception import FidInception, resize_as_tf1
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.files import sha256_file


def random_weights() -> dict[str, Tensor]:
    """Weights under which values keep their size from layer to layer."""
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in FidInception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            weights[name] = tensor
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = 0.5 + torch.rand(tensor.shape, generator=draw)
        elif tensor.ndim == 1:
            weights[name] = 0.2 * torch.randn(tensor.shape, generator=draw)
        else:
            weights[name] = torch.randn(tensor.shape, generator=draw) * math.sqrt(2 / math.prod(tensor.shape[1:]))
    return weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


@pytest.fixture(scope="module")
def weights_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / inception_weights.FILE
    torch.save(weights, path)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the weights of the machine, or the network."""
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("EDT_INCEPTION", raising=False)
    monkeypatch.setattr(inception_weights, "URL", (tmp_path / "nowhere" / "weights.pth").as_uri())


@pytest.fixture
def accepted(weights_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of random weights, taken for the public one."""
    monkeypatch.setattr(inception_weights, "SHA256", sha256_file(weights_file))
    return weights_file


# ------------------------------------------------------------------------------- a second implementation


class Functional:
    """The network as its paper's tables and pytorch-fid's names give it, in plain operations."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.used: list[str] = []

    def conv(self, name: str, x: Tensor, stride: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
        self.used.append(name)
        x = functional.conv2d(x, self.weights[f"{name}.conv.weight"], stride=stride, padding=pad)
        mean, variance, gain, shift = (
            self.weights[f"{name}.bn.{part}"].reshape(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (variance + 0.001).sqrt() * gain + shift).clamp(min=0)

    @staticmethod
    def around(x: Tensor, fill: float) -> Tensor:
        """The nine neighbours of each pixel, (9, ...), `fill` where there is none."""
        height, width = x.shape[2:]
        padded = functional.pad(x, (1, 1, 1, 1), value=fill)
        return torch.stack([padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)])

    def average(self, x: Tensor) -> Tensor:
        return self.around(x, 0).sum(0) / self.around(torch.ones_like(x), 0).sum(0)

    def maximum(self, x: Tensor) -> Tensor:
        return self.around(x, -math.inf).amax(0)

    def halve(self, x: Tensor) -> Tensor:
        return self.maximum(x)[:, :, 1:-1:2, 1:-1:2]

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.conv
        x = c("Conv2d_1a_3x3", x, 2)
        x = c("Conv2d_2a_3x3", x)
        x = self.halve(c("Conv2d_2b_3x3", x, 1, (1, 1)))
        x = c("Conv2d_3b_1x1", x)
        x = self.halve(c("Conv2d_4a_3x3", x))
        for block in ("5b", "5c", "5d"):
            n = f"Mixed_{block}.branch"
            a = c(n + "1x1", x)
            b = c(n + "5x5_2", c(n + "5x5_1", x), 1, (2, 2))
            d = c(n + "3x3dbl_3", c(n + "3x3dbl_2", c(n + "3x3dbl_1", x), 1, (1, 1)), 1, (1, 1))
            x = torch.cat([a, b, d, c(n + "_pool", self.average(x))], 1)
        n = "Mixed_6a.branch"
        d = c(n + "3x3dbl_3", c(n + "3x3dbl_2", c(n + "3x3dbl_1", x), 1, (1, 1)), 2)
        x = torch.cat([c(n + "3x3", x, 2), d, self.halve(x)], 1)
        for block in ("6b", "6c", "6d", "6e"):
            n = f"Mixed_{block}.branch"
            a = c(n + "1x1", x)
            if block == "6d":
                spatial = a
            b = c(n + "7x7_3", c(n + "7x7_2", c(n + "7x7_1", x), 1, (0, 3)), 1, (3, 0))
            d = c(n + "7x7dbl_1", x)
            for i, pad in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
                d = c(f"{n}7x7dbl_{i}", d, 1, pad)
            x = torch.cat([a, b, d, c(n + "_pool", self.average(x))], 1)
        n = "Mixed_7a.branch"
        a = c(n + "3x3_2", c(n + "3x3_1", x), 2)
        b = c(n + "7x7x3_3", c(n + "7x7x3_2", c(n + "7x7x3_1", x), 1, (0, 3)), 1, (3, 0))
        x = torch.cat([a, c(n + "7x7x3_4", b, 2), self.halve(x)], 1)
        for block, pool in (("7b", self.average), ("7c", self.maximum)):
            n = f"Mixed_{block}.branch"
            b = c(n + "3x3_1", x)
            d = c(n + "3x3dbl_2", c(n + "3x3dbl_1", x), 1, (1, 1))
            wide = [c(n + "3x3_2a", b, 1, (0, 1)), c(n + "3x3_2b", b, 1, (1, 0))]
            deep = [c(n + "3x3dbl_3a", d, 1, (0, 1)), c(n + "3x3dbl_3b", d, 1, (1, 0))]
            x = torch.cat([c(n + "1x1", x), *wide, *deep, c(n + "_pool", pool(x))], 1)
        layout = np.moveaxis(spatial.numpy(), 1, 3)[..., :7]  # TensorFlow's (picture, row, column, channel)
        return x.flatten(2).mean(2), torch.from_numpy(layout.reshape(len(layout), -1).copy())


def tf1_resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Documented formula, pixel by pixel: (H, W, C) to (height, width, C)."""
    rows, columns = picture.shape[:2]
    out = np.zeros((height, width, picture.shape[2]))
    for i in range(height):
        y = i * rows / height
        top, bottom = int(y), min(int(y) + 1, rows - 1)
        for j in range(width):
            x = j * columns / width
            left, right = int(x), min(int(x) + 1, columns - 1)
            up = picture[top, left] * (1 - (x - left)) + picture[top, right] * (x - left)
            down = picture[bottom, left] * (1 - (x - left)) + picture[bottom, right] * (x - left)
            out[i, j] = up * (1 - (y - top)) + down * (y - top)
    return out


# --------------------------------------------------------------------------------------------- structure


def test_parameters_and_names_are_those_of_the_public_file(weights: dict[str, Tensor]) -> None:
    # torchvision documents 27,161,264 parameters; its auxiliary head has 3,326,696, and 8 classes are 8 * 2049 more.
    # pytorch-fid's network is documented with 23,850,960, and its file with 566 tensors.
    assert 27_161_264 - 3_326_696 + 8 * 2049 == 23_850_960
    network = FidInception()
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960
    assert len(network.state_dict()) == 566
    second = Functional(weights)
    second.run(torch.zeros(1, 3, 299, 299, dtype=torch.float64))
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{conv}.conv.weight" for conv in second.used} | {f"{c}.bn.{part}" for c in second.used for part in parts}
    assert set(network.state_dict()) == names | {"fc.weight", "fc.bias"}
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes["fc.weight"] == (1008, 2048)
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert shapes["Mixed_6b.branch7x7dbl_2.conv.weight"] == (128, 128, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3a.conv.weight"] == (384, 384, 1, 3)


def test_every_layer_has_the_documented_shape() -> None:
    network = FidInception().eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        pooled, spatial = network(torch.zeros(1, 3, 299, 299))
    assert shapes == {
        "Conv2d_1a_3x3": (32, 149, 149),
        "Conv2d_2a_3x3": (32, 147, 147),
        "Conv2d_2b_3x3": (64, 147, 147),
        "Conv2d_3b_1x1": (80, 73, 73),
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5b": (256, 35, 35),
        "Mixed_5c": (288, 35, 35),
        "Mixed_5d": (288, 35, 35),
        "Mixed_6a": (768, 17, 17),
        "Mixed_6b": (768, 17, 17),
        "Mixed_6c": (768, 17, 17),
        "Mixed_6d": (768, 17, 17),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7a": (1280, 8, 8),
        "Mixed_7b": (2048, 8, 8),
        "Mixed_7c": (2048, 8, 8),
    }
    assert pooled.shape == (1, 2048)
    assert spatial.shape == (1, 2023)


def test_second_implementation_agrees(weights: dict[str, Tensor]) -> None:
    network = FidInception()
    network.load_state_dict(weights)
    network.eval().double()
    images = torch.rand(1, 3, 299, 299, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        pooled, spatial = network(images)
    expected, expected_spatial = Functional(weights).run(images)
    assert expected.std() > 0.01  # values keep their size, so that a relative bound says something
    assert torch.allclose(pooled, expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(spatial, expected_spatial, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("block", "size", "pooled"), [("5b", 35, 32), ("5d", 35, 64), ("6e", 17, 192), ("7b", 8, 192)])
def test_average_pools_leave_padding_out(weights: dict[str, Tensor], block: str, size: int, pooled: int) -> None:
    network = FidInception()
    network.load_state_dict(weights)
    layer = network.get_submodule(f"Mixed_{block}").eval()
    channels = layer.get_submodule("branch1x1").conv.in_channels
    with torch.no_grad():
        out = layer(torch.full((1, channels, size, size), 3.0))[0, -pooled:]
    assert out.max() > 0
    assert torch.allclose(out, out[:, 3:4, 3:4].expand_as(out), rtol=1e-4, atol=1e-5)


def test_the_last_block_has_a_max_pool(weights: dict[str, Tensor]) -> None:
    network = FidInception()
    network.load_state_dict(weights)
    spike = torch.zeros(1, 2048, 8, 8)
    spike[:, :, 4, 4] = 9.0
    for block, like in (("7b", 1.0), ("7c", 9.0)):  # a mean over nine pixels, their maximum
        layer = network.get_submodule(f"Mixed_{block}").eval()
        x = spike[:, : layer.get_submodule("branch1x1").conv.in_channels]
        with torch.no_grad():
            at_spike = layer(x)[0, -192:, 3, 5]
            constant = layer(torch.full_like(x, like))[0, -192:, 3, 5]
        assert constant.max() > 0
        assert torch.allclose(at_spike, constant, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ resize


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        ([0.0, 10.0], 4, [0.0, 5.0, 10.0, 10.0]),  # coordinates 0, 0.5, 1, 1.5: the last pixel repeats
        ([1.0, 2.0, 3.0, 4.0], 2, [1.0, 3.0]),  # every other pixel, no mean
        ([1.0, 2.0, 6.0], 2, [1.0, 4.0]),  # coordinates 0 and 1.5
        ([5.0, 7.0, 1.0], 3, [5.0, 7.0, 1.0]),
        ([8.0], 3, [8.0, 8.0, 8.0]),
    ],
)
def test_resize_by_hand(source: list[float], size: int, expected: list[float]) -> None:
    row = torch.tensor(source).reshape(1, 1, 1, -1)
    assert resize_as_tf1(row, 1, size)[0, 0, 0].tolist() == expected
    assert resize_as_tf1(row.transpose(2, 3), size, 1)[0, 0, :, 0].tolist() == expected


@pytest.mark.parametrize(("rows", "columns", "height", "width"), [(7, 5, 11, 13), (20, 31, 9, 8), (6, 30, 17, 10)])
def test_resize_follows_the_formula(rows: int, columns: int, height: int, width: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, rows, columns, 3)).astype(np.float64)
    expected = np.stack([tf1_resize(image, height, width) for image in images])
    found = resize_as_tf1(torch.from_numpy(images).float().permute(0, 3, 1, 2), height, width)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=2e-3)


# --------------------------------------------------------------------------------------------- extractor


@pytest.mark.parametrize(("rows", "columns"), [(32, 20), (340, 310)])
def test_features_of_pictures(accepted: Path, weights: dict[str, Tensor], rows: int, columns: int) -> None:
    extractor = open_extractor(f"inception={accepted}")
    images = np.random.default_rng(1).integers(0, 256, (1, rows, columns, 3), dtype=np.uint8)
    found = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
    pixels = (tf1_resize(images[0].astype(np.float64), 299, 299) - 128) / 128
    pooled, spatial = Functional(weights).run(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert found.pooled.dtype == torch.float32
    assert found.spatial is not None
    assert found.logits is not None
    assert torch.allclose(found.pooled.double(), pooled, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.spatial.double(), spatial, rtol=1e-4, atol=1e-4)
    logits = pooled @ weights["fc.weight"].double().T  # the random bias would show
    assert torch.allclose(found.logits.double(), logits, rtol=1e-4, atol=1e-3)
    assert not found.pooled.requires_grad


def test_logits_with_and_without_bias(weights: dict[str, Tensor]) -> None:
    network = FidInception()
    network.load_state_dict(weights)
    pooled = torch.rand(3, 2048)
    difference = network.logits(pooled, bias=True) - network.logits(pooled, bias=False)
    assert torch.allclose(difference, weights["fc.bias"].expand(3, -1), atol=1e-5)


def test_identity_and_row_independence(accepted: Path) -> None:
    extractor = open_extractor(f"inception={accepted}")
    assert extractor.identity() == {
        "name": "inception",
        "sha256": sha256_file(accepted),
        "preprocessing": "TensorFlow 1 bilinear to 299x299 without antialiasing, (x - 128) / 128",
        "dimensions": 2048,
    }
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    three, one = extractor(images), extractor(images[1:2])
    assert not torch.allclose(three.pooled[0], three.pooled[1], rtol=1e-3)
    assert torch.allclose(three.pooled[1:2], one.pooled, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------- weights


def test_the_digest_is_the_documented_one() -> None:
    # pytorch-fid's file name holds its first eight digits; users of torch-fidelity document it whole.
    assert inception_weights.SHA256 == "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    assert inception_weights.SHA256[:8] in inception_weights.FILE


def places(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    yield "checkpoints", tmp_path / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    yield "cache", tmp_path / "cache" / "weights" / "pt_inception-2015-12-05-6726825d.pth"
    yield "environment", tmp_path / "mine.pth"
    yield "given", tmp_path / "other.pth"


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # From the last to the first: each place comes before those that were filled already.
    small = {"a": torch.zeros(2)}
    for value, (place, path) in enumerate(places(tmp_path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"a": torch.full((2,), float(value))}, path)
        monkeypatch.setattr(inception_weights, "SHA256", sha256_file(path))
        if place == "environment":
            monkeypatch.setenv("EDT_INCEPTION", str(path))
        loaded, digest = inception_weights.load_inception(small, path if place == "given" else None)
        assert (loaded["a"].tolist(), digest) == ([value, value], sha256_file(path))


def test_it_is_fetched_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released, kept = tmp_path / "released.pth", tmp_path / "cache" / "weights"
    torch.save({"a": torch.ones(2)}, released)
    monkeypatch.setattr(inception_weights, "URL", released.as_uri())
    with pytest.raises(UserError, match=f"has SHA-256 {sha256_file(released)}, and .* another network or a damaged"):
        inception_weights.load_inception({"a": torch.zeros(2)})
    assert list(kept.iterdir()) == []
    monkeypatch.setattr(inception_weights, "SHA256", sha256_file(released))
    loaded, _ = inception_weights.load_inception({"a": torch.zeros(2)})
    assert loaded["a"].tolist() == [1, 1]
    assert [path.name for path in kept.iterdir()] == [inception_weights.FILE]
    released.unlink()  # it is not fetched again
    inception_weights.load_inception({"a": torch.zeros(2)})


def test_without_file_and_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_extractor("inception")
    message = str(caught.value)
    for part in (
        "pt_inception-2015-12-05-6726825d.pth",
        inception_weights.URL,
        str(tmp_path / "cache" / "weights"),
        "inception=FILE",
        "EDT_INCEPTION",
        "dinov2, pixels, torchscript=FILE",
    ):
        assert part in message
    assert "\n" not in message
    assert list((tmp_path / "cache" / "weights").iterdir()) == []


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'.*absent.pth': no such file"):
        open_extractor(f"inception={tmp_path / 'absent.pth'}")
    monkeypatch.setenv("EDT_INCEPTION", str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match=r"EDT_INCEPTION names '.*gone.pth': no such file"):
        open_extractor("inception")


def test_counts_of_batches_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"bn.weight": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(0)}
    for content, count in (
        ({"bn.weight": torch.ones(2)}, 0),
        (expected | {"bn.num_batches_tracked": torch.tensor(7)}, 7),
    ):
        path = tmp_path / f"{count}.pth"
        torch.save(content, path)
        monkeypatch.setattr(inception_weights, "SHA256", sha256_file(path))
        loaded, _ = inception_weights.load_inception(expected, path)
        assert loaded["bn.weight"].tolist() == content["bn.weight"].tolist()
        assert loaded["bn.num_batches_tracked"].item() == count
        assert loaded["bn.num_batches_tracked"].dtype == torch.int64
    path = tmp_path / "no_weight.pth"
    torch.save({"bn.num_batches_tracked": torch.tensor(0)}, path)
    monkeypatch.setattr(inception_weights, "SHA256", sha256_file(path))
    with pytest.raises(UserError, match=r"bn.weight should be .* found no such tensor"):
        inception_weights.load_inception(expected, path)


class Trap:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def as_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_bytes({"a": torch.zeros(2)}), "b should be .3,., found no such tensor"),
        (as_bytes({"a": torch.zeros(2), "b": torch.zeros(4)}), r"b should be \(3,\), found \(4,\)"),
        (as_bytes({"a": torch.zeros(2), "b": torch.zeros(3), "aux": torch.zeros(1)}), "holds 'aux'"),
        (as_bytes([1, 2]), "no state dict but a list"),
        (b"hello", "cannot be read as a state dict"),
        (pickle.dumps({"a": Trap()}, protocol=2), "cannot be read as a state dict"),
        (as_bytes({"a": Trap()}), "cannot be read as a state dict"),
    ],
)
def test_other_content_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, content: bytes, message: str
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(UserError, match=r"SHA-256 .* may be another network"):
        inception_weights.load_inception(expected, path)
    monkeypatch.setattr(inception_weights, "SHA256", sha256_file(path))
    with pytest.raises(UserError, match=message):
        inception_weights.load_inception(expected, path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features(accepted: Path) -> None:
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    expected = open_extractor(f"inception={accepted}")(images)
    found = open_extractor(f"inception={accepted}", "cuda")(images.cuda())
    assert found.pooled.device.type == "cpu"
    assert torch.allclose(found.pooled, expected.pooled, rtol=1e-4, atol=1e-4)  # TF32 is off by more
