"""`edt sample`."""

from pathlib import Path
from typing import Any

import typer

from .output import finish, leave_at_once, quiet_libraries

# The most files that --json lists.
_LISTED = 1000


def sample(
    model: str = typer.Argument(metavar="MODEL", help="Run folder, diffusers folder or hub name."),
    classes: str = typer.Option(None, "--classes", metavar="A,B", help="Names or numbers (every class)."),
    labels: str = typer.Option(None, "--labels", metavar="HOW", help="balanced, random, or a file of classes."),
    number: int = typer.Option(None, "-n", "--number", min=1, metavar="N", help="A class (8); in all, with --labels."),
    seed: int = typer.Option(0, "--seed", metavar="N", help="Picture i depends on it and on i."),
    seeds: str = typer.Option(None, "--seeds", metavar="N,N", help="These very seeds, for each class."),
    guidance: float = typer.Option(None, "--guidance", min=0.0, metavar="X", help="Guidance scale (2); 1 is off."),
    guidance_channels: str = typer.Option(None, "--guidance-channels", metavar="NAME", help="all, or authors (three)."),
    guidance_schedule: str = typer.Option(None, "--guidance-schedule", metavar="NAME", help="Such as power-cosine."),
    acceleration: str = typer.Option(None, "--acceleration", metavar="NAME", help="exact, balanced or fast."),
    scheduler: str = typer.Option(None, "--scheduler", metavar="NAME", help="ddpm, ddim, dpm++, unipc, euler, ..."),
    steps: int = typer.Option(None, "--steps", min=1, metavar="N", help="Steps (the scheduler's usual number)."),
    cache: str = typer.Option(None, "--cache", metavar="NAME", help="Reuse of features, such as taylor."),
    precision: str = typer.Option(None, "--precision", metavar="NAME", help="fp32, bf16, ..."),
    amm: str = typer.Option("saved", "--amm", metavar="NAME", help="off, on, auto, a preset, or 7,10."),
    amm_formula: str = typer.Option("exp", "--amm-formula", metavar="NAME", help="exp or cos, with --amm blocks."),
    amm_radius: str = typer.Option(None, "--amm-radius", metavar="R", help="Cells or 0.9R, with --amm blocks."),
    batch_size: int = typer.Option(None, "--batch-size", min=1, metavar="N", help="Pictures computed at once (64)."),
    to: str = typer.Option("png", "--to", metavar="FORM", help="png, npz (as ADM) or parquet."),
    out: Path = typer.Option(
        Path("samples"), "--out", metavar="FOLDER", help="Folder (samples); OUT-grid.png beside.", show_default=False
    ),
    processes: int = typer.Option(1, "--processes", min=1, metavar="N", help="Share the work among so many."),
    trajectory: bool = typer.Option(False, "--trajectory", help="Also a film, OUT-trajectory.gif."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Such as cuda:0 (a GPU, else cpu)."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Make pictures. Interrupted, run it again: it makes those that are missing.

    Example: edt sample runs/a --classes tench,church -n 8 --guidance 2
    """
    import sys

    from ..assemble.sampling import Request, Stopped
    from ..assemble.sampling import sample as run

    quiet_libraries()
    given: dict[str, Any] = {
        "guidance": guidance, "channels": guidance_channels, "guidance_schedule": guidance_schedule,
        "scheduler": scheduler, "steps": steps, "cache": cache, "precision": precision,
    }  # fmt: skip
    request = Request(
        model=model, classes=classes, labels=labels, number=number,
        sampling={name: value for name, value in given.items() if value is not None}, acceleration=acceleration,
        amm=amm, amm_formula=amm_formula, amm_radius=amm_radius, seed=seed, seeds=_seeds(seeds), batch=batch_size,
        to=to, out=out, processes=processes, trajectory=trajectory, device=device, quiet=quiet,
    )  # fmt: skip
    try:
        outcome = run(request)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    if outcome is None:
        leave_at_once()
        return
    made = outcome.count - outcome.found
    facts: dict[str, Any] = {
        "folder": str(out), "number": outcome.count, "made": made, "found": outcome.found,
        "seconds": round(outcome.seconds, 3),
        "images_per_second": round(made / outcome.seconds, 3) if made and outcome.seconds else None,
        "files": [str(path) for path in outcome.written],
        "grid": str(outcome.grid), "sheet": _text(outcome.sheet), "trajectory": _text(outcome.trajectory),
        **outcome.facts,
    }  # fmt: skip
    if 0 < len(outcome.pictures) <= _LISTED:
        facts["pictures"] = [str(path) for path in outcome.pictures]
    finish(_message(outcome, out), facts, as_json)


def _message(outcome: Any, out: Path) -> str:
    """What was written, and where."""
    made, files = outcome.count - outcome.found, outcome.written
    where = str(files[0]) if len(files) == 1 else f"{len(files)} files in {out}"
    beside = [path.name for path in (outcome.grid, outcome.sheet, outcome.trajectory) if path is not None]
    names = ", ".join(beside[:-1]) + (" and " if beside[1:] else "") + beside[-1]
    if not made:
        return f"all {outcome.count} pictures were there: {where}; wrote {names} beside {out}"
    there = f" ({outcome.found} were there)" if outcome.found else ""
    return f"wrote {made} pictures to {where}{there}, and {names} beside it"


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _seeds(text: str | None) -> list[int] | None:
    """Numbers separated by commas."""
    from ..util.errors import UserError

    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        seeds = []
    if not seeds or not all(0 <= seed < 1 << 63 for seed in seeds):
        raise UserError(f"--seeds {text!r}: expected numbers from 0 to 2**63 - 1, with commas between")
    return seeds
