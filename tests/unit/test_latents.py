import hashlib
import io
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stores import make_pictures, make_store, small_kl, small_tiny

from edt_diffusion.data.config import DataConfig
from edt_diffusion.data.dataset import open_dataset
from edt_diffusion.data.images import open_images
from edt_diffusion.data.latents import LatentStore
from edt_diffusion.util import rng
from edt_diffusion.util.errors import UserError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def moments(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows of 2 x 8 x 8 latents, both views; shift 0.25, scale 0.5."""
    out = tmp_path_factory.mktemp("stores") / "moments"
    make_store(tree, out, small_kl(), flips="both")
    return out


@pytest.fixture(scope="module")
def pixels(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "pixels"
    make_store(tree, out)
    return out


def at(store: LatentStore, indices: list[int], epoch: int = 0, seed: int = 0, flip: bool = False) -> torch.Tensor:
    return store.batch(np.array(indices), np.full(len(indices), epoch), seed, flip)


# Draws


def test_draws_have_the_mean_and_variance_of_the_posterior(moments: Path) -> None:
    store = LatentStore.open(moments)
    mean, logarithm = torch.from_numpy(store.stored([4])).double().chunk(2, 1)
    epochs = 3000
    draws = store.batch(np.full(epochs, 4), np.arange(epochs), seed=11).double() / 0.5 + 0.25
    deviation = torch.exp(logarithm / 2)
    errors = (draws.mean(0) - mean) / deviation * epochs**0.5  # standard normal each; 128 of them
    assert errors.abs().max() < 5
    assert 0.8 < errors.std() < 1.2
    ratios = (draws.var(0) / deviation**2 - 1) * (epochs / 2) ** 0.5
    assert ratios.abs().max() < 5
    assert 0.8 < ratios.std() < 1.2
    standard = ((draws - mean) / deviation).flatten()
    assert (standard.abs() < 1).double().mean() == pytest.approx(0.6827, abs=0.004)  # normal, not only by two moments


def test_a_draw_written_out(moments: Path) -> None:
    store = LatentStore.open(moments)
    stored = store.stored([7]).astype(np.float64)[0]
    noise = rng.stream(5, rng.Purpose.LATENT, 3, 7).standard_normal((2, 8, 8), dtype=np.float32)
    wanted = (stored[:2] + np.exp(stored[2:] / 2) * noise - 0.25) * 0.5
    np.testing.assert_allclose(at(store, [7], epoch=3, seed=5)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_a_row_depends_on_seed_epoch_and_index_only(moments: Path, flip: bool) -> None:
    store = LatentStore.open(moments)
    together = store.batch(np.array([8, 2, 2, 5]), np.array([1, 1, 6, 0]), 3, flip)
    again = LatentStore.open(moments)
    for slot, (index, epoch) in enumerate(((8, 1), (2, 1), (2, 6), (5, 0))):
        assert torch.equal(again.batch(np.array([index]), np.array([epoch]), 3, flip)[0], together[slot])
    assert not torch.equal(together[1], together[2])  # anew in each epoch
    assert not torch.equal(at(store, [2], 1, seed=3), at(store, [2], 1, seed=4))


def test_deterministic_latents_are_not_drawn(tree: Path, tmp_path: Path) -> None:
    make_store(tree, tmp_path / "store", small_tiny())
    store = LatentStore.open(tmp_path / "store")
    assert store.shape == (3, 8, 8)
    wanted = torch.from_numpy(store.stored(range(9))).float()
    for epoch in (0, 1):
        assert torch.equal(at(store, list(range(9)), epoch), wanted)  # its scaling factor is 1
    assert torch.equal(store.mean_latents(range(9)), wanted)


# Flips


def test_flips_take_the_rows_of_the_mirrored_picture(moments: Path) -> None:
    store = LatentStore.open(moments)
    indices, epochs = np.repeat(np.arange(9), 8), np.tile(np.arange(8), 9)
    flags = np.array(
        [rng.stream(2, rng.Purpose.FLIP, epoch, index).random() < 0.5 for index in range(9) for epoch in range(8)]
    )
    assert 0.3 < flags.mean() < 0.7
    plain, mirrored = store.stored(indices), store.stored(indices, np.ones(72, bool))
    assert (plain != mirrored).any((1, 2, 3)).all()
    chosen = torch.from_numpy(np.where(flags[:, None, None, None], mirrored, plain)).float()
    noise = rng.normals  # one stream per row, keyed as the store keys it
    drawn = store.batch(indices, epochs, 2, flip=True)
    for slot in range(0, 72, 5):
        epoch, index = int(epochs[slot]), int(indices[slot])
        mean, logarithm = chosen[slot].chunk(2)
        wanted = mean + torch.exp(logarithm / 2) * noise(2, rng.Purpose.LATENT, epoch, [index], (2, 8, 8))[0]
        torch.testing.assert_close(drawn[slot], (wanted - 0.25) * 0.5)


def test_flips_that_were_not_encoded_are_refused(tree: Path, tmp_path: Path) -> None:
    make_store(tree, tmp_path / "store", small_kl())
    store = LatentStore.open(tmp_path / "store")
    with pytest.raises(UserError, match=r"encoded without mirrored pictures: encode it with --flips both, or set"):
        at(store, list(range(9)), flip=True)
    assert at(store, [0]).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("flip", [False, True])
def test_pixels_are_those_of_the_pictures_bit_for_bit(tree: Path, pixels: Path, flip: bool) -> None:
    store, images = LatentStore.open(pixels), open_images(tree, size=16)
    assert store.shape == images.shape == (3, 16, 16)
    assert store.class_names == images.class_names
    np.testing.assert_array_equal(store.labels, images.labels)
    indices, epochs = np.repeat(np.arange(9), 4), np.tile(np.arange(4), 9)
    wanted = images.batch(indices, epochs, 6, flip)
    assert torch.equal(store.batch(indices, epochs, 6, flip), wanted)
    mirrored = [torch.equal(wanted[4 * row], wanted[4 * row + 1]) for row in range(9)]
    assert any(mirrored)
    assert all(mirrored) != flip
    picked = [8, 0, 3]
    np.testing.assert_array_equal(
        store.subset(picked).batch(np.arange(3), np.zeros(3, int), 6, flip),
        images.subset(picked).batch(np.arange(3), np.zeros(3, int), 6, flip),
    )


# Scaling


def test_the_codecs_own_scaling(moments: Path) -> None:
    store = LatentStore.open(moments)
    assert (store.scaling.shift, store.scaling.scale) == ((0.25, 0.25), (0.5, 0.5))


def test_measured_scaling_gives_mean_0_and_deviation_1(moments: Path) -> None:
    store = LatentStore.open(moments, scaling="measured")
    mean, logarithm = np.split(store.stored(range(9)).astype(np.float64), 2, 1)
    for channel in range(2):
        shift, scale = store.scaling.shift[channel], store.scaling.scale[channel]
        scaled = (mean[:, channel] - shift) * scale
        assert scaled.mean() == pytest.approx(0, abs=1e-3)  # the rows are rounded to float16
        variance = scaled.var() + (np.exp(logarithm[:, channel]) * scale**2).mean()
        assert variance == pytest.approx(1, abs=2e-3)
    epochs = np.repeat(np.arange(300), 9)
    drawn = store.batch(np.tile(np.arange(9), 300), epochs, 0).double()
    np.testing.assert_allclose(drawn.mean((0, 2, 3)), 0, atol=0.01)
    np.testing.assert_allclose(drawn.std((0, 2, 3)), 1, atol=0.01)


def test_measured_pixels_stay_pixels(pixels: Path) -> None:
    assert torch.equal(at(LatentStore.open(pixels, "measured"), [0, 8]), at(LatentStore.open(pixels), [0, 8]))


def test_a_channel_that_never_changes_cannot_be_measured(tmp_path: Path) -> None:
    vae = small_tiny()
    with torch.no_grad():
        for parameter in vae.encoder.parameters():
            parameter.zero_()
    make_store(make_pictures(tmp_path / "p"), tmp_path / "store", vae)
    LatentStore.open(tmp_path / "store")
    with pytest.raises(UserError, match="deviation 0: expected"):
        LatentStore.open(tmp_path / "store", "measured")


# Parts of a store


def test_subsets(moments: Path) -> None:
    store = LatentStore.open(moments)
    part = store.subset([8, 0, 5, 5])
    assert len(part) == 4
    np.testing.assert_array_equal(part.labels, [1, 0, 1, 1])
    assert part.class_counts() == {"ant": 1, "bee": 3}
    assert part.column("key", [0, 1, 2]) == ["bee/03.png", "ant/00.png", "bee/00.png"]
    np.testing.assert_array_equal(part.stored([1, 0]), store.stored([0, 8]))
    again = part.subset([2, 0])
    assert again.column("row", [0, 1]) == [5, 8]
    assert again.shape == (2, 8, 8)
    # The key of a draw is the place in the dataset that is asked, as for pictures.
    stored = torch.from_numpy(store.stored([5])).float()
    noise = rng.normals(0, rng.Purpose.LATENT, 0, [2], (2, 8, 8))
    wanted = (stored[:, :2] + torch.exp(stored[:, 2:] / 2) * noise - 0.25) * 0.5
    torch.testing.assert_close(at(part, [2]), wanted)


def test_shard_sizes_and_columns(moments: Path, tree: Path) -> None:
    store = LatentStore.open(moments)
    assert store.shard_sizes() == [4, 4, 1]
    assert store.subset([0, 1, 4, 8, 2]).shard_sizes() == [2, 1, 1, 1]
    assert store.bucket_sizes() == [9]
    assert store.column("key", [8, 1]) == ["bee/03.png", "ant/01.png"]
    digest = hashlib.sha256((tree / "ant/01.png").read_bytes()).digest()
    assert store.column("picture_sha256", [1]) == [digest]
    assert store.class_counts() == {"ant": 5, "bee": 4}
    assert store.select_size(16, 16) is store
    with pytest.raises(UserError, match=r"data.size is 32x16, but .* holds pictures of 16x16: set data.size=null"):
        store.select_size(32, 16)


def test_indices_outside(moments: Path) -> None:
    store = LatentStore.open(moments)
    for indices in ([9], [-1], [0, 9]):
        with pytest.raises(IndexError, match="outside a store of 9"):
            store.stored(indices)
    with pytest.raises(IndexError):
        store.subset([9])
    with pytest.raises(IndexError, match="outside a store of 2"):
        store.subset([7, 8]).stored([2])


def test_a_limit_is_spread_over_the_store(moments: Path) -> None:
    part = open_dataset(DataConfig(path=str(moments), limit=3))
    assert isinstance(part, LatentStore)
    assert part.column("row", range(3)) == [0, 3, 6]
    np.testing.assert_array_equal(part.labels, [0, 0, 1])


def test_what_is_read_may_be_changed_and_labels_may_not(moments: Path) -> None:
    store = LatentStore.open(moments)
    stored = store.stored([0])
    stored += 1
    at(store, [0]).add_(1)
    np.testing.assert_array_equal(store.stored([0]) + 1, stored)
    with pytest.raises(ValueError, match="read-only"):
        store.labels[0] = 1  # type: ignore[index]
    with pytest.raises(ValueError, match="read-only"):
        store._shard(0).views["plain"][0] = 1


def test_unlabelled(tmp_path: Path) -> None:
    make_pictures(tmp_path / "p", {"a": 3})
    make_store(tmp_path / "p/a", tmp_path / "store")
    store = LatentStore.open(tmp_path / "store")
    assert (store.labels, store.class_names, store.class_counts()) == (None, None, {})
    assert store.subset([1, 2]).labels is None


def _read(store: LatentStore) -> torch.Tensor:
    return store.batch(np.arange(3), np.zeros(3, int), 1, True)


def test_pickling(moments: Path) -> None:
    store = LatentStore.open(moments).subset([8, 1, 4])
    wanted = _read(store)  # shards are open by now
    assert len(pickle.dumps(store)) < 8000  # and are not sent along: 18 kB of moments
    assert torch.equal(_read(pickle.loads(pickle.dumps(store))), wanted)


@pytest.mark.slow
def test_a_spawned_worker_reads_the_same(moments: Path) -> None:
    store = LatentStore.open(moments).subset([8, 1, 4])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        read = pool.apply(_read_as_array, (store,))
    np.testing.assert_array_equal(read, _read(store))


def _read_as_array(store: LatentStore) -> np.ndarray:
    return _read(store).numpy()


def test_a_shard_is_mapped_and_not_read(tmp_path: Path) -> None:
    """Pages come with the rows: 50 rows of 48 KiB are open, and two are in memory."""
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128)).save(buffer, "PNG")
    (tmp_path / "p").mkdir()
    for index in range(50):
        (tmp_path / f"p/{index}.png").write_bytes(buffer.getvalue())
    make_store(tmp_path / "p", tmp_path / "store", sizes=[(128, 128)], shard_pictures=50)
    store = LatentStore.open(tmp_path / "store")
    store.stored([0, 49])
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "store/shard-00000.arrow") in maps.read_text()
    assert not store._shard(0).views["plain"].flags.owndata


def test_codec_folder(moments: Path, pixels: Path) -> None:
    assert LatentStore.open(moments).codec_folder == str(moments / "codec")
    assert LatentStore.open(pixels).codec_folder is None
