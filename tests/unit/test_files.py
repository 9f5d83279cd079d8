import os
import stat
from pathlib import Path

import pytest

from edt_diffusion.util.errors import UserError
from edt_diffusion.util.files import (
    atomic_directory,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    sha256_file,
)
from edt_diffusion.util.lookup import lookup, nearest


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_makes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    atomic_write_bytes(target, b"\x00\r\nold and longer")
    assert target.read_bytes() == b"\x00\r\nold and longer"
    atomic_write_bytes(str(target), b"new")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_text_is_utf8_with_its_own_line_ends(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "t", "é\r\nx\n")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa9\r\nx\n"


def test_json_bytes(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "j", {"b": [1, None], "a": "é"})
    assert (tmp_path / "j").read_bytes() == b'{\n  "b": [\n    1,\n    null\n  ],\n  "a": "\xc3\xa9"\n}\n'


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ValueError), (object(), TypeError)])
def test_json_refuses_what_is_not_json_and_keeps_the_old_file(tmp_path: Path, value: object, error: type) -> None:
    target = tmp_path / "j"
    target.write_text("old")
    with pytest.raises(error):
        atomic_write_json(target, {"x": value})
    assert target.read_text() == "old"
    assert names(tmp_path) == ["j"]


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, when, fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_bytes(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_content_is_on_the_disk_before_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        assert Path(source).read_bytes() == b"new"
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    atomic_write_bytes(tmp_path / "a", b"new")
    assert events == ["file", "rename", "folder"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_bytes(tmp_path / "a", b"")
        with atomic_directory(tmp_path / "d"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


def test_directory_appears_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[int] = set()
    fsync = os.fsync

    def recorded_fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        assert folder.parent == tmp_path
        (folder / "sub").mkdir()
        (folder / "sub" / "w").write_text("weights")
        (folder / "config").write_text("c")
        assert not target.exists()
    assert (target / "sub" / "w").read_text() == "weights"
    assert names(tmp_path) == ["model"]
    inside = {path.stat().st_ino for path in [tmp_path, target, *target.rglob("*")]}
    assert len(inside) == 5
    assert inside <= flushed


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_directory_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_directory(tmp_path / "d") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_directory_that_exists(tmp_path: Path) -> None:
    target = tmp_path / "d"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(FileExistsError), atomic_directory(target):
        pytest.fail("the block must not run")
    assert names(target) == ["old"]
    with pytest.raises(RuntimeError), atomic_directory(target, replace=True):
        raise RuntimeError
    assert names(target) == ["old"]
    with atomic_directory(target, replace=True) as folder:
        (folder / "new").write_text("y")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["d"]


def test_sha256_of_the_standards_example(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected


def test_lookup() -> None:
    table = {"center": 1, "resize": 2}
    assert lookup(table, "resize", "crop") == 2
    with pytest.raises(UserError) as caught:
        lookup(table, "Centre", "crop")
    assert str(caught.value) == "unknown crop 'Centre': expected one of center, resize (did you mean 'center'?)"
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        lookup(table, "xyz", "crop")
    assert str(caught.value) == "unknown crop 'xyz': expected one of center, resize"


def test_nearest() -> None:
    assert nearest("edt-s", ["EDT-S", "EDT-XL"]) == "EDT-S"
    assert nearest("qqq", ["EDT-S"]) is None
    assert nearest("x", []) is None
