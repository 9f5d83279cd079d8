import dataclasses
import errno
import hashlib
import io
import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from stores import contents, facts_of, make_pictures, make_store, small_kl, small_tiny

from edt_diffusion.data import encode_folder as encoding
from edt_diffusion.data.codec import PixelCodec, from_uint8
from edt_diffusion.data.encode import EncodeSettings, _usual_part, encode
from edt_diffusion.data.latents import LatentStore
from edt_diffusion.data.picture import fit_picture, load_picture
from edt_diffusion.data.prepare import nearest_size
from edt_diffusion.data.sources import Row, Source, StreamedSource, find_source
from edt_diffusion.util import files, rng
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.lock import Lock


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures")


def prepared(file: Path, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    return np.array(fit_picture(load_picture(io.BytesIO(file.read_bytes()), 3), size, "center"))


def in_order(tree: Path) -> list[Path]:
    return sorted(tree.rglob("*.png"))


def table(store: Path) -> pa.Table:
    """All rows in the order of the manifest, read with Arrow alone."""
    manifest = json.loads((store / "manifest.json").read_text())
    return pa.concat_tables(pa.ipc.open_file(store / shard["file"]).read_all() for shard in manifest["shards"])


def values(column: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.stack([np.frombuffer(row.as_py(), dtype).reshape(shape) for row in column])


# What is stored


def test_moments_of_both_views(tree: Path, tmp_path: Path) -> None:
    vae = small_kl()
    made = make_store(tree, tmp_path / "store", vae, flips="both")
    assert (made.pictures, made.rows, made.skipped, made.made, made.finished) == (9, 9, 0, 9, True)
    rows = table(tmp_path / "store")
    assert rows.schema.field("plain").type == pa.binary(4 * 8 * 8 * 2)
    pixels = np.stack([prepared(file) for file in in_order(tree)])
    for view, shown in (("plain", pixels), ("flipped", np.ascontiguousarray(pixels[:, :, ::-1]))):
        distribution = vae.encode(from_uint8(shown)).latent_dist
        wanted = torch.cat([distribution.mean, distribution.logvar], 1).numpy()
        assert wanted.std() > 0.05
        np.testing.assert_allclose(values(rows[view], (4, 8, 8), "<f2"), wanted, rtol=1e-3, atol=1e-4)
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert (manifest["kind"], manifest["dtype"], manifest["views"]) == ("moments", "float16", ["plain", "flipped"])
    assert manifest["scaling"] == {"shift": [0.25, 0.25], "scale": [0.5, 0.5]}
    assert manifest["codec"] == facts_of(vae).model_dump() | {"class_name": "AutoencoderKL", "bundled": True}
    assert manifest["buckets"] == [{"pictures": [16, 16], "shape": [2, 8, 8]}]


def test_deterministic_latents_in_float32(tree: Path, tmp_path: Path) -> None:
    vae = small_tiny()
    make_store(tree, tmp_path / "store", vae, dtype="float32", batch_size=9, shard_pictures=9)
    pixels = np.stack([prepared(file) for file in in_order(tree)])
    wanted = vae.encode(from_uint8(pixels)).latents.numpy()
    np.testing.assert_array_equal(values(table(tmp_path / "store")["plain"], (3, 8, 8), "<f4"), wanted)
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert (manifest["kind"], manifest["dtype"], manifest["codec"]["class_name"]) == (
        "latents",
        "float32",
        "AutoencoderTiny",
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_preparation(tree: Path, tmp_path: Path, channels: int) -> None:
    make_store(tree, tmp_path / "store", sizes=[(12, 20)], channels=channels, dtype="float32", flips="both")
    rows = table(tmp_path / "store")
    assert "flipped" not in rows.column_names  # mirrored when read
    for file, row in zip(in_order(tree), rows["plain"], strict=True):
        image = fit_picture(load_picture(io.BytesIO(file.read_bytes()), channels), (12, 20), "center")
        wanted = np.asarray(image).reshape(12, 20, channels).transpose(2, 0, 1)
        np.testing.assert_array_equal(np.frombuffer(row.as_py(), np.uint8).reshape(channels, 12, 20), wanted)
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert (manifest["kind"], manifest["dtype"], manifest["codec"]) == ("pixels", "uint8", None)


def test_columns_labels_and_shards(tree: Path, tmp_path: Path) -> None:
    make_store(tree, tmp_path / "store")
    rows = table(tmp_path / "store")
    pictures = in_order(tree)
    assert rows["row"].to_pylist() == list(range(9))
    assert rows["label"].to_pylist() == [0] * 5 + [1] * 4
    assert rows["key"].to_pylist() == [str(file.relative_to(tree)) for file in pictures]
    assert rows["picture_sha256"].to_pylist() == [hashlib.sha256(file.read_bytes()).digest() for file in pictures]
    assert np.load(tmp_path / "store/labels.npy").tolist() == [0] * 5 + [1] * 4
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert (manifest["class_names"], manifest["class_counts"]) == (["ant", "bee"], [5, 4])
    told = [(shard["file"], shard["first"], shard["rows"]) for shard in manifest["shards"]]
    assert told == [("shard-00000.arrow", 0, 4), ("shard-00001.arrow", 4, 4), ("shard-00002.arrow", 8, 1)]
    for shard in manifest["shards"]:
        content = (tmp_path / "store" / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    digest = hashlib.sha256((tmp_path / "store/labels.npy").read_bytes()).hexdigest()
    assert manifest["labels_sha256"] == digest
    assert sorted(contents(tmp_path / "store")) == [
        "labels.npy",
        "manifest.json",
        "report.json",
        *(name for name, _, _ in told),
    ]


def test_statistics_of_moments_are_those_of_draws(tree: Path, tmp_path: Path) -> None:
    vae = small_kl()
    make_store(tree, tmp_path / "store", vae, dtype="float32", flips="both")
    mean, logarithm = np.split(values(table(tmp_path / "store")["plain"], (4, 8, 8), "<f4").astype(np.float64), 2, 1)
    statistics = json.loads((tmp_path / "store/manifest.json").read_text())["statistics"]
    for channel in range(2):
        means = mean[:, channel].ravel()
        variance = means.var() + np.exp(logarithm[:, channel]).mean()  # the law of total variance
        assert statistics["mean"][channel] == pytest.approx(means.mean(), rel=1e-9)
        assert statistics["std"][channel] == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_statistics_of_pixels(tree: Path, tmp_path: Path) -> None:
    make_store(tree, tmp_path / "store")
    pixels = np.stack([prepared(file) for file in in_order(tree)]).astype(np.float64) / 255 * 2 - 1
    statistics = json.loads((tmp_path / "store/manifest.json").read_text())["statistics"]
    np.testing.assert_allclose(statistics["mean"], pixels.mean((0, 1, 2)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(statistics["std"], pixels.std((0, 1, 2)), rtol=1e-9)


def test_values_beyond_float16_are_refused(tree: Path, tmp_path: Path) -> None:
    vae = small_kl()
    with torch.no_grad():
        vae.quant_conv.weight[:2] *= 1e6  # the means
    with pytest.raises(UserError, match=r"latents of 'ant/00.png' reach .*, too much for float16: .* --dtype float32"):
        make_store(tree, tmp_path / "half", vae)
    assert make_store(tree, tmp_path / "single", vae, dtype="float32").rows == 9
    with torch.no_grad():
        vae.quant_conv.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"not finite for 'ant/00.png': its weights may be damaged"):
        make_store(tree, tmp_path / "damaged", vae, dtype="float32")


def test_random_crops_follow_the_number_of_the_picture(tree: Path, tmp_path: Path) -> None:
    make_store(tree, tmp_path / "store", crop="random", seed=7)
    for number, (file, row) in enumerate(zip(in_order(tree), table(tmp_path / "store")["plain"], strict=True)):
        draw = rng.stream(7, rng.Purpose.CROP, position=number)
        image = fit_picture(load_picture(io.BytesIO(file.read_bytes()), 3), (16, 16), "random", draw)
        assert row.as_py() == np.asarray(image).transpose(2, 0, 1).tobytes()
    make_store(tree, tmp_path / "other", crop="random", seed=8)
    assert table(tmp_path / "store")["plain"] != table(tmp_path / "other")["plain"]


def test_nothing_of_the_machine_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small_kl()
    for place in ("here", "there/deeper"):
        make_pictures(tmp_path / place / "pictures", damaged=["bee/00.png"])
        monkeypatch.chdir(tmp_path / place)
        if place != "here":
            monkeypatch.setattr("time.time", lambda: 2e9)
        make_store(tmp_path / place / "pictures", tmp_path / place / "store", vae)
    first = contents(tmp_path / "here/store")
    assert first == contents(tmp_path / "there/deeper/store")
    assert {"manifest.json", "report.json", "codec/config.json", "shard-00000.arrow"} <= set(first)
    for name, content in first.items():
        assert str(tmp_path).encode() not in content, name
        assert socket.gethostname().encode() not in content, name


# Pictures that cannot be read


def test_unreadable_pictures_are_listed_and_change_no_other_row(tmp_path: Path) -> None:
    vae = small_kl()
    whole = make_pictures(tmp_path / "whole")
    make_store(whole, tmp_path / "all", vae)
    damaged = make_pictures(tmp_path / "damaged", damaged=["ant/01.png", "bee/02.png"])
    (damaged / "notes.txt").write_text("hello")
    (damaged / "empty").mkdir()
    made = make_store(damaged, tmp_path / "some", vae)
    assert (made.pictures, made.rows, made.skipped) == (9, 7, 2)
    kept = [0, 2, 3, 4, 5, 6, 8]
    assert table(tmp_path / "some") == table(tmp_path / "all").take(kept)  # every byte of every row
    reason = "not a picture in a format that Pillow reads"
    report = json.loads((tmp_path / "some/report.json").read_text())
    passed_over = report.pop("passed_over")
    assert report == {
        "pictures": 9,
        "encoded": 7,
        "skipped": [{"picture": "ant/01.png", "reason": reason}, {"picture": "bee/02.png", "reason": reason}],
    }
    assert [entry["file"] for entry in passed_over] == ["empty", "notes.txt"]
    manifest = json.loads((tmp_path / "some/manifest.json").read_text())
    assert (manifest["rows"], manifest["skipped"], manifest["source"]["pictures"]) == (7, 2, 9)
    assert (manifest["class_names"], manifest["class_counts"]) == (["ant", "bee"], [4, 3])


def test_a_class_of_which_nothing_can_be_read_keeps_its_number(tmp_path: Path) -> None:
    tree = make_pictures(tmp_path / "p", {"a": 1, "b": 1, "c": 1}, damaged=["b/00.png"])
    make_store(tree, tmp_path / "store")
    assert LatentStore.open(tmp_path / "store").class_counts() == {"a": 1, "b": 0, "c": 1}


def test_strict_stops_at_the_first(tmp_path: Path) -> None:
    tree = make_pictures(tmp_path / "p", damaged=["ant/03.png", "bee/02.png"])
    with pytest.raises(UserError, match=r"'ant/03.png' cannot be decoded: not a picture .*--strict"):
        make_store(tree, tmp_path / "store", strict=True)
    assert make_store(tree, tmp_path / "store").skipped == 2  # the same folder goes on without


def test_all_unreadable(tmp_path: Path) -> None:
    tree = make_pictures(tmp_path / "p", {"a": 2}, damaged=["a/00.png", "a/01.png"])
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 pictures can be read, 'a/00.png' for instance: not a pict"):
            make_store(tree, tmp_path / "store")
    assert not (tmp_path / "store/manifest.json").exists()


def test_unlabelled_pictures(tmp_path: Path) -> None:
    make_pictures(tmp_path / "p", {"a": 3})
    make_store(tmp_path / "p/a", tmp_path / "store")
    assert table(tmp_path / "store").column_names == ["row", "key", "picture_sha256", "plain"]
    assert not (tmp_path / "store/labels.npy").exists()
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert [manifest[key] for key in ("class_names", "class_counts", "labels_sha256")] == [None] * 3


def test_odd_names(tmp_path: Path) -> None:
    tree = make_pictures(tmp_path / "p", {"a": 1})
    odd = [
        "new\nline.png",
        "ünï 日本.png",
        'quote".png',
        "back\\slash.png",
        b"\xff.png".decode("utf-8", "surrogateescape"),
    ]
    for name in odd:
        (tree / "a" / name).write_bytes((tree / "a/00.png").read_bytes())
    (tree / "a" / odd[0]).write_text("damaged")
    assert make_store(tree, tmp_path / "store").rows == 5
    keys = table(tmp_path / "store")["key"].to_pylist()
    assert sorted(keys) == sorted(
        ["a/00.png", "a/ünï 日本.png", 'a/quote".png', "a/back\\\\slash.png", "a/\\udcff.png"]
    )
    assert json.loads((tmp_path / "store/report.json").read_text())["skipped"][0]["picture"] == "a/new\nline.png"


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": [(15, 16)]}, "15x16 pixels .* multiples of 2, such as 16x16"),
        ({"sizes": [(1, 1)]}, "1x1 pixels .* multiples of 2, such as 2x2"),
        ({"sizes": [(16, 16), (16, 16)]}, "each once"),
        ({"sizes": []}, "each once"),
        ({"channels": 1}, "1 channels cannot be encoded: this autoencoder takes 3; use --channels 3"),
    ],
)
def test_settings_that_the_codec_cannot_have(tree: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_store(tree, tmp_path / "store", small_kl(), **settings)
    assert not (tmp_path / "store").exists()


class Stopped(Exception):
    pass


def stop_after(count: int) -> Callable[..., None]:
    def progress(done: int, *_: object) -> None:
        if done >= count:
            raise Stopped

    return progress


def refused(match: str, before: dict[str, bytes], folder: Path, *arguments: Any, **settings: Any) -> None:
    with pytest.raises(UserError, match=match) as raised:
        make_store(*arguments, **settings)
    assert "\n" not in str(raised.value)
    assert contents(folder) == before


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_and_change_nothing(tree: Path, tmp_path: Path, finished: bool) -> None:
    out, vae = tmp_path / "store", small_kl()
    if finished:
        make_store(tree, out, vae)
    else:
        with pytest.raises(Stopped):
            make_store(tree, out, vae, progress=stop_after(6))
        assert (out / "part-00000.json").exists()
    before = contents(out)
    for changed, name in (
        ({"sizes": [(32, 16)]}, "buckets"),
        ({"flips": "both"}, "views"),
        ({"dtype": "float32"}, "dtype"),
        ({"crop": "resize"}, "preparation"),
    ):
        refused(f"another {name} .*choose another --out", before, out, tree, out, vae, **changed)
    refused("another kind", before, out, tree, out, small_tiny())
    refused("another codec", before, out, tree, out, small_kl(seed=1))
    refused("another scaling", before, out, tree, out, small_kl(scaling_factor=0.7))
    refused("with 4 pictures a shard, not 3: leave --shard-pictures out", before, out, tree, out, vae, shard_pictures=3)
    assert make_store(tree, out, vae, shard_pictures=None, batch_size=2).finished


@pytest.mark.parametrize("finished", [False, True])
def test_other_pictures_are_refused_and_change_nothing(tree: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "store"
    if finished:
        make_store(tree, out)
    else:
        with pytest.raises(Stopped):
            make_store(tree, out, progress=stop_after(6))
    before = contents(out)
    (tree / "ant/01.png").rename(tree / "ant/01b.png")  # in the part that is done
    refused("other pictures|pictures have changed", before, out, tree, out)
    (tree / "ant/01b.png").rename(tree / "ant/01.png")
    found: Any = find_source(tree)
    relabelled = replace(found, labels=1 - found.labels)
    refused(r"other pictures \(names or labels|pictures have changed", before, out, relabelled, out)
    (tree / "cat").mkdir()
    (tree / "bee/03.png").rename(tree / "cat/03.png")
    refused("another class_names", before, out, tree, out)
    (tree / "cat/03.png").rename(tree / "bee/03.png")
    Image.new("RGB", (16, 16)).save(tree / "bee/04.png")
    refused(r"another source \(\{\"pictures\": 9\}, now \{\"pictures\": 10\}\)", before, out, tree, out)
    (tree / "bee/04.png").unlink()
    assert make_store(tree, out).rows == 9


def test_foreign_folders_are_refused(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    for name in ("notes.txt", "codec/config.json", "manifest.json", "encode.json"):
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("{}")
        refused("holds other files|is not the manifest|is damaged", contents(out), out, tree, out)
        (out / name).unlink()
        while (folder := (out / name).parent) != tmp_path and folder.exists():
            folder.rmdir()
            name = str(Path(name).parent)
    out.write_text("a file")
    with pytest.raises(UserError, match="a file is in the way"):
        make_store(tree, out)


def test_one_process_at_a_time(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    out.mkdir()
    with Lock(out, "taken"):
        refused("another process is encoding into .*/store", {}, out, tree, out)
    assert make_store(tree, out).finished


def test_no_source_pictures_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing holds no pictures"):
        make_store(StreamedSource("nothing", lambda start: iter(()), labelled=False), tmp_path / "store")


# Going on


def test_interrupted_anywhere_and_finished(tmp_path: Path) -> None:
    vae = small_kl()
    tree = make_pictures(tmp_path / "p", damaged=["ant/02.png", "bee/03.png"])
    make_store(tree, tmp_path / "whole", vae, flips="both")
    wanted = contents(tmp_path / "whole")
    for count in range(0, 9, 2):
        out = tmp_path / f"stopped-{count}"
        with pytest.raises(Stopped):
            make_store(tree, out, vae, flips="both", progress=stop_after(count))
        made = make_store(tree, out, vae, flips="both")
        assert made.made == 9 - (count - 1) // 4 * 4 if count > 4 else made.made == 9
        assert contents(out) == wanted


def test_a_finished_store_is_left_alone(tree: Path, tmp_path: Path) -> None:
    make_store(tree, tmp_path / "store")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}
    told = []
    made = make_store(tree, tmp_path / "store", progress=lambda *call: told.append(call))
    assert (made.pictures, made.rows, made.made, made.finished) == (9, 9, 0, True)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()} == before
    assert told == []


def test_progress_counts_from_what_was_there(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        make_store(tree, tmp_path / "store", progress=stop_after(6))
    told: list[tuple[int, int | None, int]] = []
    make_store(tree, tmp_path / "store", progress=lambda *call: told.append(call))
    assert told[0] == (4, 9, 0)  # so that the four are not taken for this call's speed
    assert [done for done, _, _ in told] == [4, 6, 8, 8, 9]


def test_the_autoencoder_may_have_moved(tree: Path, tmp_path: Path) -> None:
    vae, out = small_kl(), tmp_path / "store"
    make_store(tree, tmp_path / "whole", vae, name="first")
    with pytest.raises(Stopped):
        make_store(tree, out, vae, name="first", progress=stop_after(6))
    make_store(tree, out, vae, name="second")
    assert contents(out) == contents(tmp_path / "whole")
    assert json.loads((out / "manifest.json").read_text())["codec"]["id"] == "first"
    assert make_store(tree, out, vae, name="third").made == 0


def test_what_was_removed_is_made_again(tree: Path, tmp_path: Path) -> None:
    make_store(tree, tmp_path / "whole")
    out = tmp_path / "store"
    with pytest.raises(Stopped):
        make_store(tree, out, progress=stop_after(9))
    (out / "shard-00000.arrow").unlink()
    shard = out / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert make_store(tree, out).made == 9
    assert contents(out) == contents(tmp_path / "whole")


def test_a_damaged_record_or_plan_is_named(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    with pytest.raises(Stopped):
        make_store(tree, out, progress=stop_after(6))
    record, plan = out / "part-00000.json", out / "encode.json"
    whole = record.read_text()
    for text in ("", "[]", '{"pictures": 4}', whole.replace('"rows": 4', '"rows": "x"')):
        record.write_text(text)
        with pytest.raises(UserError, match=r"part-00000.json is damaged: remove it and run the same command again"):
            make_store(tree, out)
    record.unlink()
    told = plan.read_text()
    for text in ("", "[]", "{}", "\udcff"):
        plan.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"encode.json is damaged"):
            make_store(tree, out)
    plan.write_text(told)
    make_store(tree, out)
    (out / "shard-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"shard '.*shard-00001.arrow' cannot be read"):
        make_store(tree, out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        make_store(tree, out)


@pytest.mark.parametrize("library", [False, True])
def test_a_full_disk(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    vae = small_kl()
    make_store(tree, tmp_path / "whole", vae)
    wanted = contents(tmp_path / "whole")
    out, flush = tmp_path / "store", files._sync_file
    for room in range(0, 99, 2):  # files that can be flushed before the disk is full
        left = [room]

        def full(path: Path, left: list[int] = left) -> None:
            if left[0] == 0:
                raise RuntimeError("No space left on device") if library else OSError(errno.ENOSPC, "No space left")
            left[0] -= 1
            flush(path)

        monkeypatch.setattr(files, "_sync_file", full)
        before = contents(out) if out.exists() else {}
        try:
            make_store(tree, out, vae)
            break
        except UserError as error:
            told = str(error)
        assert re.search("the disk is full: .* run the same command again, it goes on from there", told)
        now = contents(out)
        assert before.items() <= now.items()  # nothing is lost
        assert all(now[name] == wanted[name] for name in now if name in wanted)  # no half-written shard
        assert not any(name.endswith(".tmp") for name in now)
    assert room > 4
    assert contents(out) == wanted


# Streams


def streamed(tree: Path, breaks_at: int | None = None) -> StreamedSource:
    """The pictures of a tree as a stream that fails at a row, as a network does."""
    found: Any = find_source(tree)

    def rows(start: int) -> Iterator[Row]:
        for number in range(start, 9):
            if number == breaks_at:
                raise TimeoutError("the server\ndoes not answer")
            with found.reader.open(number) as stream:
                yield Row(found.reader.key(number), stream.read(), int(found.labels[number]))

    return StreamedSource("a stream", rows, labelled=True, class_names=found.class_names)


def test_streams_give_the_same_store(tmp_path: Path) -> None:
    tree = make_pictures(tmp_path / "p", damaged=["ant/02.png"])
    make_store(tree, tmp_path / "whole")
    make_store(streamed(tree), tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    for rank in (1, 0):
        make_store(streamed(tree), tmp_path / "two", rank=rank, world_size=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")


def test_a_stream_that_breaks_off_goes_on(tmp_path: Path) -> None:
    tree = make_pictures(tmp_path / "p", damaged=["ant/02.png"])
    make_store(tree, tmp_path / "whole")
    for row, done in ((0, 0), (3, 0), (4, 4), (6, 4), (8, 8)):
        out = tmp_path / f"broken-{row}"
        with pytest.raises(UserError, match=r"a stream broke off \(the server does not answer\): run the same command"):
            make_store(streamed(tree, row), out)
        assert make_store(streamed(tree), out).made == 9 - done
        assert contents(out) == contents(tmp_path / "whole")


def test_a_row_without_picture_or_label(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    rows = [Row("row 0", png.getvalue(), 1), Row("row 1", None, None, "its label is -1"), Row("row 2", None, 0)]
    source = StreamedSource("a stream", lambda start: iter(rows[start:]), True, ["a", "b"])
    assert make_store(source, tmp_path / "store").rows == 1
    assert json.loads((tmp_path / "store/report.json").read_text())["skipped"] == [
        {"picture": "row 1", "reason": "its label is -1"},
        {"picture": "row 2", "reason": "it could not be read"},
    ]
    assert np.load(tmp_path / "store/labels.npy").tolist() == [1]


# Several processes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_processes_share_the_work(tmp_path: Path, order: tuple[int, ...]) -> None:
    vae = small_kl()
    tree = make_pictures(tmp_path / "p", damaged=["ant/02.png"])
    make_store(tree, tmp_path / "whole", vae, shard_pictures=2)
    out = tmp_path / "store"
    made = [make_store(tree, out, vae, shard_pictures=2, rank=rank, world_size=3) for rank in order]
    assert [one.finished for one in made] == [False, False, True]
    assert {rank: one.made for rank, one in zip(order, made, strict=True)} == {0: 4, 1: 3, 2: 2}  # parts 0 3, 1 4, 2
    assert contents(out) == contents(tmp_path / "whole")


def test_one_process_finishes_what_two_began(tree: Path, tmp_path: Path) -> None:
    make_store(tree, tmp_path / "whole", shard_pictures=2)
    out = tmp_path / "store"
    assert not make_store(tree, out, shard_pictures=2, rank=1, world_size=2).finished
    with pytest.raises(Stopped):
        make_store(tree, out, shard_pictures=2, rank=0, world_size=2, progress=stop_after(6))
    assert make_store(tree, out, shard_pictures=None).finished
    assert contents(out) == contents(tmp_path / "whole")
    late = make_store(tree, out, shard_pictures=2, rank=1, world_size=2)
    assert (late.finished, late.rows) == (True, 9)
    assert contents(out) == contents(tmp_path / "whole")


def make_by_two(tree: Path, out: Path) -> None:
    """As the other processes of a job of two do it."""
    for rank in (0, 1):
        make_store(tree, out, rank=rank, world_size=2)


@pytest.mark.parametrize(
    ("point", "before"), [("iterdir", True), ("iterdir", False), ("read_bytes", True), ("read_bytes", False)]
)
def test_a_process_that_begins_while_another_does(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, before: bool
) -> None:
    """Whatever the other one does in between, none takes its files for foreign ones, or leaves its own behind."""
    make_store(tree, tmp_path / "whole")
    out, original = tmp_path / "store", getattr(Path, point)
    if (point, before) == ("read_bytes", False):
        make_store(tree, out, rank=0, world_size=2)  # has begun, so that the plan is there

    def meanwhile(path: Path) -> Any:
        if out not in (path, path.parent):
            return original(path)
        monkeypatch.setattr(Path, point, original)
        if before:
            make_by_two(tree, out)
            return original(path)
        try:
            found = original(path)
            return iter(list(found)) if point == "iterdir" else found
        finally:
            make_by_two(tree, out)

    monkeypatch.setattr(Path, point, meanwhile)
    late = make_store(tree, out, rank=1, world_size=2)
    assert (late.finished, late.made) == (True, 0)
    assert getattr(Path, point) is original
    assert contents(out) == contents(tmp_path / "whole")


def test_another_process_was_faster_at_the_end(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find all parts done; the other has written the manifest and cleaned up before this one's is renamed."""
    make_store(tree, tmp_path / "whole")
    out, write = tmp_path / "store", encoding.atomic_write_text
    make_store(tree, out, rank=0, world_size=2)

    def late(path: Path, text: str) -> None:
        monkeypatch.setattr(encoding, "atomic_write_text", write)
        (out / f".manifest.json.{'0' * 16}.tmp").write_text(text)
        make_store(tree, out, rank=0, world_size=2)
        assert not (out / f".manifest.json.{'0' * 16}.tmp").exists()
        raise FileNotFoundError(path)

    monkeypatch.setattr(encoding, "atomic_write_text", late)
    assert make_store(tree, out, rank=1, world_size=2).finished
    assert contents(out) == contents(tmp_path / "whole")


# Several sizes


def test_nearest_size() -> None:
    sizes = [(16, 16), (12, 20), (20, 12), (8, 8)]
    assert nearest_size(sizes, 100, 100) == 0  # the larger of the squares that it covers
    assert nearest_size(sizes, 10, 10) == 3
    assert nearest_size(sizes, 4, 4) == 3  # covers none: the smallest
    assert nearest_size(sizes, 30, 51) == 1
    assert nearest_size(sizes, 51, 30) == 2
    # Between 1 and 5/3 the geometric mean 1.29 divides; the arithmetic mean would be 1.33.
    assert (nearest_size(sizes, 1000, 1280), nearest_size(sizes, 1000, 1300)) == (0, 1)


def test_buckets(tmp_path: Path) -> None:
    vae = small_kl()
    shapes = [(16, 16), (12, 20), (40, 24), (33, 33)]
    tree = make_pictures(tmp_path / "p", {"a": 7, "b": 6}, shapes, damaged=["a/01.png"])
    sizes = {"sizes": [(16, 16), (12, 20), (20, 12)], "shard_pictures": 6}
    made = make_store(tree, tmp_path / "store", vae, **sizes)
    assert (made.pictures, made.rows) == (13, 12)
    store = LatentStore.open(tmp_path / "store")
    bucket_of = [0, 1, 2, 0]  # of the shapes in their turn; picture 1 is damaged
    expected = [[n for n in range(13) if n != 1 and bucket_of[n % 4] == bucket] for bucket in range(3)]
    numbers_in_order = [number for numbers in expected for number in numbers]
    assert store.column("row", range(12)) == numbers_in_order
    assert store.labels is not None
    assert store.labels.tolist() == [int(number >= 7) for number in numbers_in_order]
    assert store.bucket_sizes() == [len(numbers) for numbers in expected] == [7, 2, 3]
    names = [shard.file for shard in store.manifest.shards]
    assert names == [
        f"shard-{part:05d}-{bucket}.arrow"
        for bucket in (0, 1, 2)
        for part in (0, 1, 2)
        if any(part * 6 <= number < part * 6 + 6 for number in expected[bucket])
    ]
    with pytest.raises(UserError, match=r"several sizes \(16x16, 12x20, 20x12\), and a model has one: set data.size"):
        _ = store.shape
    for (height, width), numbers in zip(sizes["sizes"], expected, strict=True):
        part = store.select_size(height, width)
        assert part.shape == (2, height // 2, width // 2)
        assert part.column("row", range(len(part))) == numbers
        pixels = np.stack([prepared(in_order(tree)[number], (height, width)) for number in numbers])
        moments = vae.encode(from_uint8(pixels)).latent_dist
        np.testing.assert_allclose(part.mean_latents(range(len(part))), moments.mean, rtol=1e-3, atol=1e-4)
        drawn = part.batch(np.arange(len(part)), np.zeros(len(part), int), 0)
        assert drawn.shape == (len(part), 2, height // 2, width // 2)
    for count in (0, 5, 11):
        out = tmp_path / f"stopped-{count}"
        with pytest.raises(Stopped):
            make_store(tree, out, vae, **sizes, progress=stop_after(count))
        make_store(tree, out, vae, **sizes)
        assert contents(out) == contents(tmp_path / "store")


def test_a_size_that_no_picture_has(tmp_path: Path) -> None:
    tree = make_pictures(tmp_path / "p", sizes=[(16, 16)])
    make_store(tree, tmp_path / "store", sizes=[(16, 16), (8, 32)])
    store = LatentStore.open(tmp_path / "store")
    assert store.shape == (3, 16, 16)
    with pytest.raises(UserError, match=r"data.size is 8x32, but .* holds pictures of 16x16"):
        store.select_size(8, 32)


@pytest.mark.parametrize(
    ("fitting", "length", "pictures"),
    [
        (341, None, 256),  # 64 MiB of 192 KiB rows, and the power of two below
        (4096, None, 1024),  # what a kill may cost
        (4096, 1_000_000, 1024),
        (4096, 1200, 64),  # sixteen parts or more, for several processes
        (4096, 8000, 256),
        (4096, 60, 32),
        (10, None, 32),
    ],
)
def test_usual_size_of_a_part(fitting: int, length: int | None, pictures: int) -> None:
    assert _usual_part(fitting, length) == pictures


def test_a_seed_that_decides_nothing_does_not_tell_stores_apart(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    make_store(tree, out, seed=3)
    assert make_store(tree, out, seed=4).made == 0
    assert LatentStore.open(out).manifest.preparation.seed == 0
    random = tmp_path / "random"
    make_store(tree, random, seed=3, crop="random")
    with pytest.raises(UserError, match="another preparation"):
        make_store(tree, random, seed=4, crop="random")


class Flaky:
    """A reader whose second picture cannot be read while the network is down."""

    def __init__(self, reader: Any, error: Exception) -> None:
        self.reader, self.error, self.down = reader, error, True

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def open(self, row: int) -> Any:
        if self.down and row == 1:
            raise self.error
        return self.reader.open(row)


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), TimeoutError("late"), OSError(24, "files")])
def test_trouble_that_passes_does_not_cost_a_picture(tree: Path, tmp_path: Path, error: Exception) -> None:
    make_store(tree, tmp_path / "whole")
    found = find_source(tree)
    assert isinstance(found, Source)
    reader = Flaky(found.reader, error)
    flaky = dataclasses.replace(found, reader=reader)
    settings = EncodeSettings([(16, 16)], batch_size=2, shard_pictures=4)
    with pytest.raises(UserError, match=r"cannot be read now \(.*run the same command again"):
        encode(flaky, PixelCodec(3), None, tmp_path / "store", settings)
    assert not list((tmp_path / "store").glob("part-*"))
    reader.down = False
    assert encode(flaky, PixelCodec(3), None, tmp_path / "store", settings).skipped == 0
    reader.down, reader.error = True, PermissionError(13, "Permission denied")
    assert encode(flaky, PixelCodec(3), None, tmp_path / "other", settings).skipped == 1


def test_one_process_alone_is_kept_out_of_a_folder_that_several_share(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    out.mkdir()
    with Lock(out, "", shared=True), Lock(out, "", shared=True):
        with pytest.raises(UserError, match="another process is encoding"):
            make_store(tree, out)
        make_store(tree, out, rank=0, world_size=2)
    with Lock(out, ""), pytest.raises(UserError, match="another process is encoding"):
        make_store(tree, out, rank=1, world_size=2)
