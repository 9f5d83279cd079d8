import copy
import json
from typing import Any

import pytest

from edt_diffusion.data.manifest import read_manifest, to_json
from edt_diffusion.util.errors import UserError

DIGEST = "0123456789abcdef" * 4
SHARDS = [
    {"file": "shard-00000-0.arrow", "bucket": 0, "first": 0, "rows": 3, "bytes": 900, "sha256": DIGEST},
    {"file": "shard-00000-1.arrow", "bucket": 1, "first": 0, "rows": 2, "bytes": 800, "sha256": DIGEST},
]
WHOLE: dict[str, Any] = {
    "format": "edt-latents",
    "version": 1,
    "kind": "moments",
    "dtype": "float16",
    "views": ["plain", "flipped"],
    "codec": {"class_name": "AutoencoderKL", "id": "some/vae", "sha256": DIGEST, "bundled": True},
    "scaling": {"shift": [0.0, 0.5], "scale": [0.18215, 1.0]},
    "statistics": {"mean": [0.1, -0.2], "std": [1.5, 2.5]},
    "preparation": {"crop": "center", "channels": 3, "seed": 0},
    "buckets": [{"pictures": [16, 16], "shape": [2, 8, 8]}, {"pictures": [12, 20], "shape": [2, 6, 10]}],
    "class_names": ["ant", "bée"],
    "class_counts": [4, 1],
    "source": {"pictures": 6, "sha256": DIGEST},
    "rows": 5,
    "skipped": 1,
    "labels_sha256": DIGEST,
    "shard_pictures": 6,
    "shards": SHARDS,
}


def changed(**changes: Any) -> str:
    """The manifest's text with values replaced by their dotted place (`shards.0.rows` as `shards__0__rows`)."""
    tree = copy.deepcopy(WHOLE)
    for place, value in changes.items():
        *parents, last = place.split("__")
        inner: Any = tree
        for parent in parents:
            inner = inner[int(parent) if parent.isdigit() else parent]
        inner[int(last) if last.isdigit() else last] = value
    return json.dumps(tree)


def test_there_and_back() -> None:
    manifest = read_manifest(json.dumps(WHOLE), "m")
    assert json.loads(to_json(manifest)) == WHOLE
    assert read_manifest(to_json(manifest).encode(), "m") == manifest
    assert "bée" in to_json(manifest)
    assert (manifest.row_shape(0), manifest.row_shape(1)) == ((4, 8, 8), (4, 6, 10))
    latents = read_manifest(changed(kind="latents"), "m")
    assert latents.row_shape(1) == (2, 6, 10)


def test_a_manifest_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_manifest(json.dumps(WHOLE), "m").rows = 6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"kind": "noise"}, "kind"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "uint8"}, "moments are not held as uint8"),
        ({"kind": "pixels"}, "pixels are not held as float16"),
        ({"views": ["plain", "turned"]}, "views.1"),
        ({"views": []}, "views"),
        ({"views": ["flipped"]}, "views"),
        ({"views": ["plain", "plain"]}, "views"),
        ({"codec__sha256": "ABC"}, "codec.sha256"),
        ({"codec__extra": 1}, "codec.extra"),
        ({"codec": 3}, "codec"),
        ({"scaling__shift": ["x", 0]}, "scaling.shift.0"),
        ({"scaling__scale": [1.0]}, "number of channels"),
        ({"scaling__scale": [1.0, float("nan")]}, "scaling.scale.1"),
        ({"statistics__mean": [0.0, 0.0, 0.0]}, "number of channels"),
        ({"statistics__std": [1.0, float("inf")]}, "statistics.std.1"),
        ({"preparation__channels": 4}, "preparation.channels"),
        ({"preparation": {}}, "preparation.crop"),
        ({"buckets": []}, "buckets"),
        ({"buckets": WHOLE["buckets"][:1]}, "no bucket"),
        ({"buckets__0__shape": [2, 0, 8]}, "buckets.0.shape.1"),
        ({"buckets__1__shape": [3, 6, 10]}, "number of channels"),
        ({"class_names": None}, "class_names and class_counts"),
        ({"class_names": ["ant"]}, "class_names and class_counts"),
        ({"class_counts": [4, -1]}, "class_counts.1"),
        ({"class_counts": [4, 2]}, "class_counts do not add up"),
        ({"labels_sha256": None}, "labels_sha256"),
        ({"source__pictures": -1}, "source.pictures"),
        ({"source__sha256": DIGEST.upper()}, "source.sha256"),
        ({"rows": 6}, "rows of the shards do not add up"),
        ({"rows": "many"}, "rows"),
        ({"skipped": -1}, "skipped"),
        ({"shard_pictures": 0}, "shard_pictures"),
        ({"shards": []}, "shards"),
        ({"shards": SHARDS[::-1]}, "not in the order of their buckets"),
        ({"shards__1__file": "shard-00000-0.arrow"}, "stands there twice"),
        ({"shards__0__rows": 0}, "shards.0.rows"),
        ({"shards__0__bytes": -1}, "shards.0.bytes"),
        ({"shards__0__sha256": ""}, "shards.0.sha256"),
        ({"new": 1}, "new"),
    ],
)
def test_damage_is_placed(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(UserError) as raised:
        read_manifest(changed(**changes), "/some/manifest.json")
    message = str(raised.value)
    assert message.startswith("/some/manifest.json is damaged (")
    assert place in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..\\x", "C:\\x", ".", "..", ""])
def test_no_file_outside_the_store(name: str) -> None:
    with pytest.raises(UserError, match="no plain file name"):
        read_manifest(changed(shards__0__file=name), "m")


@pytest.mark.parametrize("missing", [key for key in WHOLE if key not in ("format", "version", "shard_pictures")])
def test_every_field_is_needed(missing: str) -> None:
    tree = {key: value for key, value in WHOLE.items() if key != missing}
    with pytest.raises(UserError, match=rf"damaged \({missing}: Field required\)"):
        read_manifest(json.dumps(tree), "m")


@pytest.mark.parametrize("text", ["", "{", json.dumps(WHOLE)[:-20], "\x00", b"\xff\xfe{}"])
def test_text_that_is_no_json(text: str | bytes) -> None:
    with pytest.raises(UserError, match="m is damaged"):
        read_manifest(text, "m")


@pytest.mark.parametrize("text", ["[]", "{}", "3", "null", '{"format": "webapp", "version": 1}'])
def test_other_manifests(text: str) -> None:
    with pytest.raises(UserError, match="not the manifest of a latent store"):
        read_manifest(text, "m")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_other_versions(version: Any) -> None:
    with pytest.raises(UserError, match=r"has version .*, this package reads version 1: install a newer one"):
        read_manifest(changed(version=version), "m")
