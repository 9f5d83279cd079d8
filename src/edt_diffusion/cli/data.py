"""`edt data`: look at pictures and latent stores, check them, bring stores into other forms."""

import inspect as introspection
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from .output import finish, quiet_libraries

_FORMS = ("npy", "parquet", "pictures", "store")
_MOST_PROBLEMS = 20
_NO_STORE = "is for latent stores, and {} is none: leave it out"


def inspect(
    path: str = typer.Argument(metavar="PATH", help="Pictures (as for edt encode) or a latent store."),
    out: Path = typer.Option(None, "--out", help="Folder for inspect.json and a contact sheet for each class."),
    size: str = typer.Option(None, "--size", help="Of pictures, for the channels' statistics (default: 256)."),
    sheet: int = typer.Option(24, "--sheet", min=0, help="Pictures on a contact sheet; 0 for no sheets."),
    sample: int = typer.Option(None, "--sample", min=1, help="Rows of a store to measure again (default: 4096)."),
    codec: str = typer.Option(None, "--codec", help="Autoencoder of a store that holds no copy."),
    label_column: str = typer.Option(None, "--label-column", help="Of tables; none reads no labels (default: label)."),
    image_column: str = typer.Option(None, "--image-column", help="Of tables (default: image)."),
    split: str = typer.Option(None, "--split", help="Of a source with several, such as train."),
    streaming: bool = typer.Option(False, "--streaming", help="Read a hub's set without downloading it first."),
    workers: int = typer.Option(None, "--workers", min=1, help="Threads that read and decode (default: cores, to 8)."),
    device: str = typer.Option(None, "--device", help="Such as cuda:0 or cpu (default: a GPU if there is one)."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Say what pictures or a latent store hold: classes, sizes, channels, duplicates, and what cannot be read.

    Example: edt data inspect pictures/ --out report/
    """
    from ..data.encoding_job import parse_size
    from ..data.inspection import describe, inspect_pictures, inspect_store

    wanted = parse_size(size or "256")
    _keep_out(path, out)
    quiet_libraries()
    of_pictures = _reading(image_column, label_column, split, streaming) | {"--size": size, "--workers": workers}
    if _is_store(path):
        _refuse_given(of_pictures, f"is for pictures, and {path} is a latent store: leave it out")
        with _progress("reading", "rows", quiet or as_json) as told:
            facts = inspect_store(path, out, sheet, sample or 4096, codec, device, told)
    else:
        _refuse_given({"--codec": codec, "--sample": sample, "--device": device}, _NO_STORE.format(path))
        source = _source(path, image_column, label_column, split, streaming)
        with _progress("inspecting", "pictures", quiet or as_json) as told:
            facts = inspect_pictures(source, wanted, out, sheet, workers, told)
    finish(describe(facts, out), facts, as_json)


def verify(
    path: str = typer.Argument(metavar="PATH", help="A latent store, or pictures (as for edt encode)."),
    pictures: str = typer.Option(None, "--pictures", help="What the store was made of, to compare it with."),
    limit: int = typer.Option(None, "--limit", min=1, help="Compare that many pictures, evenly spaced."),
    codec: str = typer.Option(None, "--codec", help="Autoencoder of a store that holds no copy."),
    batch_size: int = typer.Option(None, "--batch-size", min=1, help="Rows decoded at once (default: 16)."),
    label_column: str = typer.Option(None, "--label-column", help="Of tables; none reads no labels (default: label)."),
    image_column: str = typer.Option(None, "--image-column", help="Of tables (default: image)."),
    split: str = typer.Option(None, "--split", help="Of a source with several, such as train."),
    streaming: bool = typer.Option(False, "--streaming", help="Read a hub's set without downloading it first."),
    workers: int = typer.Option(None, "--workers", min=1, help="Threads that read and decode (default: cores, to 8)."),
    device: str = typer.Option(None, "--device", help="Such as cuda:0 or cpu (default: a GPU if there is one)."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Check a store byte by byte, or decode every picture. Exits with 1 when something is wrong.

    With --pictures, the pictures are compared with those that were encoded, and with what the store's autoencoder
    makes of its latents: the PSNR of the round trip.

    Example: edt data verify latents/ --pictures pictures/ --limit 1000
    """
    from ..data.inspection import compare_pictures, store_codec, verify_pictures, verify_store
    from ..data.latents import LatentStore
    from ..util.errors import UserError

    quiet_libraries()
    of_stores = {"--limit": limit, "--codec": codec, "--batch-size": batch_size, "--device": device}
    if not _is_store(path):
        if pictures is not None:
            raise UserError(f"{path!r} is no latent store: leave --pictures out to check the pictures themselves")
        _refuse_given(of_stores, _NO_STORE.format(path))
        source = _source(path, image_column, label_column, split, streaming)
        with _progress("decoding", "pictures", quiet or as_json) as told:
            count, failures = verify_pictures(source, workers, told)
        lines = [f"{entry['picture']}: {entry['reason']}" for entry in failures]
        facts = {"path": path, "pictures": count, "unreadable": failures, "whole": not failures}
        good = f"all {count} pictures of {path} can be decoded"
        _verdict(lines, good, f"{len(failures)} of {count} pictures of {path} cannot be decoded", facts, as_json)
        return
    if pictures is None:
        of_pictures = _reading(image_column, label_column, split, streaming) | {"--workers": workers}
        _refuse_given(of_stores | of_pictures, "is for comparing a store: name its --pictures, or leave it out")
    with _progress("verifying", "shards", quiet or as_json) as told:
        problems = verify_store(path, told)
    facts: dict[str, Any] = {"path": path, "problems": problems}
    good = f"{path} is whole"
    if pictures is not None and not problems:
        store = LatentStore.open(path)
        source = _source(pictures, image_column, label_column, split, streaming)
        decoder = store_codec(store, codec, device)
        with _progress("comparing", "pictures", quiet or as_json) as told:
            trip = compare_pictures(store, source, decoder, limit, batch_size or 16, workers, told)
        facts["round_trip"] = trip.facts()
        for name, what in (("missing", "is missing"), ("changed", "has changed"), ("relabelled", "changed class")):
            problems += [f"{key}: {what} in {pictures} since it was encoded" for key in getattr(trip, name)]
        problems += [f"{key}: is in {pictures}, but not in the store" for key in trip.added]
        good += f"; {_round_trip(facts['round_trip'])}"
    facts["whole"] = not problems
    rest = "" if pictures is None or "round_trip" in facts else "; the pictures were not compared"
    _verdict(problems, good, f"{_count(len(problems), 'problem')} in {path}{rest}", facts, as_json)


def convert(
    source: str = typer.Argument(metavar="SOURCE", help="A latent store; for --to store, folders of npy files."),
    out: Path = typer.Argument(metavar="OUT", help="The folder to make."),
    to: str = typer.Option(None, "--to", help="npy (the authors' layout), parquet, pictures (PNG), or store."),
    codec: str = typer.Option(None, "--codec", help="To store: the autoencoder the features are of."),
    scaling_factor: float = typer.Option(None, "--scaling-factor", help="To store, without --codec: such as 0.18215."),
    dtype: str = typer.Option("float16", "--dtype", help="To store: float16, or float32."),
    seed: int = typer.Option(0, "--seed", min=0, help="To npy: of the one draw that each picture gets."),
    size: str = typer.Option(None, "--size", help="To npy or pictures: take the pictures of this size only."),
    limit: int = typer.Option(None, "--limit", min=1, help="To pictures: that many, evenly spaced."),
    batch_size: int = typer.Option(16, "--batch-size", min=1, help="To pictures: rows decoded at once."),
    device: str = typer.Option(None, "--device", help="Such as cuda:0 or cpu (default: a GPU if there is one)."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Bring a latent store into another form, or the authors' npy files into a store. OUT appears when it is whole.

    npy files hold one draw of each picture, frozen; a store made of them cannot draw anew.

    Example: edt data convert latents/ looks/ --to pictures --limit 100
    """
    from ..data import exchange
    from ..data.encoding_job import parse_size
    from ..data.inspection import store_codec
    from ..data.latents import LatentStore
    from ..data.shard_files import is_store
    from ..util.errors import UserError
    from ..util.lookup import nearest

    if to not in _FORMS:
        guess = nearest(to or "", _FORMS)
        hint = f" (did you mean {guess}?)" if guess else ""
        raise UserError(f"--to {to}: expected one of {', '.join(_FORMS)}{hint}")
    if dtype not in ("float16", "float32"):
        raise UserError(f"--dtype {dtype}: expected float16 or float32")
    wanted = None if size is None else parse_size(size)
    _refuse_stray(
        to,
        {
            "--scaling-factor": (scaling_factor is not None, ("store",)),
            "--codec": (codec is not None, ("store", "pictures")),
            "--size": (size is not None, ("npy", "pictures")),
            "--limit": (limit is not None, ("pictures",)),
        },
    )
    quiet_libraries()
    facts: dict[str, Any] = {"folder": str(out), "to": to}
    if to == "store":
        if is_store(source):
            raise UserError(f"{source!r} is a latent store already: --to store takes folders of npy files")
        with _progress("converting", "files", quiet or as_json) as told:
            manifest = exchange.from_npy(Path(source), out, codec, scaling_factor, dtype, told)
        finish(f"made a latent store of {manifest.rows} rows in {out}", {**facts, "rows": manifest.rows}, as_json)
        return
    if Path(source).is_dir() and exchange.is_npy_layout(Path(source)) and not is_store(source):
        raise UserError(f"{source!r} holds npy files, which become a store only: use --to store")
    store = LatentStore.open(source)
    if wanted is not None:
        if wanted not in [bucket.pictures for bucket in store.manifest.buckets]:
            there = ", ".join(f"{height}x{width}" for height, width in (b.pictures for b in store.manifest.buckets))
            raise UserError(f"--size {size}: {store.source} holds pictures of {there}; name one of these")
        store = store.select_size(*wanted)
    with _progress("converting", "rows", quiet or as_json) as told:
        if to == "npy":
            name = exchange.to_npy(store, out, seed, told)
            facts |= {"rows": len(store), "features": name}
            message = f"wrote {len(store)} features and labels into {out / name} and beside it"
        elif to == "parquet":
            count = exchange.to_parquet(store, out, told)
            facts |= {"rows": len(store), "files": count}
            message = f"wrote {len(store)} rows in {_count(count, 'Parquet file')} into {out}"
        else:
            count = exchange.to_pictures(store, store_codec(store, codec, device), out, limit, batch_size, told)
            facts |= {"pictures": count}
            message = f"decoded {_count(count, 'picture')} of {len(store)} into {out}"
    finish(message, facts, as_json)


data = typer.Typer(name="data", rich_markup_mode=None)


@data.callback(invoke_without_command=True, epilog="Example: edt data inspect pictures/")
def about(context: typer.Context) -> None:
    """Look at pictures and latent stores, check them, bring stores into other forms."""
    if context.invoked_subcommand is None:
        print(context.get_help(), flush=True)


for _command, _short in (
    (inspect, "What pictures or a latent store hold."),
    (verify, "Whether every byte is right, or every picture readable."),
    (convert, "A store as npy, Parquet or pictures; npy as a store."),
):
    _text, _, _example = introspection.getdoc(_command).rpartition("\n\n")  # pyright: ignore[reportOptionalMemberAccess]
    data.command(help=_text, short_help=_short, epilog=f"\b\n{_example}")(_command)


def _is_store(path: str) -> bool:
    """Whether a path is a latent store, an unfinished one included: opening that will say so."""
    from ..data.encode_folder import PLAN
    from ..data.shard_files import is_store

    return is_store(path) or (Path(path).expanduser() / PLAN).is_file()


def _source(path: str, image_column: str | None, label_column: str | None, split: str | None, streaming: bool) -> Any:
    from ..data.sources import find_source

    image, label = image_column or "image", None if label_column == "none" else label_column or "label"
    return find_source(path, image_column=image, label_column=label, split=split, streaming=streaming)


def _reading(image_column: str | None, label_column: str | None, split: str | None, streaming: bool) -> dict[str, Any]:
    """The options by which pictures are found; None for those not given."""
    columns = {"--image-column": image_column, "--label-column": label_column}
    return {**columns, "--split": split, "--streaming": streaming or None}


@contextmanager
def _progress(doing: str, unit: str, quiet: bool) -> Iterator[Any]:
    from ..util.progress import CountProgress

    with CountProgress(doing, unit, quiet) as told:
        yield lambda done, total, failed: told(done, total, f"{_count(failed, 'problem')}" if failed else "")


def _verdict(problems: list[str], good: str, bad: str, facts: dict[str, Any], as_json: bool) -> None:
    """Print the problems, and the verdict last; leave with code 1 if there are problems."""
    from ..data.inspection.summary import shown

    if not as_json:
        for problem in problems[:_MOST_PROBLEMS]:
            print(shown(problem))
        if len(problems) > _MOST_PROBLEMS:
            print(f"and {len(problems) - _MOST_PROBLEMS} more; --json lists all")
    finish(shown(bad if problems else good), facts, as_json)
    if problems:
        raise typer.Exit(1)


def _round_trip(found: dict[str, Any]) -> str:
    text = f"{_count(found['pictures'], 'picture')} compared"
    if found["identical"]:
        text += f", {found['identical']} come back bit for bit"
    if ratio := found["psnr"]:
        text += f", PSNR {ratio['mean']:.2f} dB (median {ratio['median']:.2f}, lowest {ratio['min']:.2f}: "
        text += f"{ratio['worst']})"
    return text


def _keep_out(path: str, out: Path | None) -> None:
    """Sheets among the pictures would be pictures of the next run."""
    from ..util.errors import UserError

    folder = Path(path).expanduser()
    if out is not None and folder.is_dir() and out.expanduser().resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} lies in {path}, which is looked at: name a folder elsewhere")


def _refuse_stray(to: str, options: dict[str, tuple[bool, tuple[str, ...]]]) -> None:
    from ..util.errors import UserError

    for name, (given, forms) in options.items():
        if given and to not in forms:
            raise UserError(f"{name} is for --to {' or '.join(forms)}, not --to {to}: leave it out")


def _refuse_given(options: dict[str, Any], why: str) -> None:
    """Refuse options that would do nothing; those not given are None."""
    from ..util.errors import UserError

    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name} {why}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
