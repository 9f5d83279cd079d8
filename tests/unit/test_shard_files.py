import errno
import gc
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from stores import contents, make_pictures, make_store

from edt_diffusion.data import shard_files, shards
from edt_diffusion.data.latents import LatentStore
from edt_diffusion.data.shard_files import IntegrityCheck, LocalShards, cache_folder, check_shard, is_store, open_files
from edt_diffusion.data.shards import Shard, ShardRows, write_shard
from edt_diffusion.util.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 24 rows in six shards."""
    folder = tmp_path_factory.mktemp("whole")
    make_store(make_pictures(folder / "pictures", {"a": 12, "b": 12}), folder / "store")
    return folder / "store"


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(whole, tmp_path / "store")
    return tmp_path / "store"


def flip_byte(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place if place >= 0 else len(content) // 2] ^= 1
    file.write_bytes(content)


# One shard


def some_rows(count: int = 3) -> ShardRows:
    values = np.arange(count * 2 * 3 * 4, dtype=np.float16).reshape(count, 2, 3, 4)
    keys = ["a\nb", "ü", ""][:count]
    return ShardRows(
        np.arange(count) * 7,
        np.arange(count),
        keys,
        [bytes([n]) * 32 for n in range(count)],
        {"plain": values, "flipped": values[..., ::-1]},
    )


def test_a_shard_is_plain_arrow(tmp_path: Path) -> None:
    size, digest = write_shard(tmp_path / "s.arrow", some_rows())
    assert size == (tmp_path / "s.arrow").stat().st_size
    assert len(digest) == 64
    reader = pa.ipc.open_file(tmp_path / "s.arrow")
    assert reader.num_record_batches == 1
    table = reader.read_all()
    assert {field.name: str(field.type) for field in table.schema} == {
        "row": "int64",
        "label": "int32",
        "key": "string",
        "picture_sha256": "fixed_size_binary[32]",
        "plain": "fixed_size_binary[48]",
        "flipped": "fixed_size_binary[48]",
    }
    assert table["row"].to_pylist() == [0, 7, 14]
    assert table["key"].to_pylist() == ["a\nb", "ü", ""]
    assert table["plain"][1].as_py() == np.arange(24, 48, dtype="<f2").tobytes()  # not compressed
    opened = Shard.open(tmp_path / "s.arrow", 3, ["plain", "flipped"], (2, 3, 4), np.dtype("float16"))
    np.testing.assert_array_equal(opened.views["flipped"], some_rows().views["flipped"])
    assert opened.column("label").to_pylist() == [0, 1, 2]
    assert opened.column("nothing") is None
    assert write_shard(tmp_path / "again.arrow", some_rows()) == (size, digest)


def test_shards_hold_no_file_open(tmp_path: Path) -> None:
    """A store of thousands of shards would exceed what a process may open."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("no /proc")
    write_shard(tmp_path / "s.arrow", some_rows())
    opened = [Shard.open(tmp_path / "s.arrow", 3, ["plain"], (2, 3, 4), np.dtype("float16")) for _ in range(20)]
    gc.collect()  # of what others left
    held = [os.readlink(link) for link in folder.iterdir() if link.exists()]
    assert str(tmp_path / "s.arrow") not in held
    assert opened[-1].views["plain"][2, 1, 2, 3] == 71


@pytest.mark.parametrize(
    ("rows", "view", "shape", "dtype", "reason"),
    [
        (4, "plain", (2, 3, 4), "float16", "3 rows, expected 4"),
        (3, "other", (2, 3, 4), "float16", "other"),
        (3, "plain", (2, 3, 4), "float32", "expected 96 bytes a row"),
        (3, "plain", (2, 3, 5), "float16", "expected 60 bytes a row"),
        (3, "label", (2, 1, 1), "float16", "holds int32"),
    ],
)
def test_a_shard_of_another_layout(tmp_path: Path, rows: int, view: str, shape: Any, dtype: str, reason: str) -> None:
    write_shard(tmp_path / "s.arrow", some_rows())
    with pytest.raises(UserError, match=rf"shard '.*s.arrow' cannot be read \(.*{reason}.*\): encode or copy it anew"):
        Shard.open(tmp_path / "s.arrow", rows, [view], shape, np.dtype(dtype))


def test_what_is_no_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.arrow", some_rows())
    content = (tmp_path / "s.arrow").read_bytes()
    for damaged in (b"", b"ARROW1", b"text", content[:100], content[:-1], content[:-300], bytes(len(content))):
        (tmp_path / "d.arrow").write_bytes(damaged)
        with pytest.raises(UserError, match=r"shard '.*d.arrow' cannot be read") as raised:
            Shard.open(tmp_path / "d.arrow", 3, ["plain"], (2, 3, 4), np.dtype("float16"))
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"cannot be read"):
        Shard.open(tmp_path / "absent.arrow", 3, ["plain"], (2, 3, 4), np.dtype("float16"))


def test_a_shard_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "sha256_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "s.arrow", some_rows())
    assert list(tmp_path.iterdir()) == []


# A store in a folder


def test_one_flipped_byte_is_found_and_its_shard_named(store: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in store.glob("*.arrow")}
    assert LatentStore.open(store).verify() == []
    # The first bytes, the schema, the rows, the footer.
    for place in (0, 40, sizes["shard-00003.arrow"] // 2, sizes["shard-00003.arrow"] - 1):
        flip_byte(store / "shard-00003.arrow", place)
        opened = LatentStore.open(store)
        told: list[Any] = []
        errors = opened.verify(lambda *call: told.append(call))  # noqa: B023
        assert len(errors) == 1
        assert "shard-00003.arrow' is not what the manifest says (its SHA-256 differs)" in str(errors[0])
        assert [number for number, _, _ in told] == list(range(6))
        assert [number for number, _, error in told if error is not None] == [3]
        check = opened.integrity_check().start()
        with pytest.raises(UserError, match=r"shard-00003.arrow' is not what the manifest says"):
            check.wait()
        with pytest.raises(UserError, match=r"shard-00003.arrow"):
            check.raise_failure()
        flip_byte(store / "shard-00003.arrow", place)
    LatentStore.open(store).integrity_check().start().wait()


def test_processes_share_the_check(store: Path) -> None:
    flip_byte(store / "shard-00003.arrow")
    opened = LatentStore.open(store)
    opened.integrity_check(rank=0, world_size=2).start().wait()
    with pytest.raises(UserError, match="shard-00003"):
        opened.integrity_check(rank=1, world_size=2).start().wait()
    # Rows 0 to 3 and 20 to 23 lie in the first and the last shard.
    opened.subset([0, 3, 20, 23]).integrity_check().start().wait()
    with pytest.raises(UserError, match="shard-00003"):
        opened.subset([0, 12]).integrity_check().start().wait()


def test_a_check_can_be_ended(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def slow(path: Path, _: object) -> None:
        hashed.append(path)
        check.close()

    monkeypatch.setattr(shard_files, "check_shard", slow)
    check = LatentStore.open(whole).integrity_check()
    check.start().wait()
    assert len(hashed) == 1
    IntegrityCheck([]).start().wait()


def test_a_shard_cut_short_or_missing_or_longer(store: Path) -> None:
    shard = store / "shard-00002.arrow"
    content = shard.read_bytes()
    for changed in (content[:-1], b"", content + b"\0"):
        shard.write_bytes(changed)
        with pytest.raises(
            UserError, match=rf"shard-00002.arrow' has {len(changed)} bytes, its manifest says {len(content)}"
        ):
            LatentStore.open(store)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard '.*shard-00002.arrow' cannot be read \(No such file or directory\)"):
        LatentStore.open(store)


def test_a_shard_that_goes_while_the_store_is_open(store: Path) -> None:
    opened = LatentStore.open(store)
    facts = opened.manifest.shards[2]
    (store / facts.file).unlink()
    with pytest.raises(UserError, match=r"shard-00002.arrow' cannot be read"):
        opened.stored([8])
    with pytest.raises(UserError, match=r"shard-00002.arrow' cannot be read \(No such file or directory\)"):
        check_shard(store / facts.file, facts)
    assert len(opened.verify()) == 1


def test_other_labels(store: Path) -> None:
    labels = np.load(store / "labels.npy")
    np.save(store / "labels.npy", labels[::-1])
    with pytest.raises(UserError, match=r"labels.npy is damaged \(its SHA-256 differs\)"):
        LatentStore.open(store)
    (store / "labels.npy").unlink()
    with pytest.raises(UserError, match=r"lacks labels.npy \(No such file or directory\)"):
        LatentStore.open(store)


@pytest.mark.parametrize("labels", [[0] * 23, [0] * 23 + [2], [-1] + [0] * 23])
def test_labels_that_do_not_fit_the_manifest(store: Path, labels: list[int]) -> None:
    import hashlib

    np.save(store / "labels.npy", np.array(labels, "<i4"))
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["labels_sha256"] = hashlib.sha256((store / "labels.npy").read_bytes()).hexdigest()
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"labels.npy holds {len(labels)} labels, .* expected 24 from 0 to 1"):
        LatentStore.open(store)


def test_manifests_that_point_outside(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    shutil.copy(store / manifest["shards"][0]["file"], store.parent / "x")
    manifest["shards"][0]["file"] = "../x"
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json is damaged .*'../x' is no plain file name"):
        LatentStore.open(store)


def test_what_is_no_store(store: Path, tmp_path: Path) -> None:
    assert is_store(str(store))
    (store / "manifest.json").rename(store / "encode.json")
    assert is_store(str(store))  # opening it says more than "no pictures"
    with pytest.raises(UserError, match=r"is no latent store \(its encoding is not finished; run edt encode again\)"):
        LatentStore.open(store)
    (store / "encode.json").unlink()
    for place in (store, tmp_path / "absent", store / "labels.npy"):
        assert not is_store(str(place))
        with pytest.raises(UserError, match=r"is no latent store \(it has no manifest.json\): expected a folder that"):
            LatentStore.open(place)
    for text, store_all_the_same in (
        ("{", True),
        ("[]", False),
        ('{"name": "app"}', False),
        ('{"format": "edt-latents", "version": 2}', True),
    ):
        (store / "manifest.json").write_text(text)
        assert is_store(str(store)) is store_all_the_same
        with pytest.raises(UserError, match=r"manifest.json"):
            LatentStore.open(store)


def test_a_name_that_sounds_like_an_error(tmp_path: Path) -> None:
    (tmp_path / "this is damaged").mkdir()
    assert not is_store(str(tmp_path / "this is damaged"))


# A store behind a URL


@pytest.fixture
def remote(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The store in fsspec's memory, and an empty cache."""
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/bucket/store/{name}": content for name, content in contents(whole).items()})
    yield "memory://bucket/store"
    memory.rm("/bucket", recursive=True)


def cached(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in (tmp_path / "cache").rglob("*") if file.is_file())


def test_a_remote_store_reads_the_same_rows(remote: str, whole: Path, tmp_path: Path) -> None:
    assert is_store(remote)
    assert not is_store("memory://bucket/other")
    here, there = LatentStore.open(whole), LatentStore.open(remote + "/", keep=3)
    assert there.location == remote
    assert there.manifest == here.manifest
    np.testing.assert_array_equal(there.labels, here.labels)
    assert cached(tmp_path) == []
    order = np.random.default_rng(0).permutation(24)
    for index in order:
        batch = there.batch(np.array([index]), np.zeros(1, int), 0, True)
        np.testing.assert_array_equal(batch, here.batch(np.array([index]), np.zeros(1, int), 0, True))
        assert len(cached(tmp_path)) <= 3
        assert len(there._open) <= 3  # a map keeps a removed file on the disk
    np.testing.assert_array_equal(there.stored(order), here.stored(order))  # all six in one batch
    assert there.column("key", [23]) == here.column("key", [23])
    assert there.codec_folder is None
    there.integrity_check().start().wait()
    assert there.verify() == []


def test_shards_longest_unused_go_first(remote: str, tmp_path: Path) -> None:
    files = open_files(remote, 3)
    manifest = LatentStore.open(remote).manifest
    files.read("manifest.json")
    for number in (0, 1, 2, 0, 3):
        files.path(manifest.shards[number])
        time.sleep(0.02)  # file times are compared
    assert cached(tmp_path) == ["shard-00000.arrow", "shard-00002.arrow", "shard-00003.arrow"]


def test_what_was_fetched_is_kept_for_the_next_run(remote: str, tmp_path: Path, whole: Path) -> None:
    LatentStore.open(remote).stored([0, 5])
    folder = next((tmp_path / "cache/shards").iterdir())
    (folder / ".shard-00002.arrow.0123456789abcdef.tmp").write_text("of a process that was killed")
    (folder / "shard-00001.arrow").write_bytes(b"cut short")
    fsspec.filesystem("memory").rm("/bucket/store/shard-00000.arrow")
    again = LatentStore.open(remote)
    np.testing.assert_array_equal(again.stored([0, 5, 9]), LatentStore.open(whole).stored([0, 5, 9]))
    assert again.verify() == []


def test_two_stores_share_no_cache(remote: str, tmp_path: Path) -> None:
    LatentStore.open(remote).stored([0])
    memory = fsspec.filesystem("memory")
    manifest = json.loads(memory.cat_file("/bucket/store/manifest.json"))
    manifest["skipped"] += 1
    memory.pipe_file("/bucket/store/manifest.json", json.dumps(manifest).encode())
    LatentStore.open(remote).stored([0])
    assert len(list((tmp_path / "cache/shards").iterdir())) == 2


def test_a_damaged_or_missing_remote_shard_is_named(remote: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    content = memory.cat_file("/bucket/store/shard-00004.arrow")
    memory.pipe_file("/bucket/store/shard-00004.arrow", content[:-1] + b"?")
    memory.rm("/bucket/store/shard-00005.arrow")
    store = LatentStore.open(remote)
    with pytest.raises(UserError, match=r"shard memory://bucket/store/shard-00004.arrow is not what the manifest says"):
        store.stored([16])
    with pytest.raises(UserError, match=r"shard memory://bucket/store/shard-00005.arrow cannot be fetched") as raised:
        store.stored([20])
    assert "\n" not in str(raised.value)
    assert cached(tmp_path) == []
    assert len(store.verify()) == 2
    memory.pipe_file("/bucket/store/shard-00004.arrow", content)
    assert store.stored([16]).shape == (1, 3, 16, 16)


def test_remote_mistakes(remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"memory://bucket/nothing/manifest.json cannot be read"):
        LatentStore.open("memory://bucket/nothing")
    with pytest.raises(UserError, match=r"nosuch://bucket/store cannot be opened"):
        LatentStore.open("nosuch://bucket/store")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDT_CACHE", str(tmp_path / "file"))
    store = LatentStore.open(remote)
    with pytest.raises(UserError, match="a file is in the way"):
        store.stored([0])


def test_a_full_cache(remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = LatentStore.open(remote)
    monkeypatch.setattr(shard_files, "sha256_file", full)
    with pytest.raises(UserError, match=r"shard-00000.arrow cannot be fetched: the disk of .* is full; make room, or"):
        store.stored([0])
    assert cached(tmp_path) == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDT_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.setenv("EDT_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "edt-diffusion"


def test_a_file_url_is_read_in_place(tmp_path: Path) -> None:
    files = open_files(f"file://{tmp_path}", keep=1)
    assert isinstance(files, LocalShards)
    assert files.folder == tmp_path
