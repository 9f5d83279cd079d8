"""`edt sample`."""

import math
import re
from pathlib import Path

import typer

from .output import finish, quiet_libraries


def sample(
    model: str = typer.Argument(metavar="MODEL", help="Run folder, diffusers folder or hub name."),
    classes: str = typer.Option(
        None, "--classes", help="Class names or numbers, separated by commas (default: every class)."
    ),
    number: int = typer.Option(8, "-n", "--number", min=1, help="Pictures per class."),
    guidance: float = typer.Option(2.0, "--guidance", min=0.0, help="Guidance scale; 1 is off."),
    guidance_channels: str = typer.Option("all", "--guidance-channels", help="all, or authors (first three)."),
    scheduler: str = typer.Option(
        None, "--scheduler", help="ddpm, ddim, dpm++; flow: euler, heun, dpm++ (default: its own)."
    ),
    steps: int = typer.Option(None, "--steps", min=1, help="Sampling steps (default: the scheduler's usual number)."),
    amm: str = typer.Option(
        "saved", "--amm", help="saved, off, on, auto (published), a preset, or blocks such as 7,10."
    ),
    amm_formula: str = typer.Option("exp", "--amm-formula", help="exp or cos, with --amm blocks."),
    amm_radius: str = typer.Option(None, "--amm-radius", help="Cells, or such as 0.9R, with --amm blocks."),
    seed: int = typer.Option(0, "--seed", help="Seed; picture i of a class depends on it and on i only."),
    batch_size: int = typer.Option(64, "--batch-size", min=1, help="Pictures computed at once."),
    out: Path = typer.Option(Path("samples"), "--out", help="Folder for the pictures and grid.png."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Make pictures of the classes you name.

    Example: edt sample runs/a --classes tench,church -n 8 --guidance 2
    """
    import numpy as np

    from ..pipelines.loading import load_pipeline
    from ..pipelines.modulation import choose_modulation
    from ..util.errors import UserError
    from ..util.files import make_folder
    from ..util.pictures import grid, save_png, to_pil
    from ..util.rng import image_seed

    quiet_libraries()
    pipeline = load_pipeline(model)
    count = pipeline.transformer.config.num_classes
    wanted = None if classes is None else _class_list(classes, pipeline.class_names or [])
    if wanted == []:
        raise UserError(f"--classes {classes!r} names no class: give names or numbers, separated by commas")
    if not math.isfinite(guidance):
        raise UserError(f"--guidance {guidance}: expected a finite number, such as 2")
    longest = pipeline.scheduler.config.num_train_timesteps
    if steps is not None and steps > longest:
        raise UserError(f"--steps {steps}: the model's noising process has {longest} steps, give at most as many")
    rows = pipeline.resolve_labels(wanted if wanted is not None or count is None else list(range(count)))
    rows = None if rows is None else list(dict.fromkeys(rows))
    names = pipeline.class_names or [str(number) for number in range(count or 0)]
    choose_modulation(pipeline.transformer, amm, amm_formula, amm_radius, guidance)
    labels = None if rows is None else [label for label in rows for _ in range(number)]
    seeds = [image_seed(seed, index) for index in range(number)] * (1 if rows is None else len(rows))
    make_folder(out)
    pipeline.set_progress_bar_config(disable=quiet or None, leave=False)  # None: in terminals only
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
    stems = _file_stems(row_names) or ["image"]
    for index, image in enumerate(images):
        files.append(out / f"{stems[index // number]}-{index % number:04d}.png")
        save_png(to_pil(np.asarray(image)), files[-1])
    save_png(grid(images, number, row_names), out / "grid.png")
    facts = {"folder": str(out), "pictures": [str(file) for file in files], "grid": str(out / "grid.png"), "seed": seed}
    finish(f"wrote {len(files)} pictures and grid.png to {out}", facts, as_json)


def _file_stems(names: list[str]) -> list[str]:
    """File names for class names, different where those are: "a/b" and "a b" become "a_b_0" and "a_b_1"."""
    stems = [re.sub(r"[^\w-]", "_", name) for name in names]
    alike = [stem.casefold() for stem in stems]
    return [stem if alike.count(stem.casefold()) == 1 else f"{stem}_{row}" for row, stem in enumerate(stems)]


def _class_list(text: str, names: list[str]) -> list[str]:
    """Split at commas, but keep together what is the name of a class with commas in it."""
    parts = [part.strip() for part in text.split(",")]
    out: list[str] = []
    while parts:
        joined = [", ".join(parts[:end]) for end in range(len(parts), 1, -1)]
        spaceless = {re.sub(r"\s*,\s*", ", ", name): name for name in names}
        match = next((end for end, name in zip(range(len(parts), 1, -1), joined, strict=True) if name in spaceless), 1)
        out.append(spaceless.get(", ".join(parts[:match]), parts[0]))
        parts = parts[match:]
    return [name for name in out if name]
