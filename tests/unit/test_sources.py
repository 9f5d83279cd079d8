import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.data.images import open_images
from edt_diffusion.data.sources import EMPTY_CLASS, Source, StreamedSource, find_source, stable_key
from edt_diffusion.data.sources.base import PackedNames
from edt_diffusion.data.sources.labels import read_labels
from edt_diffusion.data.sources.storage import expand_pattern
from edt_diffusion.util.errors import UserError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))
    return path


def find(path: object, **options: object) -> Source:
    found = find_source(path, **options)  # pyright: ignore[reportArgumentType]
    assert isinstance(found, Source)
    return found


def keys(source: Source) -> list[str]:
    return [source.reader.key(row) for row in range(len(source.reader))]


def values(source: Source) -> list[int]:
    """The value of each picture, read through a copy of the reader that was pickled."""
    reader = pickle.loads(pickle.dumps(source.reader))
    found = []
    for row in range(len(reader)):
        with reader.open(row) as stream:
            found.append(int(np.asarray(Image.open(stream))[0, 0]))
    return found


def classes(source: Source) -> list[str]:
    """The class name of each row."""
    assert source.labels is not None
    assert source.class_names is not None
    assert source.labels.dtype == np.int64
    return [source.class_names[label] for label in source.labels]


def problems(source: Source) -> dict[str, str]:
    assert [problem.key for problem in source.problems] == sorted(problem.key for problem in source.problems)
    return {problem.key: problem.reason for problem in source.problems}


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- names and labels


def test_packed_names_are_the_names() -> None:
    names = ["a", "", "ü/\n.jpg", "b\udcff", "\ud800", "z" * 1000]
    packed = pickle.loads(pickle.dumps(PackedNames(names)))
    assert list(packed) == names
    assert packed[-1] == names[-1]
    assert packed[1:4] == names[1:4]
    with pytest.raises(IndexError):
        packed[6]
    assert list(PackedNames([])) == []


def test_keys_are_utf8_and_differ() -> None:
    names = ["ü\n.jpg", os.fsdecode(b"\xff.jpg"), r"\udcff.jpg", r"\\udcff.jpg", "\\"]
    got = [stable_key(name) for name in names]
    assert got == ["ü\n.jpg", r"\udcff.jpg", r"\\udcff.jpg", r"\\\\udcff.jpg", "\\\\"]
    for key in got:
        key.encode("utf-8")


def test_labels() -> None:
    labels, names = read_labels(["b", "a", "b"], None, "x")
    assert (labels.tolist(), names) == ([1, 0, 1], ["a", "b"])
    labels, names = read_labels([1, 3, 0], None, "x")
    assert (labels.tolist(), names) == ([1, 3, 0], ["0", "1", "2", "3"])
    labels, names = read_labels([2, 0], ["c", "a", "b"], "x")
    assert (labels.tolist(), names) == ([2, 0], ["c", "a", "b"])
    assert "x holds None in row 1: expected" in message_of(lambda: read_labels(["a", None], None, "x"))
    assert "x holds 3 in row 1: expected" in message_of(lambda: read_labels(["a", 3], None, "x"))
    assert "x holds 1.5 in the third" in message_of(lambda: read_labels([0, 1, 1.5], None, "x", lambda _: "the third"))
    assert "out of range, expected 0 to 1" in message_of(lambda: read_labels([0, 900], None, "x"))
    assert "for its 2 classes" in message_of(lambda: read_labels([0, 2], ["a", "b"], "x"))


# ------------------------------------------------------------------------------------------- folders


def test_nested_class_tree(tmp_path: Path) -> None:
    put(tmp_path / "b" / "x.png", 1)
    put(tmp_path / "b" / "deep" / "er" / "y.png", 2)
    put(tmp_path / "a-c" / "x.png", 3)
    put(tmp_path / "a" / "z.JPG", 4)
    put(tmp_path / "a" / "b" / "a.png", 5)
    source = find(tmp_path)
    assert keys(source) == ["a/b/a.png", "a/z.JPG", "a-c/x.png", "b/deep/er/y.png", "b/x.png"]
    assert source.class_names == ["a", "a-c", "b"]
    assert classes(source) == ["a", "a", "a-c", "b", "b"]
    assert values(source) == [5, 4, 3, 2, 1]
    assert source.reader.name(0) == str(tmp_path / "a" / "b" / "a.png")
    assert source.problems == []
    assert keys(find(f"file://{tmp_path}")) == keys(source)


def test_everything_that_is_no_row_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "root"
    put(root / "cat" / "1.png", 1)
    (root / "cat" / "text.jpg").write_text("text")  # a row: that it is damaged shows when it is decoded
    (root / "cat" / "notes.TXT").write_text("x")
    (root / "cat" / "noext").write_text("x")
    put(root / "cat" / ".hidden.png")
    put(root / "cat" / ".thumbs" / "1.png")
    (root / "cat" / "hollow").mkdir()
    (root / "cow").mkdir()
    (root / "docs").mkdir()
    (root / "docs" / "a.md").write_text("x")
    (root / "cat" / "loop").symlink_to(root, target_is_directory=True)
    (root / "cat" / "up").symlink_to(tmp_path, target_is_directory=True)
    (root / "cat" / "self.png").symlink_to("self.png")
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "cat" / "pipe.png")
    source = find(root)
    assert keys(source) == ["cat/1.png", "cat/text.jpg"]
    assert problems(source) == {
        "cat/.hidden.png": "hidden file",
        "cat/.thumbs": "hidden folder",
        "cat/gone.png": "dangling link",
        "cat/hollow": "empty folder",
        "cat/loop": "symlink loop: the folder lies in itself",
        "cat/noext": "not a picture file (no extension)",
        "cat/notes.TXT": "not a picture file (.txt)",
        "cat/pipe.png": "not a regular file",
        "cat/self.png": "symlink loop",
        "cat/up": "symlink loop: the folder lies in itself",
        "cow": EMPTY_CLASS,
        "docs": EMPTY_CLASS,
        "docs/a.md": "not a picture file (.md)",
    }
    assert source.class_names == ["cat"]
    assert "class folder 'cow' holds no pictures" in message_of(lambda: open_images(root, size=2))


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "1.png", 7)
    put(tmp_path / "root" / "dog" / "2.png", 8)
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "root" / "alias").symlink_to(tmp_path / "root" / "dog", target_is_directory=True)
    source = find(tmp_path / "root")
    assert keys(source) == ["alias/2.png", "cat/1.png", "dog/2.png"]
    assert values(source) == [8, 7, 8]
    assert source.problems == []


def test_odd_names(tmp_path: Path) -> None:
    names = [b"new\nline.png", "ünïcödé 猫.png".encode(), b"\xff\xfe.png", rb"\udcff\udcfe.png", b"a'b\"c.png"]
    folder = os.fsencode(tmp_path) + b"/cl\xe9ss"
    os.mkdir(folder)
    for value, name in enumerate(names):
        with open(folder + b"/" + name, "wb") as file:
            file.write(png(value))
    source = find(tmp_path)
    assert source.class_names == [r"cl\udce9ss"]
    found = dict(zip(keys(source), values(source), strict=True))
    assert found == {
        r"cl\udce9ss/" + name: value
        for value, name in enumerate(
            ["new\nline.png", "ünïcödé 猫.png", r"\udcff\udcfe.png", r"\\udcff\\udcfe.png", "a'b\"c.png"]
        )
    }
    json.dumps(list(found)).encode("utf-8")


def test_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "cat" / "secret" / "2.png")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    source = find(tmp_path)
    assert keys(source) == ["cat/1.png"]
    assert problems(source) == {"cat/secret": "folder that cannot be read: Permission denied"}
    assert "cannot be read: Permission denied" in message_of(lambda: find(tmp_path / "cat" / "secret"))


def test_vanished_picture_has_a_reason_without_a_path(tmp_path: Path) -> None:
    path = put(tmp_path / "a.png")
    source = find(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        source.reader.open(0)
    assert str(caught.value) == "No such file or directory"


def test_flat_folder(tmp_path: Path) -> None:
    put(tmp_path / "b.png", 2)
    put(tmp_path / "a.png", 1)
    (tmp_path / "notes").mkdir()
    source = find(tmp_path)
    assert (source.labels, source.class_names) == (None, None)
    assert values(source) == [1, 2]
    assert problems(source) == {"notes": "folder without pictures"}
    put(tmp_path / "dog" / "c.png")
    assert "beside folders of pictures ('dog')" in message_of(lambda: find(tmp_path))


def test_split_folders(tmp_path: Path) -> None:
    put(tmp_path / "train" / "cat" / "1.png", 1)
    put(tmp_path / "val" / "cat" / "2.png", 2)
    (tmp_path / "train" / "x.txt").write_text("")
    (tmp_path / "README.md").write_text("")
    message = message_of(lambda: find(tmp_path))
    assert "holds the folders of a split set (train, val), not of classes" in message
    assert f"did you mean {str(tmp_path / 'train')!r}?" in message
    assert message.endswith("name the split, 'train' for one (data.split, or --split of edt encode and edt data)")
    source = find(tmp_path, split="train")
    assert (keys(source), classes(source), values(source)) == (["cat/1.png"], ["cat"], [1])
    assert problems(source) == {"x.txt": "not a picture file (.txt)"}
    assert values(find(tmp_path, split="validation")) == values(find(tmp_path, split="val")) == [2]
    message = message_of(lambda: find(tmp_path, split="test"))
    assert "has no split 'test': it has train, val" in message
    assert message.endswith("; name one of them (data.split, or --split of edt encode and edt data)")
    message = message_of(lambda: find(tmp_path / "train", split="train"))
    assert "no split 'train': it has no folders" in message
    assert message.endswith("; leave the split out (data.split, or --split of edt encode and edt data)")


def test_folder_around_split_folders(tmp_path: Path) -> None:
    put(tmp_path / "pets" / "train" / "cat" / "1.png", 1)
    put(tmp_path / "pets" / "val" / "cat" / "2.png", 2)
    assert f"did you mean {str(tmp_path / 'pets' / 'train')!r}?" in message_of(lambda: find(tmp_path))
    assert classes(find(tmp_path, split="val")) == ["cat"]


def test_latent_store_is_not_a_source(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "edt-latents"}')
    assert "is a store of latents: expected pictures" in message_of(lambda: find(tmp_path))
    (tmp_path / "manifest.json").write_text("[]")
    assert "holds no pictures" in message_of(lambda: find(tmp_path))


# ------------------------------------------------------------------------------------------- metadata


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    put(tmp_path / "1.png", 1)
    put(tmp_path / "deep" / "2.png", 2)
    put(tmp_path / "unlisted.png", 3)
    put(tmp_path / ".dot.png", 4)
    (tmp_path / "5.dat").write_bytes(png(5))
    return tmp_path


def test_metadata_csv(listed: Path) -> None:
    (listed / "metadata.csv").write_text("file_name,label\ndeep/2.png,dog\n./1.png,cat\n.dot.png,dog\n5.dat,cat\n")
    source = find(listed)
    assert keys(source) == ["deep/2.png", "1.png", ".dot.png", "5.dat"]
    assert classes(source) == ["dog", "cat", "dog", "cat"]
    assert values(source) == [2, 1, 4, 5]
    assert problems(source) == {"unlisted.png": "not listed in metadata.csv"}


def test_metadata_labels_of_csv_are_integers_if_all_are(listed: Path) -> None:
    def names(*labels: str) -> list[str] | None:
        (listed / "metadata.csv").write_text(f"file_name,label\n1.png,{labels[0]}\ndeep/2.png,{labels[1]}\n")
        return find(listed).class_names

    assert names("0", "2") == ["0", "1", "2"]
    assert names("00", "02") == ["00", "02"]
    assert names("0", "b") == ["0", "b"]
    assert "out of range" in message_of(lambda: names("0", "99"))
    assert "holds None in row 1 ('deep/2.png')" in message_of(lambda: names("0", ""))


def test_metadata_jsonl_with_absent_and_outside_files(listed: Path) -> None:
    rows = [
        {"file_name": "1.png", "kind": 1},
        {"file_name": "absent.png", "kind": 0},
        {"file_name": "../outside.png", "kind": 0},
        {"file_name": "/etc/hostname", "kind": 0},
    ]
    (listed / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    source = find(listed, label_column="kind")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 0, 0]
    with source.reader.open(0) as stream:
        assert stream.read() == png(1)
    with pytest.raises(FileNotFoundError, match=r"^No such file or directory$"):
        source.reader.open(1)
    for row in (2, 3):
        with pytest.raises(ValueError, match="leads out of the folder"):
            source.reader.open(row)
    assert problems(source)["deep/2.png"] == "not listed in metadata.jsonl"
    assert find(listed, label_column=None).labels is None
    message = message_of(lambda: find(listed, label_column="kin"))
    assert "has no column 'kin': it has file_name, kind; set data.label_column (or --label-column of " in message
    assert "to null (on the command line: none) to read no labels" in message
    assert message.endswith("(did you mean 'kind'?)")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metadata.csv", "", "lists no pictures"),
        ("metadata.csv", "file_name,label\n", "lists no pictures"),
        ("metadata.csv", "file,label\n1.png,x\n", "has no column 'file_name': it has file, label"),
        ("metadata.csv", 'file_name,label\n"1.png"x,"y\n', "is not a table in CSV"),
        ("metadata.csv", "file_name,label\n,x\n", "names no file in row 0"),
        ("metadata.jsonl", '{"file_name": "1.png"}\n{"file', "is not JSON in line 2"),
        ("metadata.jsonl", "[1]", "no JSON object in line 1"),
    ],
)
def test_metadata_that_cannot_be_used(listed: Path, name: str, text: str, expected: str) -> None:
    (listed / name).write_text(text)
    assert expected in message_of(lambda: find(listed))


def test_metadata_with_names_that_are_no_text(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(png(9))
    (tmp_path / "new\nline.png").write_bytes(png(8))
    (tmp_path / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,label\r\n\xff.png,\xe9\r\n"new\nline.png",b\r\n')
    source = find(tmp_path)
    assert values(source) == [9, 8]
    assert classes(source) == [r"\udce9", "b"]
    assert source.problems == []


# ------------------------------------------------------------------------------------------- archives


def tar_of(path: Path, members: dict[str, bytes], **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_index_equals_extraction(tmp_path: Path, form: int) -> None:
    long = "c/" + "x" * (90 if form == tarfile.USTAR_FORMAT else 300) + ".png"
    members = {f"a/{i}.png": png(i) + bytes(i * 97) for i in range(30)} | {"b/ü.png": png(99), long: png(77)}
    path = tar_of(tmp_path / "x.tar", members, format=form)
    source = find(path)
    with tarfile.open(path) as tar:
        for row in range(len(source.reader)):
            extracted = tar.extractfile(source.reader.key(row).removeprefix("x.tar/"))
            assert extracted is not None
            with source.reader.open(row) as stream:
                assert stream.read() == extracted.read()
    assert len(source.reader) == 32
    assert classes(source) == ["a"] * 30 + ["b", "c"]
    assert source.problems == []
    assert values(source) == [*range(30), 99, 77]
    assert source.reader.name(0) == f"{path}/a/0.png"


def test_tar_written_by_tar(tmp_path: Path) -> None:
    put(tmp_path / "pets" / "cat" / "1.png", 1)
    put(tmp_path / "pets" / "dog" / "2.png", 2)
    (tmp_path / "pets" / "notes.txt").write_text("x")
    (tmp_path / "pets" / "dog" / "hard.png").hardlink_to(tmp_path / "pets" / "dog" / "2.png")
    (tmp_path / "pets" / "dog" / "soft.png").symlink_to("../cat/1.png")
    (tmp_path / "pets" / "dog" / "gone.png").symlink_to("nothing.png")
    subprocess.run(["tar", "--sort=name", "-cf", "pets.tar", "./pets"], cwd=tmp_path, check=True)
    source = find(tmp_path / "pets.tar")
    found = {key: (name, value) for key, name, value in zip(keys(source), classes(source), values(source), strict=True)}
    assert found == {
        "pets.tar/pets/cat/1.png": ("cat", 1),
        "pets.tar/pets/dog/2.png": ("dog", 2),
        "pets.tar/pets/dog/hard.png": ("dog", 2),
        "pets.tar/pets/dog/soft.png": ("dog", 1),
    }
    assert problems(source) == {
        "pets.tar/pets/dog/gone.png": "a link to nothing in the archive",
        "pets.tar/pets/notes.txt": "not a picture file (.txt)",
    }


def test_splits_in_a_tar(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {"s/train/a/1.png": png(1), "s/val/a/2.png": png(2), "s/val/b/3.png": png(3)})
    message = message_of(lambda: find(path))
    assert "folders of a split set (train, val)" in message
    assert "did you mean" not in message
    assert classes(find(path, split="validation")) == ["a", "b"]
    assert "no split 'test'" in message_of(lambda: find(path, split="test"))


def test_webdataset_with_cls(tmp_path: Path) -> None:
    tar_of(
        tmp_path / "wds-1.tar",
        {"d/0003.webp": png(3), "d/0003.cls": b" 0\n", "lost.cls": b"1", ".h.png": b"", "0004.cls": b"1"},
    )
    tar_of(
        tmp_path / "wds-0.tar",
        {
            "0001.jpg": png(1),
            "0001.cls": b"2",
            "0001.txt": b"a caption",
            "0002.mask.png": png(20),
            "0002.cls": b"0",
            "0002.png": png(2),
        },
    )
    put(tmp_path / "sample.png")
    (tmp_path / "README.md").write_text("")
    source = find(tmp_path)
    assert keys(source) == ["wds-0.tar/0001.jpg", "wds-0.tar/0002.png", "wds-1.tar/d/0003.webp"]
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 0]
    assert values(source) == [1, 2, 3]
    assert problems(source) == {
        "README.md": "not a picture file (.md)",
        "sample.png": "a picture beside tar files",
        "wds-0.tar/0002.mask.png": "a second picture of one sample, beside '0002.png'",
        "wds-1.tar/.h.png": "hidden file",
        "wds-1.tar/0004": "a sample without a picture (only cls)",
        "wds-1.tar/lost": "a sample without a picture (only cls)",
    }
    assert find(tmp_path, label_column=None).labels is None
    message = message_of(lambda: find(tmp_path, split="train"))
    assert "its samples are not split; leave the split (data.split, or --split of " in message
    for pattern in ("wds-{0..1}.tar", "wds-{0,1}.tar", "wds-*.tar", "wds-?.tar"):
        assert keys(find(tmp_path / pattern)) == keys(source)
    (tmp_path / "wds-1.tar").rename(tmp_path / "wds[1]-1.tar")
    assert values(find(tmp_path / "wds[1]-*.tar")) == [3]
    assert "wds-1.tar' does not exist" in message_of(lambda: find(tmp_path / "wds-{0..1}.tar"))


def test_webdataset_with_json(tmp_path: Path) -> None:
    def shard(*notes: bytes) -> Path:
        members = {}
        for number, note in enumerate(notes):
            members |= {f"{number}.jpg": png(number), f"{number}.json": note}
        return tar_of(tmp_path / "x.tar", members)

    assert classes(find(shard(b'{"label": "b"}', b'{"label": "a"}'))) == ["b", "a"]
    assert classes(find(shard(b'{"label": 1}', b'{"label": 0}'))) == ["1", "0"]
    assert classes(find(shard(b'{"kind": "b"}', b'{"kind": "a"}'), label_column="kind")) == ["b", "a"]
    assert find(shard(b'{"caption": "b"}', b"{}")).labels is None
    path = shard(b'{"label": "b"}', b"{}")
    assert "holds None in 'x.tar/1.jpg'" in message_of(lambda: find(path))
    assert "'x.tar/0.jpg' has a .json that is not JSON" in message_of(lambda: find(shard(b"{", b"{}")))


def test_shards_of_several_splits(tmp_path: Path) -> None:
    tar_of(tmp_path / "train-0.tar", {"a/1.png": png(1)})
    tar_of(tmp_path / "train-1.tar", {"b/1.png": png(2)})
    tar_of(tmp_path / "test-0.tar", {"a/1.png": png(3)})
    assert "several splits" in message_of(lambda: find(tmp_path))
    source = find(tmp_path, split="train")
    assert keys(source) == ["train-0.tar/a/1.png", "train-1.tar/b/1.png"]
    assert (values(source), classes(source)) == ([1, 2], ["a", "b"])


def test_damaged_tars(tmp_path: Path) -> None:
    members = {f"a/{i}.png": png(i) + bytes(3000) for i in range(5)}
    path = tar_of(tmp_path / "x.tar", members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmember("a/2.png")
    path.write_bytes(whole[: third.offset_data + 100])  # cut off inside a picture
    source = find(path)
    assert len(source.reader) == 3
    (reason,) = problems(source).values()
    assert reason.startswith("damaged archive: what lies behind byte")
    with pytest.raises(OSError, match=rf"^the archive ends {third.size - 100} bytes before the end of the picture$"):
        source.reader.open(2)
    path.write_bytes(whole[: third.offset])  # cut off between two
    assert problems(find(path)) == {"x.tar": "the archive has no end mark: it may have been cut off"}
    path.write_bytes(whole[: third.offset] + b"\x07" * 512 + whole[third.offset + 512 :])  # a header overwritten
    source = find(path)
    assert len(source.reader) == 2
    assert problems(source) == {"x.tar": f"damaged archive: what lies behind byte {third.offset} is lost"}
    path.write_bytes(b"hello" * 1000)
    assert "cannot be read as a tar" in message_of(lambda: find(path))
    path.write_bytes(b"")
    assert "cannot be read as a tar" in message_of(lambda: find(path))


def test_member_that_is_replaced(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {"a/1.png": png(1), "b/2.png": png(2)})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a/1.png")
        info.size = len(png(9))
        tar.addfile(info, io.BytesIO(png(9)))
    source = find(path)
    assert (keys(source), values(source)) == (["x.tar/b/2.png", "x.tar/a/1.png"], [2, 9])
    assert problems(source) == {"x.tar/a/1.png": "replaced by a later member of the same name"}


def test_tar_beside_what_it_held(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png", 1)
    tar_of(tmp_path / "cats.tar", {"cat/1.png": png(1)})
    source = find(tmp_path)
    assert keys(source) == ["cat/1.png"]
    assert problems(source) == {"cats.tar": "not a picture file (.tar)"}


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    for name in ("x.tar.gz", "x.tgz", "x.7z"):
        (tmp_path / name).write_bytes(b"x")
        assert "is compressed" in message_of(lambda name=name: find(tmp_path / name))
        assert "unpack it first" in message_of(lambda name=name: find(tmp_path / name))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.mkdir("pets")
        for value, name in enumerate(["pets/cat/1.png", "pets/cat/ü/2.png", "pets/dog/3.png"]):
            archive.writestr(name, png(value))
        archive.writestr("pets/dog/notes.txt", "x")
    source = find(tmp_path / "x.zip")
    assert keys(source) == ["cat/1.png", "cat/ü/2.png", "dog/3.png"]
    assert classes(source) == ["cat", "cat", "dog"]
    assert values(source) == [0, 1, 2]
    assert problems(source) == {"dog/notes.txt": "not a picture file (.txt)"}
    (tmp_path / "y.zip").write_bytes(b"hello")
    assert "cannot be read as a zip" in message_of(lambda: find(tmp_path / "y.zip"))


def test_patterns() -> None:
    assert expand_pattern("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_pattern("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expand_pattern("plain") == ["plain"]
    assert "expected the lower number first" in message_of(lambda: expand_pattern("{3..1}"))


# ------------------------------------------------------------------------------------------- other


def test_built_in_digits() -> None:
    pytest.importorskip("sklearn")
    source = find("digits")
    assert len(source.reader) == 1797
    assert source.reader.key(3) == "row 3"
    assert source.class_names == list("0123456789")
    message = message_of(lambda: find("digits", split="train"))
    assert "a built-in set is not split; leave the split (data.split, or --split of " in message


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    assert "is empty" in message_of(lambda: find(""))
    for name in ("x" * 5000 + "/y/z", "~nobody-here/x/y", "a\0b/c/d", str(tmp_path / "a" / "b")):
        assert "does not exist: expected a folder of pictures" in message_of(lambda name=name: find(name))


def test_stream_cannot_be_trained_from(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StreamedSource("hub dataset 'x'", lambda start: iter(()), labelled=False)
    monkeypatch.setattr("edt_diffusion.data.images.find_source", lambda *_, **__: stream)
    assert "a stream cannot be trained from directly: encode it first with edt encode" in message_of(
        lambda: open_images("x", size=4)
    )


def test_folders_need_no_datasets() -> None:
    code = "import sys, edt_diffusion.data.sources; print([m for m in ('datasets', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
