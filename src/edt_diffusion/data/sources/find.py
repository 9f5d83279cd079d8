"""The one entry: what is it that a path names?"""

import contextlib
import json
import os
import zipfile
from dataclasses import dataclass, replace

from ...util.errors import UserError
from ...util.lookup import nearest
from ..picture import decoding_error
from .archives import open_tars
from .base import Source, StreamedSource, split_of
from .built_in import BUILT_IN
from .folder import open_tree, pick_split, wrapper
from .hub import is_saved, looks_like_hub_name, open_hub, open_saved, stream_files
from .listing import Listing
from .metadata import METADATA_FILES, open_metadata
from .options import SPLIT
from .storage import LocalFolder, RemoteFolder, Storage, file_system, is_pattern, local_path, match_files, read_whole
from .table_files import TABLE_EXTENSIONS, open_tables, pick_files, split_of_file

_EXPECTED = (
    "a folder of pictures, a .parquet, .arrow, .tar or .zip file or a folder of them, a dataset of the Hugging Face "
    f"hub, a URL of one of these, or a built-in set ({', '.join(BUILT_IN)})"
)
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")


def find_source(
    path: str | os.PathLike[str],
    *,
    image_column: str = "image",
    label_column: str | None = "label",
    split: str | None = None,
    streaming: bool = False,
) -> Source | StreamedSource:
    """Tell what `path` is, list it and read its labels; no picture is decoded.

    Args:
        path: one of these, as a local path or as a URL that fsspec knows ("s3://bucket/folder"):
            - a folder with one sub-folder per class: a picture's class is the first folder it lies in, at any depth,
            - a folder of pictures (unlabelled),
            - a folder with a `metadata.csv` or `metadata.jsonl` that names pictures in the column `file_name`,
            - `.parquet` or `.arrow` files, or a folder of them,
            - `.tar` files, WebDataset or folders of classes, or a folder of them,
            - a `.zip` file with any of the folders above,
            - a folder saved by `save_to_disk` of `datasets`,
            - files of the same kind by a pattern: `shards-{000..009}.tar`, `{a,b}.parquet`, `*.tar`,
            or, if nothing local has that name, a dataset of the Hugging Face hub ("user/name"), or the built-in set
            `digits`: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (a folder of that name is
            `./digits`).
        image_column: the column of tables that holds the encoded pictures.
        label_column: the column of tables and metadata, or the entry of WebDataset's `.json`, that holds the labels
            (integers, class labels or strings); None reads no labels there. A table of nothing but pictures is
            unlabelled unless another column than "label" is asked for.
        split: which split, where folders, files or datasets are split ("train", "validation", "test"); of the hub it
            is "train" unless given.
        streaming: read datasets of the hub, and tables behind a URL, row by row instead of copying them. Everything
            else is read in place anyway, and ignores it.

    Returns:
        A `Source`; a `StreamedSource` for what `streaming` applies to.

    Raises:
        UserError: it is missing, holds no pictures, or none of the layouts that can be read; labels do not fit.
    """
    name = os.fspath(path)
    options = _Options(image_column, label_column, split, streaming)
    if name in BUILT_IN:
        if split is not None:
            raise UserError(
                f"{name!r} has no split {split!r}: a built-in set is not split; leave the split ({SPLIT}) out"
            )
        return BUILT_IN[name]()
    if not name:
        raise UserError(f"the path of the pictures is empty: expected {_EXPECTED}")
    location = local_path(name)
    if location is None:
        return _open_url(name, options)
    if os.path.isdir(location):  # unlike Path's own tests these never raise
        return _open_folder(LocalFolder(str(location)), options)
    if os.path.isfile(location):
        return _open_files(LocalFolder(str(location.parent)), [location.name], options)
    if is_pattern(name):
        return _open_files(*match_files(str(location)), options)
    siblings = []
    with contextlib.suppress(OSError, ValueError):
        siblings = os.listdir(location.parent)
    guess = nearest(location.name, [*siblings, *BUILT_IN])
    # A path with a typo in it must not send anybody to the network: "pictures/trian" where pictures/ is a folder here.
    if "/" in name and not os.path.isdir(location.parent) and looks_like_hub_name(name):
        return open_hub(
            name,
            image_column=image_column,
            label_column=label_column,
            split=split or "train",
            streaming=streaming,
            guess=guess,
        )
    raise UserError(f"{name!r} does not exist: expected {_EXPECTED}" + (f" (did you mean {guess!r}?)" if guess else ""))


@dataclass(frozen=True)
class _Options:
    image_column: str
    label_column: str | None
    split: str | None
    streaming: bool


def _open_url(url: str, options: _Options) -> Source | StreamedSource:
    try:
        if is_pattern(url):
            return _open_files(*match_files(url), options)
        fs, path = file_system(url)
        head, chain, rest = url.partition("::")
        if _is_container(head) and fs.isfile(path):
            scheme, _, inner = head.partition("://")
            folder, slash, file = inner.rpartition("/")
            return _open_files(RemoteFolder(f"{scheme}://{folder}{slash}{chain}{rest}"), [file], options)
        return _open_folder(RemoteFolder(url), options)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each driver has exceptions of its own
        raise UserError(
            f"{url!r} cannot be read: {type(error).__name__}: {decoding_error(error)}; check the address, the network "
            "and the rights to read it"
        ) from error


def _is_container(name: str) -> bool:
    return name.lower().endswith((*TABLE_EXTENSIONS, ".tar", ".zip", *_COMPRESSED))


def _open_files(storage: Storage, files: list[str], options: _Options) -> Source | StreamedSource:
    """Open files that were named one by one."""
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    first = storage.full(files[0])
    if kinds & set(_COMPRESSED):
        raise UserError(f"{first!r} is compressed, so that no picture in it can be reached directly: unpack it first")
    if kinds == {".zip"} and len(files) == 1:
        return _open_zip(storage, files[0], options)
    if kinds == {".tar"}:
        return _open_tars(storage, files, None, options)
    if kinds <= set(TABLE_EXTENSIONS):
        return _open_tables(storage, files, Listing(), options)
    raise UserError(f"{first!r} is a single file and not a .parquet file: expected {_EXPECTED}")


def _open_folder(storage: Storage, options: _Options, listing: Listing | None = None) -> Source | StreamedSource:
    where = storage.full("")
    listing = storage.list() if listing is None else listing
    if not (listing.pictures or listing.others or listing.skipped or listing.folders) and "://" in where:
        raise UserError(f"{where!r} does not exist or is empty: expected {_EXPECTED}; check the address")
    top = listing.top()
    _refuse_latents(storage, top)
    columns = {"image_column": options.image_column, "label_column": options.label_column}
    if is_saved(top):
        return open_saved(storage, **columns, split=options.split)
    tables = [name for name in top if os.path.splitext(name)[1].lower() in TABLE_EXTENSIONS]
    if tables:
        return _open_tables(storage, tables, listing, options)
    packed = any("/" in name for name in listing.pictures)  # then a tar beside them is what they came in
    tars = [name for name in top if name.lower().endswith(".tar")]
    if tars and not packed:
        return _open_tars(storage, tars, listing, options)
    metadata = [name for name in METADATA_FILES if name in top]
    if len(metadata) > 1:
        raise UserError(f"{where!r} holds both {metadata[0]} and {metadata[1]}: expected one of them; remove the other")
    if metadata and options.split is None:
        return open_metadata(storage, listing, metadata[0], options.label_column)
    loose = any("/" not in name for name in listing.pictures)
    folders = [] if loose else _with_content(listing)
    inner = _with_content(listing.below(folders[0])) if len(folders) == 1 else []
    if inner and all(split_of(name) for name in inner):  # somebody named the folder around a split set
        return _open_folder(storage.below(folders[0]), options, listing.below(folders[0]))
    folder = pick_split(folders, options.split, where)
    if folder is not None:
        return _open_folder(storage.below(folder), replace(options, split=None), listing.below(folder))
    return open_tree(storage, listing)


def _with_content(listing: Listing) -> list[str]:
    """The folders directly below the root with something to read in them."""
    readable = (*TABLE_EXTENSIONS, ".tar")
    files = (*listing.pictures, *(name for name in listing.others if name.lower().endswith(readable)))
    return sorted({name.split("/", 1)[0] for name in files if "/" in name})


def _refuse_latents(storage: Storage, names: list[str]) -> None:
    if "manifest.json" not in names:
        return
    try:
        manifest = json.loads(read_whole(storage, "manifest.json"))
    except (OSError, ValueError):
        return
    if isinstance(manifest, dict) and manifest.get("format") == "edt-latents":
        raise UserError(
            f"{storage.full('')!r} is a store of latents: expected pictures; give the pictures it was encoded from"
        )


def _open_tables(storage: Storage, tables: list[str], listing: Listing, options: _Options) -> Source | StreamedSource:
    columns = {"image_column": options.image_column, "label_column": options.label_column}
    files = pick_files(sorted(tables), options.split, storage.full(""))
    if options.streaming and isinstance(storage, RemoteFolder):
        return stream_files(storage, files, **columns)
    found = open_tables(storage, files, **columns)
    return replace(found, problems=listing.problems(tables, unused_pictures="a picture beside Parquet or Arrow files"))


def _open_tars(storage: Storage, tars: list[str], listing: Listing | None, options: _Options) -> Source:
    files, split = sorted(tars) if listing is not None else tars, options.split
    if any(split_of_file(file) for file in files):  # else the split may be a folder inside
        files, split = pick_files(files, split, storage.full("")), None
    return open_tars(storage, files, listing, label_column=options.label_column, split=split)


def _open_zip(storage: Storage, file: str, options: _Options) -> Source | StreamedSource:
    where = storage.full(file)
    url = where if "://" in where else f"file://{os.path.abspath(where)}"
    inside: Storage = RemoteFolder(f"zip://::{url}")
    try:
        listing = inside.list()
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{where!r} cannot be read as a zip: {decoding_error(error)}; unpack it first") from error
    while (folder := wrapper(listing)) is not None and split_of(folder) is None:
        inside, listing = inside.below(folder), listing.below(folder)
    return _open_folder(inside, options, listing)
