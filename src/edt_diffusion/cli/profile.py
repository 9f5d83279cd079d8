"""`edt profile`."""

from pathlib import Path

import typer

from .output import finish, quiet_libraries


def profile(
    model: str = typer.Argument(metavar="MODEL", help="Run folder, diffusers folder, hub name, or a size as EDT-S/2."),
    image_size: str = typer.Option(
        None, "--image-size", "--size", metavar="N", help="Pixels, as 256 or 256x384, with a size."
    ),
    batch_size: int = typer.Option(4, "--batch-size", min=1, metavar="N", help="Pictures computed at once."),
    precision: str = typer.Option("fp32", "--precision", metavar="NAME", help="fp32, bf16, fp16, fp8, int8, ..."),
    cache: str = typer.Option("none", "--cache", metavar="NAME", help="Feature cache, such as taylor:interval=4."),
    scheduler: str = typer.Option(None, "--scheduler", metavar="NAME", help="ddpm, ddim, dpm++, ... (its own)."),
    steps: int = typer.Option(None, "--steps", min=1, metavar="N", help="Sampling steps (the scheduler's usual)."),
    guidance: float = typer.Option(2.0, "--guidance", min=0.0, metavar="X", help="Guidance scale; 1 is off."),
    amm: str = typer.Option("saved", "--amm", metavar="NAME", help="saved, off, on, auto, or blocks as 7,10."),
    compiled: bool = typer.Option(False, "--compile", help="Compile the transformer blocks."),
    repeats: int = typer.Option(10, "--repeats", min=1, metavar="N", help="Timed forward passes."),
    no_sampling: bool = typer.Option(False, "--no-sampling", help="The forward pass only."),
    threads: int = typer.Option(None, "--threads", min=1, metavar="N", help="Threads of the CPU."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Such as cuda:0 (a GPU, else cpu)."),
    out: Path = typer.Option(Path("profile"), "--out", metavar="FOLDER", help="For profile.json and profile.png."),
    quiet: bool = typer.Option(False, "--quiet", help="No table."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show where time and memory go: a forward pass by stage and block, a sampling by part.

    Example: edt profile runs/a --precision bf16 --scheduler dpm++ --steps 20
    """
    import math

    from ..profiling.job import ProfileRequest, profile_model, write_profile
    from ..profiling.report import table
    from ..util.errors import UserError
    from ..util.files import make_folder

    quiet_libraries()
    if not math.isfinite(guidance):
        raise UserError(f"--guidance {guidance}: expected a finite number, such as 2")
    make_folder(out)
    request = ProfileRequest(
        model=model, image_size=image_size, batch=batch_size, precision=precision, cache=cache, scheduler=scheduler,
        steps=steps, guidance=guidance, amm=amm, compiled=compiled, repeats=repeats, sampling=not no_sampling,
        threads=threads, device=device,
    )  # fmt: skip
    measured = profile_model(request)
    written = [str(path) for path in write_profile(measured, out)]
    if not (as_json or quiet):
        print(table(measured.facts()))
    finish("wrote " + " and ".join(written), {"out": written, **measured.facts()}, as_json)
