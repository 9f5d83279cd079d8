"""`edt encode`."""

import sys
from pathlib import Path

import typer

from .output import finish, quiet_libraries


def encode(
    pictures: str = typer.Argument(metavar="PICTURES", help="Folder, table, archive, hub name or URL of pictures."),
    codec: str = typer.Option(None, "--codec", metavar="VAE", help="Autoencoder: folder or hub id; none keeps pixels."),
    out: Path = typer.Option(None, "--out", metavar="FOLDER", help="The latent store."),
    size: str = typer.Option("256", "--size", metavar="H[xW],...", help="Pixels; of several, the nearest in shape."),
    crop: str = typer.Option("center", "--crop", metavar="NAME", help="center, random (both ADM) or resize."),
    flips: str = typer.Option("one", "--flips", metavar="NAME", help="one, or both for data.flip=true."),
    channels: int = typer.Option(3, "--channels", metavar="N", help="3 (RGB) or 1 (grayscale)."),
    dtype: str = typer.Option("float16", "--dtype", metavar="NAME", help="float16 or float32."),
    batch_size: int = typer.Option(None, "--batch-size", min=1, metavar="N", help="Encoded at once (GPU 32, CPU 2)."),
    shard_pictures: int = typer.Option(None, "--shard-pictures", min=1, metavar="N", help="A shard (1024, 64 MiB)."),
    workers: int = typer.Option(None, "--workers", min=1, metavar="N", help="Threads that decode (cores, to 8)."),
    strict: bool = typer.Option(False, "--strict", help="Stop at the first unreadable picture."),
    seed: int = typer.Option(0, "--seed", min=0, metavar="N", help="Seed of random crops."),
    label_column: str = typer.Option("label", "--label-column", metavar="NAME", help="In tables; none: no labels."),
    image_column: str = typer.Option("image", "--image-column", metavar="NAME", help="In tables."),
    split: str = typer.Option(None, "--split", metavar="NAME", help="Which, if the source has several."),
    streaming: bool = typer.Option(False, "--streaming", help="Read a hub's set without a download."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Such as cuda:0 (a GPU, else cpu)."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Encode pictures into a latent store that edt train reads. Interrupted, run the same command again to go on.

    Pictures that cannot be read are skipped, counted and listed in report.json. Several processes share the work under
    accelerate launch or torchrun --nproc_per_node N -m edt_diffusion encode ...

    Example: edt encode pictures/ --codec stabilityai/sd-vae-ft-ema --out latents/
    """
    from ..data.encode import EncodeSettings
    from ..data.encoding_job import encode_pictures, parse_size, processes
    from ..data.sources import find_source
    from ..util.errors import UserError
    from ..util.progress import CountProgress

    if codec is None:
        raise UserError("no autoencoder given: name one by --codec (a folder or hub id), or --codec none for pixels")
    if out is None:
        raise UserError("no place for the store given: name a folder by --out")
    for name, value, known in (
        ("--crop", crop, ("center", "random", "resize")),
        ("--flips", flips, ("one", "both")),
        ("--dtype", dtype, ("float16", "float32")),
        ("--channels", channels, (1, 3)),
    ):
        if value not in known:
            raise UserError(f"{name} {value}: expected {' or '.join(map(str, known))}")
    rank, world_size = processes()
    settings = EncodeSettings(
        sizes=[parse_size(part.strip()) for part in size.split(",")],
        channels=channels,  # pyright: ignore[reportArgumentType]
        crop=crop,  # pyright: ignore[reportArgumentType]
        seed=seed,
        flips=flips,  # pyright: ignore[reportArgumentType]
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        shard_pictures=shard_pictures,
        workers=workers,
        strict=strict,
        rank=rank,
        world_size=world_size,
    )
    if codec == "none" and dtype != "float16":
        raise UserError(f"--dtype {dtype} is for latents, and --codec none keeps pixels of 8 bits: leave it out")
    here = Path(pictures).expanduser()
    if here.is_dir() and out.expanduser().resolve().is_relative_to(here.resolve()):
        raise UserError(f"--out {out} lies in {pictures}, among the pictures: name a folder elsewhere")
    quiet_libraries()
    source = find_source(
        pictures,
        image_column=image_column,
        label_column=None if label_column == "none" else label_column,
        split=split,
        streaming=streaming,
    )
    with CountProgress("encoding", "images", quiet or as_json or rank > 0) as told:

        def progress(done: int, total: int | None, skipped: int) -> None:
            told(done, total, f"{skipped} unreadable" if skipped else "")

        try:
            made = encode_pictures(source, None if codec == "none" else codec, out, settings, device, progress)
        except KeyboardInterrupt:
            print(f"stopped; finished shards are kept in {out}: run the same command again to go on", file=sys.stderr)
            raise typer.Exit(130) from None
        rate = told.rate
    facts = {
        "folder": str(out),
        "pictures": made.pictures,
        "rows": made.rows,
        "skipped": made.skipped,
        "encoded_now": made.made,
        "images_per_second": round(rate, 2),
        "finished": made.finished,
    }
    if not made.finished:  # whichever process is the last prints the outcome
        if not quiet:
            print(f"process {rank} has done its shards of {out}; others are still at theirs", file=sys.stderr)
        return
    message = f"encoded {made.rows} of {made.pictures} pictures at {rate:.1f} images/s into {out}"
    if not made.made:
        message = (
            f"{made.rows} of {made.pictures} pictures are encoded already in {out}; their contents were not compared "
            "(edt data verify --pictures does that)"
        )
    if made.skipped:
        message += f"; {made.skipped} could not be read, see {out / 'report.json'}"
    if made.empty_classes:
        message += f"; classes without a readable picture: {', '.join(made.empty_classes[:5])}"
    finish(message, facts | {"empty_classes": made.empty_classes}, as_json)
