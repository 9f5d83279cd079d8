import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.data.sources import Reader, Row, Source, StreamedSource, find_source
from edt_diffusion.util.errors import UserError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

NAMES = ["b", "a", "c"]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "PNG")
    return buffer.getvalue()


def value_of(data: bytes) -> int:
    return int(np.asarray(Image.open(io.BytesIO(data)))[0, 0])


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
            found.append(value_of(stream.read()))
    return found


def labels(source: Source) -> list[int]:
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    return source.labels.tolist()


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def dataset(*rows: tuple[int, int], first: int = 0) -> "datasets.Dataset":
    """One row per (value, label), with named classes."""
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": png(value), "path": None} for value, _ in rows],
            "extra": ["x"] * len(rows),
            "label": [label for _, label in rows],
        },
        features=datasets.Features(
            {"image": datasets.Image(), "extra": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)}
        ),
    )


def as_parquet(path: Path, *rows: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(*rows).to_parquet(path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hf-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def memory() -> Iterator[Callable[[str, bytes], None]]:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield lambda name, data: fs.pipe_file(f"/bucket/{name}", data)
    fs.store.clear()


# ------------------------------------------------------------------------------------------- Parquet


def test_parquet_shards(tmp_path: Path) -> None:
    as_parquet(tmp_path / "train-00001-of-00002.parquet", (3, 0))
    as_parquet(tmp_path / "train-00000-of-00002.parquet", (1, 2), (2, 1))
    as_parquet(tmp_path / "test-00000-of-00001.parquet", (9, 1))
    (tmp_path / "README.md").write_text("")
    (tmp_path / "cover.png").write_bytes(png(0))
    message = message_of(lambda: find(tmp_path))
    assert "files of several splits" in message
    assert "name the split (data.split, or --split of edt encode and edt data), or give one file" in message
    source = find(tmp_path, split="train")
    first, second = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"
    assert keys(source) == [f"{first} row 0", f"{first} row 1", f"{second} row 0"]
    assert values(source) == [1, 2, 3]
    assert labels(source) == [2, 1, 0]
    assert source.class_names == NAMES
    assert source.reader.name(2) == f"{tmp_path} {second} row 0"
    assert [(problem.key, problem.reason) for problem in source.problems] == [
        ("README.md", "not a picture file (.md)"),
        ("cover.png", "a picture beside Parquet or Arrow files"),
    ]
    assert values(find(tmp_path, split="test")) == [9]
    message = message_of(lambda: find(tmp_path, split="val"))
    assert "no split 'val': it has test, train; name one of them, or leave the split out (data.split, or " in message
    single = find(tmp_path / first)
    assert keys(single) == [f"{first} row 0", f"{first} row 1"]
    assert single.reader.name(1) == f"{tmp_path / first} row 1"
    assert values(find(tmp_path / "train-0000{0..1}-of-00002.parquet")) == [1, 2, 3]


def test_parquet_in_split_folders(tmp_path: Path) -> None:
    as_parquet(tmp_path / "train" / "0.parquet", (1, 0))
    as_parquet(tmp_path / "test" / "0.parquet", (2, 0))
    assert "folders of a split set (test, train)" in message_of(lambda: find(tmp_path))
    assert values(find(tmp_path, split="test")) == [2]


def test_large_parquet_is_mapped_from_a_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_parquet(tmp_path / "d" / "a[1].parquet", (1, 2), (2, 1))
    as_parquet(tmp_path / "d" / "b.parquet", (3, 0))
    small = find(tmp_path / "d")
    assert not cache.exists()
    monkeypatch.setattr("edt_diffusion.data.sources.table_files._IN_MEMORY_BYTES", 10)
    source = find(tmp_path / "d")
    assert list(cache.rglob("*.arrow"))
    assert (keys(source), values(source), labels(source)) == (keys(small), [1, 2, 3], [2, 1, 0])
    assert source.class_names == NAMES
    # The copy names the file on disk; it does not carry the pictures.
    assert png(1) not in pickle.dumps(source.reader)
    assert png(1) in pickle.dumps(small.reader)


def test_path_in_a_foreign_parquet_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(7))
    table = pyarrow.table(
        {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": png(1), "path": "x"}]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    source = find(tmp_path / "x.parquet", label_column=None)
    with pytest.raises(ValueError, match="a path alone is not followed"):
        source.reader.open(0)
    with source.reader.open(1) as stream:
        assert value_of(stream.read()) == 1


def test_extra_columns_may_differ(tmp_path: Path) -> None:
    write = pyarrow.parquet.write_table
    write(pyarrow.table({"image": [png(1)], "label": ["a"], "x": [1]}), tmp_path / "0.parquet")
    write(pyarrow.table({"image": [png(2)], "label": ["b"], "y": ["t"]}), tmp_path / "1.parquet")
    source = find(tmp_path)
    assert (values(source), labels(source), source.class_names) == ([1, 2], [0, 1], ["a", "b"])
    write(pyarrow.table({"image": [png(2)]}), tmp_path / "1.parquet")
    assert "1.parquet' has no column 'label'" in message_of(lambda: find(tmp_path))


def test_tables_of_pictures_alone_are_unlabelled(tmp_path: Path, hub: dict[str, Path]) -> None:
    table = pyarrow.table({"image": [png(1), png(2)]})
    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "p" / "train-0.parquet")
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    hub["user/set"] = tmp_path / "p"
    for path in (tmp_path / "p", tmp_path / "x.arrow", tmp_path / "saved", "user/set"):
        source = find(path)
        assert (values(source), source.labels, source.class_names) == ([1, 2], None, None)
        # Labels that were asked for by name must be there.
        assert "has no column 'kind': it has image" in message_of(lambda path=path: find(path, label_column="kind"))
    stream = find_source("user/set", streaming=True)
    assert isinstance(stream, StreamedSource)
    assert not stream.labelled
    assert [row.label for row in stream.rows()] == [None, None]


@pytest.mark.parametrize("labelled_first", [False, True])
def test_a_column_beside_the_pictures_in_any_file_asks_for_labels(tmp_path: Path, labelled_first: bool) -> None:
    write = pyarrow.parquet.write_table
    tables = [pyarrow.table({"image": [png(1)]}), pyarrow.table({"image": [png(2)], "label": ["a"]})]
    for number, table in enumerate(reversed(tables) if labelled_first else tables):
        write(table, tmp_path / f"{number}.parquet")
    assert "has no column 'label': it has image;" in message_of(lambda: find(tmp_path))
    write(pyarrow.table({"image": [png(1)], "kind": ["a"]}), tmp_path / "one.parquet")
    assert "it has image, kind; set data.label_column" in message_of(lambda: find(tmp_path / "one.parquet"))


# ------------------------------------------------------------------------------------------- Arrow and saved folders


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow(tmp_path: Path, form: str) -> None:
    for number, rows in enumerate([[(1, 2), (2, 1)], [(3, 0)]]):
        table = dataset(*rows).data.table
        new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
        with new(str(tmp_path / f"{number}.arrow"), table.schema) as writer:
            writer.write_table(table)
    source = find(tmp_path)
    assert keys(source) == ["0.arrow row 0", "0.arrow row 1", "1.arrow row 0"]
    assert (values(source), labels(source), source.class_names) == ([1, 2, 3], [2, 1, 0], NAMES)
    assert png(1) not in pickle.dumps(source.reader)
    as_parquet(tmp_path / "x.parquet", (1, 1))
    assert "both Parquet and Arrow files" in message_of(lambda: find(tmp_path))
    (tmp_path / "0.arrow").write_text("hello")
    assert "cannot be read as Arrow" in message_of(lambda: find(tmp_path / "0.arrow"))
    (tmp_path / "0.arrow").write_bytes(b"")
    assert "cannot be read as Arrow" in message_of(lambda: find(tmp_path / "0.arrow"))


def test_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "7.png").write_bytes(png(7))
    whole = dataset((1, 2), (2, 1), (3, 0))
    whole.save_to_disk(tmp_path / "one")
    source = find(tmp_path / "one")
    assert (values(source), labels(source), source.class_names) == ([1, 2, 3], [2, 1, 0], NAMES)
    assert keys(source) == ["row 0", "row 1", "row 2"]
    assert png(1) not in pickle.dumps(source.reader)
    assert "was saved without splits; leave the split (data.split, or --split of " in message_of(
        lambda: find(tmp_path / "one", split="train")
    )
    assert "has no column 'labels'" in message_of(lambda: find(tmp_path / "one", label_column="labels"))

    whole.select([2, 0]).save_to_disk(tmp_path / "some")
    assert values(find(tmp_path / "some")) == [3, 1]

    files = datasets.Dataset.from_dict({"image": [str(tmp_path / "7.png")]})
    files.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "paths")
    (tmp_path / "7.png").unlink()
    assert values(find(tmp_path / "paths", label_column=None)) == [7]


def test_saved_splits(tmp_path: Path) -> None:
    parts = {"train": dataset((1, 2), (2, 1)), "test": dataset((3, 0))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert "holds several splits: it has train, test" in message_of(lambda: find(tmp_path / "two"))
    assert values(find(tmp_path / "two", split="test")) == [3]
    message = message_of(lambda: find(tmp_path / "two", split="val"))
    assert "has no split 'val': it has train, test; name one of them (data.split, or --split of " in message
    datasets.DatasetDict({"all": parts["train"]}).save_to_disk(tmp_path / "single")
    assert values(find(tmp_path / "single")) == [1, 2]
    (tmp_path / "single" / "all" / "state.json").write_text("{")
    assert "cannot be read as a saved dataset" in message_of(lambda: find(tmp_path / "single"))


# ------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A hub that holds the sets in the dictionary: name -> folder of Parquet files named after splits."""
    held: dict[str, Path] = {}
    real = datasets.load_dataset

    def load_dataset(name: str, *, split: str, streaming: bool = False, **options: object) -> object:
        if name not in held:
            return real(name, split=split, streaming=streaming, **options)
        files = {file.stem.split("-")[0]: str(file) for file in held[name].glob("*.parquet")}
        return real("parquet", data_files=files, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


def test_hub_name(tmp_path: Path, hub: dict[str, Path]) -> None:
    as_parquet(tmp_path / "h" / "train-0.parquet", (1, 2), (2, 1))
    as_parquet(tmp_path / "h" / "test-0.parquet", (3, 0))
    hub["user/set"] = hub["other-user/set"] = tmp_path / "h"
    for name in hub:
        source = find(name)
        assert (values(source), labels(source), source.class_names) == ([1, 2], [2, 1], NAMES)
        assert source.description == f"hub dataset {name!r}, split 'train'"
        assert source.reader.name(1) == f"{name} row 1"
    assert values(find("user/set", split="test")) == [3]
    assert values(find("user/set", split="train[1:]")) == [2]
    assert "has no column 'img'" in message_of(lambda: find("user/set", image_column="img"))
    message = message_of(lambda: find("user/set", split="dev"))
    assert "could not be loaded from the Hugging Face hub" in message
    assert "dev" in message


def test_downloaded_files_of_a_hub_set_are_read_by_path(tmp_path: Path, hub: dict[str, Path]) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "7.png").write_bytes(png(7))
    pictures = [{"bytes": None, "path": str(tmp_path / name)} for name in ("7.png", "gone.png")]
    features = datasets.Features({"image": datasets.Image()})
    made = datasets.Dataset.from_dict({"image": pictures}, features=features)
    pyarrow.parquet.write_table(made.data.table, tmp_path / "h" / "train-0.parquet")
    hub["user/set"] = tmp_path / "h"
    reader = find("user/set", label_column=None).reader
    with reader.open(0) as stream:
        assert value_of(stream.read()) == 7
    with pytest.raises(FileNotFoundError, match=r"^No such file or directory$"):
        reader.open(1)


def test_unknown_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    message = message_of(lambda: find("nobody/nothing"))
    assert message.startswith("'nobody/nothing' does not exist here, and could not be loaded from the Hugging Face hub")
    for typo in ("pet", "pets/cat"):  # a name here with a typo in it does not ask the network
        assert message_of(lambda typo=typo: find(typo)).startswith(f"{typo!r} does not exist: expected a folder")
    assert "(did you mean 'pets'?)" in message_of(lambda: find("pet"))
    assert "could not be loaded" in message_of(lambda: find("nobody/nothing", streaming=True))
    assert "does not exist: expected a folder" in message_of(lambda: find("a/b/c"))


def test_hub_stream(tmp_path: Path, hub: dict[str, Path]) -> None:
    rows = [(i, i % 3) for i in range(10)]
    as_parquet(tmp_path / "h" / "train-0.parquet", *rows)
    hub["user/set"] = tmp_path / "h"
    source = find_source("user/set", streaming=True)
    assert isinstance(source, StreamedSource)
    assert (source.labelled, source.class_names) == (True, NAMES)
    assert source.length in (None, 10)
    expected = [Row(f"row {i}", png(i), i % 3) for i in range(10)]
    assert list(source.rows(0)) == expected
    assert list(source.rows(7)) == expected[7:]
    assert list(pickle.loads(pickle.dumps(source)).rows(9)) == expected[9:]
    assert list(source.rows(10)) == []
    unlabelled = find_source("user/set", streaming=True, label_column=None)
    assert isinstance(unlabelled, StreamedSource)
    assert (unlabelled.labelled, unlabelled.class_names) == (False, None)
    assert next(iter(unlabelled.rows(3))) == Row("row 3", png(3))


def test_rows_of_a_stream_that_cannot_be_used(tmp_path: Path, hub: dict[str, Path]) -> None:
    (tmp_path / "h").mkdir()
    (tmp_path / "7.png").write_bytes(png(7))
    pictures = [
        {"bytes": png(1), "path": None},
        {"bytes": None, "path": str(tmp_path / "7.png")},
        {"bytes": None, "path": str(tmp_path / "gone.png")},
        None,
        {"bytes": png(2), "path": None},
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    made = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 1, 1, None]}, features=features)
    pyarrow.parquet.write_table(made.data.table, tmp_path / "h" / "train-0.parquet")
    hub["user/set"] = tmp_path / "h"
    source = find_source("user/set", streaming=True)
    assert isinstance(source, StreamedSource)
    got = list(source.rows(0))
    assert got[:2] == [Row("row 0", png(1), 0), Row("row 1", png(7), 1)]
    assert [row.data for row in got[2:]] == [None, None, None]
    assert got[2].error == "the file does not exist"
    assert got[3].error is not None
    assert got[3].error.startswith("the row holds no encoded picture")
    assert got[4].error == "its label is None: expected 0 to 2"


def test_stream_without_class_names(tmp_path: Path, hub: dict[str, Path]) -> None:
    (tmp_path / "h").mkdir()
    table = pyarrow.table({"image": [png(1)], "label": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "h" / "train-0.parquet")
    hub["user/set"] = tmp_path / "h"
    message = message_of(lambda: find_source("user/set", streaming=True))
    assert "does not name its classes, and a stream's must be known at its start" in message
    assert message.endswith("data.label_column=null (or --label-column none of edt encode and edt data)")


# ------------------------------------------------------------------------------------------- URLs


def test_tree_behind_a_url(memory: Callable[[str, bytes], None]) -> None:
    for value, name in enumerate(["a/1.png", "a/deep/2.png", "b/ü\n 3.png"]):
        memory(f"root/{name}", png(value))
    memory("root/a/.hidden.png", b"x")
    memory("root/.git/x.png", b"x")
    memory("root/notes.txt", b"x")
    source = find("memory://bucket/root")
    assert keys(source) == ["a/1.png", "a/deep/2.png", "b/ü\n 3.png"]
    assert labels(source) == [0, 0, 1]
    assert source.class_names == ["a", "b"]
    assert values(source) == [0, 1, 2]
    assert source.reader.name(0) == "memory://bucket/root/a/1.png"
    assert {problem.key: problem.reason for problem in source.problems} == {
        ".git": "hidden folder",
        "a/.hidden.png": "hidden file",
        "notes.txt": "not a picture file (.txt)",
    }
    assert values(find("memory://bucket/root/")) == [0, 1, 2]
    assert values(find("memory://bucket/root/a/deep")) == [1]


def test_splits_and_metadata_behind_a_url(memory: Callable[[str, bytes], None]) -> None:
    memory("m/train/1.png", png(1))
    memory("m/train/2.png", png(2))
    memory("m/train/metadata.jsonl", b'{"file_name": "2.png", "label": "x"}\n{"file_name": "gone.png", "label": "y"}')
    memory("m/test/a/1.png", png(3))
    assert "did you mean 'memory://bucket/m/train'?" in message_of(lambda: find("memory://bucket/m"))
    source = find("memory://bucket/m", split="train")
    assert keys(source) == ["2.png", "gone.png"]
    assert source.class_names == ["x", "y"]
    assert source.reader.name(0) == "memory://bucket/m/train/2.png"
    with source.reader.open(0) as stream:
        assert value_of(stream.read()) == 2
    with pytest.raises(FileNotFoundError, match=r"^No such file or directory$"):
        source.reader.open(1)
    assert [problem.key for problem in source.problems] == ["1.png"]


def test_tables_behind_a_url(
    tmp_path: Path, memory: Callable[[str, bytes], None], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory("p/train-0.parquet", as_parquet(tmp_path / "0.parquet", (1, 2), (2, 1)).read_bytes())
    memory("p/train-1.parquet", as_parquet(tmp_path / "1.parquet", (3, 0)).read_bytes())
    source = find("memory://bucket/p")
    assert (values(source), labels(source), source.class_names) == ([1, 2, 3], [2, 1, 0], NAMES)
    assert source.reader.key(2) == "train-1.parquet row 0"
    assert values(find("memory://bucket/p/train-1.parquet")) == [3]
    assert values(find("memory://bucket/p/train-{0..1}.parquet")) == [1, 2, 3]
    assert values(find("memory://bucket/p/*-1.parquet")) == [3]
    stream = find_source("memory://bucket/p", streaming=True)
    assert isinstance(stream, StreamedSource)
    assert [value_of(row.data or b"") for row in stream.rows(1)] == [2, 3]
    dataset((4, 1)).save_to_disk("memory://bucket/saved")
    assert values(find("memory://bucket/saved")) == [4]
    sink = io.BytesIO()
    table = dataset((5, 1)).data.table
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    memory("arrow/x.arrow", sink.getvalue())
    assert values(find("memory://bucket/arrow/x.arrow")) == [5]
    monkeypatch.setattr("edt_diffusion.data.sources.table_files._IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # offline, it would not read any URL
    source = find("memory://bucket/p")
    assert (values(source), labels(source), source.class_names) == ([1, 2, 3], [2, 1, 0], NAMES)
    assert png(1) not in pickle.dumps(source.reader)


def test_tars_and_zips_behind_a_url(tmp_path: Path, memory: Callable[[str, bytes], None]) -> None:
    import zipfile

    for shard in range(2):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for number in range(3):
                for name, data in ((f"{number}.jpg", png(10 * shard + number)), (f"{number}.cls", b"%d" % shard)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        memory(f"w/s-{shard}.tar", (tmp_path / "x.tar").read_bytes())
    for url in ("memory://bucket/w", "memory://bucket/w/s-{0..1}.tar", "memory://bucket/w/*.tar"):
        source = find(url)
        assert values(source) == [0, 1, 2, 10, 11, 12]
        assert labels(source) == [0, 0, 0, 1, 1, 1]
        assert source.reader.key(3) == "s-1.tar/0.jpg"
        assert source.reader.name(3).replace(":///", "://") == "memory://bucket/w/s-1.tar/0.jpg"
    assert values(find("memory://bucket/w/s-1.tar")) == [10, 11, 12]
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a/1.png", png(1))
    memory("z/x.zip", sink.getvalue())
    assert values(find("memory://bucket/z/x.zip")) == [1]
    assert "compressed" in message_of(lambda: (memory("t/x.tar.gz", b""), find("memory://bucket/t/x.tar.gz")))


def test_urls_that_cannot_be_opened(memory: Callable[[str, bytes], None], monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.core

    assert "does not exist or is empty" in message_of(lambda: find("memory://bucket/nothing"))
    assert "does not exist or is empty" in message_of(lambda: find("memory://bucket/nothing.parquet"))
    assert "Protocol not known: nope; expected a URL" in message_of(lambda: find("nope://x"))
    real = fsspec.core.get_filesystem_class

    def missing(protocol: str) -> object:
        if protocol in ("s3", "gs"):
            raise ImportError(f"Install a driver for {protocol}")
        return real(protocol)

    monkeypatch.setattr("fsspec.core.get_filesystem_class", missing)
    assert "pip install s3fs" in message_of(lambda: find("s3://bucket/folder"))
    assert "pip install gcsfs" in message_of(lambda: find("gs://bucket/x-{0..3}.tar"))
    assert "pip install s3fs" in message_of(lambda: find("zip://::s3://bucket/x.zip"))

    def refused(*_: object, **__: object) -> object:
        raise RuntimeError("no\ncredentials")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "find", refused)
    message = message_of(lambda: find("memory://bucket/x"))
    assert "'memory://bucket/x' cannot be read: RuntimeError: no credentials; check the address" in message


def test_latent_store_behind_a_url(memory: Callable[[str, bytes], None]) -> None:
    memory("s/manifest.json", json.dumps({"format": "edt-latents"}).encode())
    assert "is a store of latents" in message_of(lambda: find("memory://bucket/s"))


# ------------------------------------------------------------------------------------------- threads and processes


def test_readers_serve_threads_and_forked_processes(tmp_path: Path) -> None:
    import multiprocessing
    import zipfile
    from concurrent.futures import ThreadPoolExecutor

    rows = [(number, 0) for number in range(40)]
    (tmp_path / "tree" / "a").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for value, _ in rows:
            (tmp_path / "tree" / "a" / f"{value:02d}.png").write_bytes(png(value))
            archive.write(tmp_path / "tree" / "a" / f"{value:02d}.png", f"a/{value:02d}.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "tree" / "a", "a", filter=lambda info: info)
    as_parquet(tmp_path / "x.parquet", *rows)
    for name in ("tree", "x.zip", "x.tar", "x.parquet"):
        reader = find(tmp_path / name).reader

        def read(row: int, reader: Reader = reader) -> int:
            with reader.open(row) as stream:
                return value_of(stream.read())

        order = list(range(40)) * 5
        expected = [read(row) for row in order]
        assert sorted(expected) == sorted(list(range(40)) * 5)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(read, order)) == expected

        context = multiprocessing.get_context("fork")
        received, sent = context.Pipe(duplex=False)
        process = context.Process(target=lambda read=read, sent=sent: sent.send([read(row) for row in range(40)]))
        process.start()
        assert received.poll(60)
        assert received.recv() == expected[:40]
        process.join()
