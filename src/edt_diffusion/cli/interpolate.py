"""`edt interpolate`."""

from pathlib import Path
from typing import Any

import typer

from .output import finish, quiet_libraries


def interpolate(
    model: str = typer.Argument(metavar="MODEL", help="Run folder, diffusers folder or hub name."),
    classes: str = typer.Option(
        None, "--classes", metavar="A,B", help="Names or numbers, one per key point; or one for all of them."
    ),
    seeds: str = typer.Option("0", "--seeds", metavar="N,N", help="Seeds, one per key point; or one for all of them."),
    frames: int = typer.Option(
        9, "--frames", min=2, metavar="N", help="Frames from a key point to the next, both included."
    ),
    guidance: float = typer.Option(2.0, "--guidance", min=0.0, metavar="X", help="Guidance scale; 1 is off."),
    scheduler: str = typer.Option(
        None, "--scheduler", metavar="NAME", help="One that draws no noise between different seeds (ddim or euler)."
    ),
    steps: int = typer.Option(None, "--steps", min=1, metavar="N", help="Steps (the scheduler's usual number)."),
    precision: str = typer.Option(None, "--precision", metavar="NAME", help="fp32, bf16, ..."),
    batch_size: int = typer.Option(16, "--batch-size", min=1, metavar="N", help="Pictures computed at once."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Such as cuda:0 (a GPU, else cpu)."),
    out: Path = typer.Option(Path("interpolation"), "--out", metavar="FOLDER", help="Folder for the pictures."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Make the pictures between pictures, from class to class and from seed to seed.

    Writes the frames, all of them in strip.png, and there and back in
    interpolation.gif. The first frame is what edt sample makes of the first class
    and seed with the same sampler.

    Example: edt interpolate runs/a --classes tench,church --seeds 1,2 --frames 9
    """
    import math

    import numpy as np

    from ..assemble.editing import open_model, write_film, write_pictures
    from ..assemble.sampling import class_list
    from ..pipelines.interpolation import interpolate as sample
    from ..util.errors import UserError
    from ..util.pictures import grid, save_png

    quiet_libraries()
    if not math.isfinite(guidance):
        raise UserError(f"--guidance {guidance}: expected a finite number, such as 2")
    numbers = _numbers(seeds)
    pipeline, origin = open_model(model, device, precision, quiet)
    names = [] if classes is None else class_list(classes, pipeline.class_names or [])
    conditional = pipeline.transformer.config.num_classes is not None
    if conditional and not names:
        raise UserError(f"this model has {pipeline.transformer.config.num_classes} classes: say which with --classes")
    if names and not conditional:
        raise UserError("this model is unconditional: leave out --classes, and give two or more --seeds")
    count = max(len(names), len(numbers))
    if {len(names) or 1, len(numbers)} - {1, count}:
        raise UserError(f"{len(names)} classes and {len(numbers)} seeds: give as many of both, or one of either")
    if count < 2:
        raise UserError("one key point, nothing to go to: name two or more --classes or --seeds")
    wanted = [names[index % len(names)] if names else None for index in range(count)]
    begun = [numbers[index % len(numbers)] for index in range(count)]
    made = sample(
        pipeline,
        *zip(wanted, begun, strict=True),
        frames=frames,
        scheduler=scheduler,
        num_inference_steps=steps,
        guidance_scale=guidance if conditional else 1.0,
        batch_size=batch_size,
        output_type="uint8",
    )
    images = np.asarray(made.images)
    shared: dict[str, Any] = {"classes": names, "seeds": numbers, "scheduler": made.scheduler, "steps": made.steps}
    if conditional:
        labels = pipeline.resolve_labels(names)
        known = pipeline.class_names or []
        shared["labels"] = labels or []
        shared["classes"] = [known[label] if label < len(known) else None for label in shared["labels"]]
        shared["guidance"] = guidance
    shared = {"what": "interpolate", **shared, "batch": batch_size, **origin}
    files = write_pictures(out, "frame", images, [{**shared, "position": place} for place in made.positions])
    save_png(grid(images, frames if count == 2 else len(images)), out / "strip.png")
    write_film(out / "interpolation.gif", images)
    facts = {
        "folder": str(out), "pictures": [str(file) for file in files], "strip": str(out / "strip.png"),
        "film": str(out / "interpolation.gif"), "positions": made.positions, **shared,
    }  # fmt: skip
    finish(
        f"wrote {len(files)} frames, strip.png and interpolation.gif to {out} ({made.scheduler}, {made.steps} steps)",
        facts,
        as_json,
    )


def _numbers(text: str) -> list[int]:
    from ..util.errors import UserError

    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= number < 1 << 63 for number in numbers):
        raise UserError(f"--seeds {text!r}: expected numbers from 0 to 2**63 - 1, with commas between")
    return numbers
