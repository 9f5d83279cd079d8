"""`edt edit`."""

from pathlib import Path
from typing import Any

import typer

from .output import finish, quiet_libraries


def edit(
    model: str = typer.Argument(metavar="MODEL", help="Run folder, diffusers folder or hub name."),
    picture: Path = typer.Argument(metavar="PICTURE", help="The picture to change."),
    wanted: str = typer.Option(None, "--class", metavar="NAME", help="Name or number of the class to make."),
    mask: Path = typer.Option(
        None, "--mask", metavar="FILE", help="Of the picture's size: white or transparent is made anew, black is kept."
    ),
    strength: float = typer.Option(
        None, "--strength", metavar="X", help="Without a mask: how much noise, in (0, 1] (0.6)."
    ),
    number: int = typer.Option(4, "-n", "--number", min=1, metavar="N", help="Results."),
    guidance: float = typer.Option(2.0, "--guidance", min=0.0, metavar="X", help="Guidance scale; 1 is off."),
    seed: int = typer.Option(0, "--seed", metavar="N", help="Result i depends on it and on i."),
    scheduler: str = typer.Option(None, "--scheduler", metavar="NAME", help="Without a mask: ddpm, ddim, dpm++, ..."),
    steps: int = typer.Option(
        None, "--steps", min=1, metavar="N", help="Steps from noise (250 with a mask, else the scheduler's number)."
    ),
    jump_length: int = typer.Option(
        None, "--jump-length", metavar="N", help="With a mask: levels gone back at once (10)."
    ),
    resamplings: int = typer.Option(
        None, "--resamplings", metavar="N", help="With a mask: how often each stretch is walked (10)."
    ),
    paste: bool = typer.Option(
        None, "--paste/--no-paste", help="With a mask: known pixels exactly as in the picture (--paste)."
    ),
    precision: str = typer.Option(None, "--precision", metavar="NAME", help="fp32, bf16, ..."),
    batch_size: int = typer.Option(16, "--batch-size", min=1, metavar="N", help="Pictures computed at once."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Such as cuda:0 (a GPU, else cpu)."),
    out: Path = typer.Option(Path("edits"), "--out", metavar="FOLDER", help="Folder for the results and grid.png."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Change a picture: the masked part of it, or without a mask all of it.

    Example: edt edit runs/a photo.png --class tench --strength 0.6
    """
    import math
    import sys

    import numpy as np

    from ..assemble.editing import open_model, read_original, write_comparison, write_pictures
    from ..pipelines.editing import edit as change
    from ..pipelines.editing import picture_shape
    from ..pipelines.inpainting import JUMP_LENGTH, RESAMPLINGS, STEPS, evaluations, inpaint, visited_levels
    from ..pipelines.schedulers import scheduler_name
    from ..util.errors import UserError
    from ..util.rng import image_seed

    quiet_libraries()
    if not math.isfinite(guidance):
        raise UserError(f"--guidance {guidance}: expected a finite number, such as 2")
    _check_together(mask, "without", {"--strength": strength, "--scheduler": scheduler})
    pasting = {} if paste is None else {"--paste" if paste else "--no-paste": ""}
    _check_together(mask, "with", {"--jump-length": jump_length, "--resamplings": resamplings, **pasting})
    if strength is not None and not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g}: expected above 0 and at most 1, such as 0.6")
    pipeline, origin = open_model(model, device, precision, quiet)
    classes = pipeline.transformer.config.num_classes
    if classes is not None and wanted is None:
        raise UserError(f"this model has {classes} classes: say what to make of the picture with --class")
    if classes is None and wanted is not None:
        raise UserError("this model is unconditional: leave out --class")
    labels = pipeline.resolve_labels(wanted)
    longest = pipeline.scheduler.config["num_train_timesteps"]
    if steps is not None and steps > longest:
        raise UserError(f"--steps {steps}: the model's noising process has {longest} steps, expected at most as many")
    if mask is not None:
        _check_repainting(
            STEPS if steps is None else steps,
            JUMP_LENGTH if jump_length is None else jump_length,
            RESAMPLINGS if resamplings is None else resamplings,
        )
    original = read_original(picture, mask, picture_shape(pipeline))
    seeds = [image_seed(seed, index) for index in range(number)]
    shared: dict[str, Any] = {"guidance_scale": guidance if classes is not None else 1.0, "batch_size": batch_size}
    if original.mask is None:
        sampler, count = pipeline.sampler(scheduler, steps)
        settings: dict[str, Any] = {"strength": 0.6 if strength is None else strength}
        how = f"strength {settings['strength']:g}, {count} steps from noise"
        images = change(
            pipeline, original.picture, wanted, seeds=seeds, num_inference_steps=steps, output_type="uint8",
            scheduler=scheduler, **settings, **shared,
        ).images  # fmt: skip
        settings["scheduler"] = scheduler_name(sampler)
    else:
        settings = {
            "jump_length": JUMP_LENGTH if jump_length is None else jump_length,
            "resamplings": RESAMPLINGS if resamplings is None else resamplings,
        }
        count = STEPS if steps is None else steps
        asked = evaluations(visited_levels(count, **settings))
        how = f"{count} steps, {asked} evaluations with the resamplings"
        if not quiet:
            print(f"{how}: fewer with --steps, --resamplings", file=sys.stderr, flush=True)
        images = inpaint(
            pipeline, original.picture, original.mask, wanted, seeds=seeds, num_inference_steps=steps,
            paste=paste is not False, output_type="uint8", **settings, **shared,
        ).images  # fmt: skip
        settings["paste"] = paste is not False
    images = np.asarray(images)
    label = None if labels is None else int(labels[0])
    names = pipeline.class_names or []
    said = {
        "what": "edit", "source": picture.name, "mask": mask and mask.name, "label": label,
        "class": names[label] if label is not None and label < len(names) else None,
        "guidance": shared["guidance_scale"], "steps": count, **settings, "batch": batch_size, **origin,
    }  # fmt: skip
    kept = [picture] if mask is None else [picture, mask]
    files = write_pictures(out, "edit", images, [{"seed": one, **said} for one in seeds], keep=kept)
    write_comparison(out / "grid.png", original, images)
    facts = {
        "folder": str(out), "pictures": [str(file) for file in files], "grid": str(out / "grid.png"), "seeds": seeds,
        "picture_size": list(original.size), "size": list(original.picture.shape[:2]), **said,
    }  # fmt: skip
    height, width = original.picture.shape[:2]
    fitted = (
        f"; {picture.name} was scaled and cut from {original.size[1]} x {original.size[0]} to {width} x {height} pixels"
        if original.fitted
        else ""
    )
    finish(f"wrote {len(files)} pictures and grid.png to {out} ({how}){fitted}", facts, as_json)


def _check_together(mask: Path | None, meant: str, options: dict[str, Any]) -> None:
    """Refuse options that are meant "with" a mask, or "without" one, where it is not so."""
    from ..util.errors import UserError

    if (mask is not None) == (meant == "with"):
        return
    for name, value in options.items():
        if value is not None:
            remedy = f"leave out {name}, or --mask" if mask is not None else "give a --mask too"
            raise UserError(f"{f'{name} {value}'.rstrip()} is for changing pictures {meant} a mask: {remedy}")


def _check_repainting(steps: int, jump_length: int, resamplings: int) -> None:
    """Refuse what `pipelines.inpainting.visited_levels` would, by the names of the options."""
    from ..util.errors import UserError

    if steps < 2:
        raise UserError(f"--steps {steps}: a masked part needs at least 2")
    for name, value in (("--jump-length", jump_length), ("--resamplings", resamplings)):
        if value < 1:
            raise UserError(f"{name} {value}: expected at least 1")
    if resamplings > 1 and jump_length >= steps:
        raise UserError(
            f"--jump-length {jump_length} with {steps} steps: expected at most {steps - 1}, or --resamplings 1 for none"
        )
