"""A folder as people have them: what each odd file gives, and that nothing is lost silently."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edt_diffusion.data import LatentStore

SIZE = 16
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def solid(colour, mode="RGB", size=(SIZE, SIZE)) -> Image.Image:
    return Image.new(mode, size, colour)


def noise(mode="RGB") -> Image.Image:
    shape = (64, 64, 3) if mode == "RGB" else (64, 64)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def make_tree(root: Path) -> tuple[dict[str, tuple[int, int, int] | None], dict[str, str], dict[str, str]]:
    """Write the tree; returns what is expected: key -> corner pixel, unreadable key -> word, passed over -> word."""
    (root / "cat" / "deeper" / "folder.jpg").mkdir(parents=True)
    (root / "dog").mkdir()
    (root / "empty").mkdir()
    rows: dict[str, tuple[int, int, int] | None] = {}
    damaged: dict[str, str] = {}
    passed: dict[str, str] = {"empty": "without pictures"}

    def put(name: str, colour: tuple[int, int, int] | None, picture: Image.Image, **options) -> None:
        picture.save(root / name, **options)
        rows[name] = colour

    put("cat/cmyk.jpg", (0, 255, 255), Image.merge("CMYK", [solid(v, "L") for v in (255, 0, 0, 0)]), quality=100)
    put("cat/deep.png", (128, 128, 128), Image.fromarray(np.full((SIZE, SIZE), 128 * 257, np.uint16)))
    put("cat/one.png", RED, solid(RED, size=(1, 1)))
    put("cat/wide.png", BLUE, solid(BLUE, size=(8000, 20)))
    put("cat/animated.gif", RED, solid(RED), save_all=True, append_images=[solid(BLUE)])
    halves = Image.new("RGB", (32, 32), RED)
    halves.paste(BLUE, (0, 16, 32, 32))  # red above blue; shown upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    put("cat/rotated.jpg", BLUE, halves, exif=exif, quality=100)
    put("cat/žluťoučký 狗.png", RED, solid(RED))
    put("cat/two\nlines.png", BLUE, solid(BLUE))
    put("cat/alpha.png", WHITE, solid((255, 0, 0, 0), "RGBA"))
    put("cat/gray-alpha.png", WHITE, solid((0, 0), "LA"))
    put("cat/palette.png", RED, solid(RED).convert("P", palette=Image.Palette.ADAPTIVE))
    put("cat/deeper/nested.webp", RED, solid(RED), lossless=True)
    put("cat/deeper/folder.jpg/inside.PNG", BLUE, solid(BLUE))
    put("dog/float.tif", (64, 64, 64), Image.fromarray(np.full((SIZE, SIZE), 64 / 255, np.float32)))
    put("dog/gray.bmp", (7, 7, 7), solid(7, "L"))
    put("dog/plain.jpeg", None, noise())
    undecodable = os.fsdecode(b"dog/byte-\xff.png")
    solid(RED).save(root / undecodable)
    rows["dog/byte-\\udcff.png"] = RED

    noise().save(root / "dog" / "truncated.jpg")
    os.truncate(root / "dog" / "truncated.jpg", 1500)
    damaged["dog/truncated.jpg"] = "truncated"
    (root / "dog" / "nothing.png").touch()
    damaged["dog/nothing.png"] = "empty"
    (root / "dog" / "text.jpg").write_text("no picture")
    damaged["dog/text.jpg"] = "not a picture"
    (root / "dog" / "bomb.png").write_bytes(bomb())
    damaged["dog/bomb.png"] = "more than"
    noise("L").save(root / "dog" / "checksum.png")
    content = bytearray((root / "dog" / "checksum.png").read_bytes())
    content[100] ^= 255
    (root / "dog" / "checksum.png").write_bytes(content)
    damaged["dog/checksum.png"] = ""
    os.symlink("nowhere.png", root / "dog" / "dangling.png")
    passed["dog/dangling.png"] = "dangling link"
    os.mkfifo(root / "dog" / "pipe.png")  # opening it would wait for ever
    passed["dog/pipe.png"] = "not a regular file"
    solid(RED).save(root / "dog" / "forbidden.png")
    (root / "dog" / "forbidden.png").chmod(0)
    if os.access(root / "dog" / "forbidden.png", os.R_OK):  # as root
        rows["dog/forbidden.png"] = RED
    else:
        damaged["dog/forbidden.png"] = "Permission denied"

    os.symlink(root / "cat", root / "cat" / "deeper" / "loop")
    passed["cat/deeper/loop"] = "loop"
    (root / "cat" / "notes.txt").write_text("mine")
    passed["cat/notes.txt"] = ".txt"
    solid(RED).save(root / "cat" / ".hidden.png")
    passed["cat/.hidden.png"] = "hidden"
    return rows, damaged, passed


@pytest.mark.skipif(os.name == "nt", reason="names and links of POSIX systems")
def test_every_oddity_is_a_row_or_has_a_reason(edt, tmp_path):
    tree = tmp_path / "pictures"
    tree.mkdir()
    rows, damaged, passed = make_tree(tree)
    said = edt("encode", tree, "--codec", "none", "--size", SIZE, "--out", tmp_path / "store", "--quiet")
    assert said.code == 0, said.err
    report = json.loads((tmp_path / "store" / "report.json").read_text())
    store = LatentStore.open(tmp_path / "store")
    keys = store.column("key", range(len(store)))
    skipped = {entry["picture"]: entry["reason"] for entry in report["skipped"]}
    over = {entry["file"]: entry["reason"] for entry in report["passed_over"]}
    for key in keys:
        print(f"{key!r:40} row")
    for found in (skipped, over):
        for key, reason in found.items():
            print(f"{key!r:40} {reason}")

    assert sorted(keys) == sorted(rows)
    assert skipped.keys() == damaged.keys()
    assert over.keys() == passed.keys()
    for expected, found in ((damaged, skipped), (passed, over)):
        for key, word in expected.items():
            assert word in found[key], (key, found[key])
    assert not any(str(tmp_path) in reason or "0x" in reason for reason in (*skipped.values(), *over.values()))
    assert report["pictures"] == len(keys) + len(skipped)
    assert report["encoded"] == len(store) == len(keys)

    # Every entry of the tree is accounted for.
    files = [path for path in tree.rglob("*") if path.is_symlink() or not path.is_dir()]
    entries = {os.fsencode(path.relative_to(tree)) for path in files}
    told = {key.replace("\\udcff", "\udcff") for key in (*keys, *skipped, *over) if key != "empty"}
    assert {os.fsencode(name) for name in told} == entries

    pixels = store.stored(range(len(store)))
    assert store.class_names == ["cat", "dog"]
    for index, key in enumerate(keys):
        assert store.class_names[store.labels[index]] == key.split("/")[0]
        if rows[key] is not None:
            assert np.abs(pixels[index, :, 0, 0].astype(int) - rows[key]).max() <= 3, (key, pixels[index, :, 0, 0])

    strict = edt("encode", tree, "--codec", "none", "--size", SIZE, "--out", tmp_path / "b", "--strict", "--quiet")
    assert strict.code == 2
    assert "cannot be decoded" in strict.err[0]
