"""`edt sample`."""

from pathlib import Path

import typer

from .output import finish


def sample(
    model: str = typer.Argument(help="Run folder, diffusers folder or hub name."),
    classes: str = typer.Option(
        None, "--classes", help="Class names or numbers, separated by commas (default: every class)."
    ),
    number: int = typer.Option(8, "-n", "--number", min=1, help="Pictures per class."),
    guidance: float = typer.Option(2.0, "--guidance", min=0.0, help="Guidance scale; 1 is off."),
    guidance_channels: str = typer.Option("all", "--guidance-channels", help="all, or authors (first three)."),
    scheduler: str = typer.Option(None, "--scheduler", help="ddpm, ddim or dpm++ (default: the model's own)."),
    steps: int = typer.Option(None, "--steps", min=1, help="Sampling steps (default: the scheduler's usual number)."),
    amm: str = typer.Option(
        "saved", "--amm", help="saved, off, auto (published placement), or blocks such as 7,10."
    ),
    seed: int = typer.Option(0, "--seed", help="Seed; picture i of a class depends on it and on i only."),
    batch_size: int = typer.Option(64, "--batch-size", min=1, help="Pictures computed at once."),
    out: Path = typer.Option(Path("samples"), "--out", help="Folder for the pictures and grid.png."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Make pictures of the classes you name.

    Example: edt sample runs/mine --classes tench,parachute -n 8 --guidance 2 --out samples/
    """
    import numpy as np

    from ..assemble import load_pipeline
    from ..util.errors import UserError
    from ..util.pictures import grid, to_pil
    from ..util.rng import image_seed

    pipeline = load_pipeline(model)
    count = pipeline.transformer.config.num_classes
    wanted = [part.strip() for part in classes.split(",") if part.strip()] if classes else None
    rows = pipeline.resolve_labels(wanted if wanted is not None or count is None else list(range(count)))
    names = pipeline.class_names or [str(number) for number in range(count or 0)]
    if amm in ("off", "auto"):
        pipeline.transformer.set_attention_modulation(
            preset="auto" if amm == "auto" else None, guidance_scale=guidance
        )
    elif amm != "saved":
        try:
            pipeline.transformer.set_attention_modulation([int(block) for block in amm.split(",")])
        except ValueError as error:
            raise UserError(f"--amm {amm}: expected saved, off, auto or block numbers such as 7,10 ({error})") from None
    labels = None if rows is None else [label for label in rows for _ in range(number)]
    seeds = [image_seed(seed, index) for index in range(number)] * (1 if rows is None else len(rows))
    out.mkdir(parents=True, exist_ok=True)
    pipeline.set_progress_bar_config(disable=quiet, leave=False)
    images = pipeline(
        labels,
        guidance_scale=guidance if rows is not None else 1.0,
        guidance_channels=guidance_channels,
        num_inference_steps=steps,
        scheduler=scheduler,
        seeds=seeds,
        batch_size=batch_size,
        output_type="uint8",
    ).images  # pyright: ignore[reportAttributeAccessIssue]
    row_names = [] if rows is None else [names[label] for label in rows]
    files = []
    for index, image in enumerate(images):
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in row_names[index // number]) if row_names else "image"
        files.append(out / f"{name}-{index % number:04d}.png")
        to_pil(np.asarray(image)).save(files[-1])
    grid(images, number, row_names).save(out / "grid.png")
    facts = {"folder": str(out), "pictures": [str(file) for file in files], "grid": str(out / "grid.png"), "seed": seed}
    finish(f"wrote {len(files)} pictures and grid.png to {out}", facts, as_json)
