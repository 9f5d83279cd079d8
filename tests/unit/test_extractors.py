"""Extractors other than the FID Inception: pixels, TorchScript files, DINOv2, CLIP, and how they are named."""

import hashlib
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from edt_diffusion.evaluation.extractors import EXTRACTORS, open_extractor
from edt_diffusion.evaluation.extractors.dinov2 import resampled_positions
from edt_diffusion.evaluation.extractors.transformer import resize_as_pillow
from edt_diffusion.util.errors import UserError


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# ------------------------------------------------------------------------------------------------- names


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown extractor 'inceptoin': expected one of .*did you mean 'inception'"):
        open_extractor("inceptoin")
    with pytest.raises(UserError, match="unknown extractor 'dino'"):
        open_extractor("dino=somewhere")


def test_specifications_that_lack_or_have_too_much(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'torchscript' needs a file: expected torchscript=FILE"):
        open_extractor("torchscript")
    with pytest.raises(UserError, match=r"'pixels=3'.*leave '=3' out"):
        open_extractor("pixels=3")
    with pytest.raises(UserError, match=r"'dinov2=' names nothing behind '='"):
        open_extractor("dinov2=")
    (tmp_path / "features.ts").write_bytes(b"")
    with pytest.raises(UserError, match=r"does not exist.*did you mean '.*features.ts'"):
        open_extractor(str(tmp_path / "featurs.ts"))


def test_every_kind_says_what_it_is_in_one_line() -> None:
    assert list(EXTRACTORS) == ["inception", "dinov2", "clip", "torchscript", "pixels"]
    for name, kind in EXTRACTORS.items():
        assert kind.form.startswith(name)
        assert "\n" not in kind.description


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), pictures(1, 8, 8)[0], pictures(1, 8, 8)[:, :1]])
def test_other_tensors_are_refused(images: Tensor) -> None:
    with pytest.raises(UserError, match=r"expected uint8 \(N, 3, H, W\)"):
        open_extractor("pixels")(images)


# ------------------------------------------------------------------------------------------------ pixels


def test_pixels_are_means_over_a_grid() -> None:
    extractor = open_extractor("pixels")
    images = pictures(3, 32, 48)
    found = extractor(images)
    means = images.numpy().reshape(3, 3, 16, 2, 16, 3).mean(axis=(3, 5)) / 255
    np.testing.assert_allclose(found.pooled.numpy(), means.reshape(3, -1), atol=1e-6)
    assert found.logits is None
    assert found.spatial is None
    assert extractor.dimensions == 768
    assert extractor.sha256 == hashlib.sha256(extractor.preprocessing.encode()).hexdigest()


def test_small_pixels_repeat_and_scale_the_frechet_distance() -> None:
    digits = pictures(2, 8, 8)[:, :1].expand(-1, 3, -1, -1)
    pooled = open_extractor("pixels")(digits).pooled
    repeated = digits.numpy().repeat(2, axis=2).repeat(2, axis=3) / 255
    np.testing.assert_allclose(pooled.numpy(), repeated.reshape(2, -1), atol=1e-6)
    own = digits[:, 0].flatten(1).double() / 255
    squared = float((pooled[0] - pooled[1]).double().square().sum())
    assert squared == pytest.approx(4 * 3 * float((own[0] - own[1]).square().sum()), rel=1e-5)


# ------------------------------------------------------------------------------------------- TorchScript


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.float().mean(dim=(2, 3))
        return means, torch.cat([means, -means], dim=1)


class Named(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = images.half()
        return {"features": values.mean(dim=(2, 3)), "spatial": values[:, 0, :4, :4].flatten(1)}


class Only64(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 64 * 64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.float().flatten(1) / 255)


class OnlyTiny(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().reshape(-1, 3 * 5 * 5 * 7)


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)


class Normed(nn.Module):
    """Mixes pictures unless it is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(images.float().mean(dim=(2, 3)))


class Mixing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        means = images.float().mean(dim=(2, 3))
        return means - 0.5 * means.mean(dim=0)


class Whole(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.long().amax(dim=(2, 3))


class Unpooled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class Single(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))[:1].expand(1, 3)


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3)) / 0.0


class Misnamed(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"pooled": images.float().mean(dim=(2, 3))}


class Surplus(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        means = images.float().mean(dim=(2, 3))
        return {"features": means, "logit": means}


class Triple(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means = images.float().mean(dim=(2, 3))
        return means, means, means


def saved(module: nn.Module, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
        torch.jit.save(torch.jit.script(module), path)
    return path


def test_torchscript_forms(tmp_path: Path) -> None:
    images = pictures(3, 20, 24)
    means = images.float().mean(dim=(2, 3))
    alone = open_extractor(str(saved(Means(), tmp_path / "means.ts")))
    assert torch.equal(alone(images).pooled, means)
    assert alone(images).logits is None
    pair = open_extractor(f"torchscript={saved(Pair(), tmp_path / 'pair.pt')}")(images)
    assert pair.logits is not None
    assert torch.equal(pair.logits, torch.cat([means, -means], dim=1))
    named = open_extractor(f"torchscript={saved(Named(), tmp_path / 'named')}")(images)
    assert named.pooled.dtype == torch.float32  # from float16
    assert named.spatial is not None
    assert torch.equal(named.spatial, images[:, 0, :4, :4].flatten(1).float())
    assert named.logits is None


def test_torchscript_identity(tmp_path: Path) -> None:
    path = saved(Pair(), tmp_path / "my-net" / "features.ts")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_extractor(str(path)).identity() == {
        "name": "my-net",
        "sha256": digest,
        "preprocessing": "in the file",
        "dimensions": 3,
    }
    assert open_extractor(str(saved(Pair(), tmp_path / "cats.jit"))).name == "cats"


def test_a_network_for_one_size_says_which_it_refuses(tmp_path: Path) -> None:
    extractor = open_extractor(str(saved(Only64(), tmp_path / "net.ts")))
    assert extractor.dimensions == 5
    assert extractor(pictures(2, 64, 64)).pooled.shape == (2, 5)
    with pytest.raises(UserError, match=r"net.ts' refuses pictures of 48x32 pixels \(.*shapes cannot be multiplied"):
        extractor(pictures(2, 32, 48))


def test_evaluation_mode(tmp_path: Path) -> None:
    extractor = open_extractor(str(saved(Normed().train(), tmp_path / "net.ts")))
    images = pictures(4, 8, 8)
    expected = images.float().mean(dim=(2, 3)) / (1 + 1e-5) ** 0.5  # the statistics that it was made with: 0 and 1
    assert torch.allclose(extractor(images).pooled, expected)
    assert not extractor(images).pooled.requires_grad


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Mixing(), "mixes the pictures of a batch"),
        (Whole(), "as features a tensor of torch.int64: expected a float tensor"),
        (Unpooled(), r"features of shape \(2, 3, 32, 32\) for 2 pictures: expected \(2, D\)"),
        (Single(), r"features of shape \(1, 3\) for 2 pictures"),
        (Broken(), "features that are not finite"),
        (Misnamed(), "a mapping of pooled: expected features"),
        (Surplus(), "a mapping of features, logit: expected features"),
        (Triple(), "something else: expected features"),
        (OnlyTiny(), "of none of 32, 64, 128, 224, 256, 299, 336, 512 pixels"),
    ],
)
def test_what_a_file_may_not_return(tmp_path: Path, module: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_extractor(str(saved(module, tmp_path / "net.ts")))
    assert "\n" not in str(caught.value)


def test_the_number_of_features_may_not_depend_on_the_size(tmp_path: Path) -> None:
    extractor = open_extractor(str(saved(Flat(), tmp_path / "net.ts")))
    assert extractor.dimensions == 3 * 32 * 32
    with pytest.raises(UserError, match="gives 192 features of a 8x8 picture, and 3072 of another"):
        extractor(pictures(1, 8, 8))


class Trap:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_checkpoints_and_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pth")
    torch.save(Trap(), tmp_path / "trap.pt")
    (tmp_path / "text.ts").write_text("hello")
    for name in ("state.pth", "trap.pt", "text.ts"):
        with pytest.raises(UserError, match=r"is not TorchScript .* inception=FILE"):
            open_extractor(str(tmp_path / name))
    whole = saved(Means(), tmp_path / "net.ts").read_bytes()
    (tmp_path / "net.ts").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not TorchScript"):
        open_extractor(str(tmp_path / "net.ts"))
    with pytest.raises(UserError, match="does not exist or is no file"):
        open_extractor(f"torchscript={tmp_path / 'absent'}")
    assert "executed" not in capsys.readouterr().out


def test_full_precision_whatever_is_set_around_it(tmp_path: Path) -> None:
    extractor = open_extractor(str(saved(Only64(), tmp_path / "net.ts")))
    images = pictures(2, 64, 64)
    expected = extractor(images).pooled
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(extractor(images).pooled, expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_a_trained_network_recognises_cifar10(shared_dir: Path) -> None:
    from edt_diffusion.data import open_images

    network = shared_dir / "weights" / "cifar10-resnet56" / "features.ts"
    data = shared_dir / "data" / "cifar10" / "test-10k.parquet"
    if not network.exists() or not data.exists():
        pytest.skip("ResNet-56 or CIFAR-10 is absent: no weights/cifar10-resnet56 or data/cifar10 (set EDT_SHARED)")
    images = open_images(str(data), size=32)
    chosen = np.arange(1000)
    batch = torch.from_numpy(images.images(chosen)).permute(0, 3, 1, 2)
    extractor = open_extractor(str(network))
    assert extractor.name == "cifar10-resnet56"
    assert extractor.dimensions == 64
    logits = torch.cat([extractor(part).logits for part in batch.split(250)])
    accuracy = float((logits.argmax(1).numpy() == np.asarray(images.labels)[chosen]).mean())
    assert accuracy >= 0.92


# ---------------------------------------------------------------------------------------- DINOv2 and CLIP

DINOV2: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
VISION: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 28, "patch_size": 14, "projection_dim": 8},
}


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is absent: pip install 'edt-diffusion[features]'")


def pillow(images: Tensor, size: int) -> np.ndarray:
    """float64 (N, size, size, 3) in [0, 255], by Pillow, one picture at a time."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    return np.stack([np.asarray(Image.fromarray(a).resize((size, size), Image.BICUBIC), np.float64) for a in arrays])


def normalised(pixels: np.ndarray, mean: list[float], deviation: list[float]) -> Tensor:
    return torch.from_numpy(((pixels / 255 - mean) / deviation).transpose(0, 3, 1, 2).copy()).float()


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 56), (90, 70, 32)])
def test_the_resize_is_antialiased_and_bicubic(height: int, width: int, size: int) -> None:
    smooth = functional.interpolate(pictures(2, 9, 9).float(), (height, width), mode="bilinear").round().byte()
    expected = functional.interpolate(smooth.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    found = resize_as_pillow(smooth, size)
    assert found.dtype == torch.uint8
    assert (found.float() - expected).abs().max() <= 1.2  # Pillow rounds after each axis: 0.5 * 1.3 + 0.5
    assert torch.equal(resize_as_pillow(found, size), found)


def test_dinov2_is_the_class_token_after_the_norm(transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, image_size=224)).eval()
    model.save_pretrained(tmp_path / "tiny")
    extractor = open_extractor(f"dinov2={tmp_path / 'tiny'}")
    images = pictures(3, 40, 32)
    inputs = normalised(pillow(images, 224), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        hidden = model(inputs, output_hidden_states=True).hidden_states[-1]
        expected = functional.layer_norm(hidden[:, 0], (16,), model.layernorm.weight, model.layernorm.bias, 1e-6)
    found = extractor(images).pooled
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(extractor(images[1:2]).pooled, found[1:2], atol=1e-5)
    assert (extractor.name, extractor.dimensions) == ("dinov2", 16)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, the one of torch and OpenCV."""
    d = abs(distance)
    if d <= 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def test_positions_are_read_as_dinov2_reads_them() -> None:
    draw = np.random.default_rng(0)
    down, across = draw.normal(size=(2, 37))
    grid = np.stack([np.outer(down, across), np.outer(across, down)], axis=2)  # each axis can be done by itself
    table = np.concatenate([np.full((1, 2), -7.0), grid.reshape(-1, 2)])
    places = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5  # 16 patches of 14 pixels, and the 0.1
    weights = np.zeros((16, 37))
    for j, place in enumerate(places):
        for neighbour in range(int(place) - 1, int(place) + 3):
            weights[j, min(max(neighbour, 0), 36)] += cubic(place - neighbour)
    first, second = weights @ down, weights @ across
    expected = np.stack([np.outer(first, second), np.outer(second, first)], axis=2).reshape(-1, 2)
    found = resampled_positions(torch.from_numpy(table)[None], 16)
    assert found.shape == (1, 257, 2)
    assert found[0, 0].tolist() == [-7, -7]
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=1e-6)
    assert torch.equal(resampled_positions(found, 16), found)


def test_dinov2_with_positions_of_another_size(transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, image_size=518)).eval()
    model.embeddings.position_embeddings.data *= 50
    model.save_pretrained(tmp_path / "tiny")
    extractor = open_extractor(f"dinov2={tmp_path / 'tiny'}")
    images = pictures(2, 224, 224)
    inputs = normalised(images.permute(0, 2, 3, 1).numpy(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        theirs = model(inputs).pooler_output  # whose positions lack the 0.1
        model.embeddings.position_embeddings.data = resampled_positions(model.embeddings.position_embeddings, 16)
        expected = model(inputs).pooler_output
    found = extractor(images).pooled
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - theirs).abs().max() > 20 * (found - expected).abs().max()


def test_clip_is_the_projection_of_the_central_square(
    transformers: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)).eval()
    tower.save_pretrained(tmp_path / "tower")
    capfd.readouterr()
    extractor = open_extractor(f"clip={tmp_path / 'tower'}")
    images = pictures(3, 40, 61)
    square = images[:, :, :, 10:50]
    inputs = normalised(pillow(square, 28), [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        embeddings = tower(inputs).image_embeds
    expected = embeddings / embeddings.square().sum(1, keepdim=True).sqrt()
    assert torch.allclose(extractor(images).pooled, expected, atol=1e-5)
    assert (extractor.name, extractor.dimensions) == ("clip", 8)
    assert "28x28" in extractor.preprocessing
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_clip_from_a_folder_with_both_towers(transformers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**small, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "projection_dim": 8}
    both = transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=8))
    both.save_pretrained(tmp_path / "both")
    tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION))
    tower.load_state_dict(
        {name: tensor for name, tensor in both.state_dict().items() if name.startswith(("vision_", "visual_"))}
    )
    tower.save_pretrained(tmp_path / "tower")
    reports: list[logging.LogRecord] = []
    listener = logging.Handler()
    transformers.utils.logging.set_verbosity_warning()  # the default
    listener.emit = reports.append
    logging.getLogger("transformers").addHandler(listener)
    try:
        one, other = (open_extractor(f"clip={tmp_path / name}") for name in ("both", "tower"))
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert transformers.utils.logging.get_verbosity() == logging.WARNING
    assert reports == []  # none of the text tower's weights, which are left out on purpose
    assert one.sha256 == other.sha256
    assert torch.allclose(one(pictures(1, 28, 28)).pooled, other(pictures(1, 28, 28)).pooled, atol=1e-6)


def test_the_digest_is_of_the_weights(transformers: Any, tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, image_size=28))
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="1GB")
    os.rename(tmp_path / "b" / "config.json", tmp_path / "config.json")
    (tmp_path / "b" / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    first = open_extractor(f"dinov2={tmp_path / 'a'}").sha256
    assert open_extractor(f"dinov2={tmp_path / 'b'}").sha256 == first
    model.layernorm.bias.data += 1e-3
    model.save_pretrained(tmp_path / "c")
    assert open_extractor(f"dinov2={tmp_path / 'c'}").sha256 != first


def test_other_models_and_folders_are_refused(transformers: Any, tmp_path: Path) -> None:
    model = transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, image_size=28))
    model.save_pretrained(tmp_path / "dino")
    with pytest.raises(UserError, match="of type 'dinov2': clip expects clip or clip_vision_model"):
        open_extractor(f"clip={tmp_path / 'dino'}")
    with pytest.raises(UserError, match=r"'.*absent' is no folder"):
        open_extractor(f"clip={tmp_path / 'absent'}")
    with pytest.raises(UserError, match=r"holds no config.json"):
        open_extractor(f"dinov2={tmp_path}")
    weights = tmp_path / "dino" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded as Dinov2Model"):
        open_extractor(f"dinov2={tmp_path / 'dino'}")
    weights.unlink()
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        open_extractor(f"dinov2={tmp_path / 'dino'}")
    fewer = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("layernorm")}
    from safetensors.torch import save_file

    save_file(fewer, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights \(layernorm.bias, layernorm.weight, ...\)"):
        open_extractor(f"dinov2={tmp_path / 'dino'}")
    other = transformers.Dinov2Model(transformers.Dinov2Config(**{**DINOV2, "patch_size": 15}, image_size=30))
    other.save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match="patches of 15 pixels: expected a divisor of 224"):
        open_extractor(f"dinov2={tmp_path / 'odd'}")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'edt-diffusion\[features\]'"):
        open_extractor("dinov2")


@pytest.mark.parametrize("offline", [True, False])
def test_without_the_hub_it_says_so_at_once(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'facebook/dinov2-large' .* cannot be reached: go online, or name a folder"):
        open_extractor("dinov2")
    assert time.monotonic() - start < 5


def test_the_hub_cache_is_enough(transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    entry, commit = tmp_path / "models--openai--clip-vit-large-patch14-336", "0" * 40
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION))
    tower.save_pretrained(entry / "snapshots" / commit)
    # OpenAI's entry has its weights in the older format.
    (entry / "snapshots" / commit / "model.safetensors").unlink()
    torch.save(tower.state_dict(), entry / "snapshots" / commit / "pytorch_model.bin")
    assert open_extractor("clip").dimensions == 8
