"""`edt plot`."""

from pathlib import Path

import typer

from .output import finish


def plot(
    runs: list[Path] = typer.Argument(metavar="RUN", help="Run folders, drawn over one another."),
    metric: list[str] = typer.Option(
        None, "--metric", help="What to draw, such as loss_full; may be repeated. Default: an overview."
    ),
    smooth: float = typer.Option(0.9, "--smooth", min=0.0, max=0.9999, help="Weight of the past in a mean; 0 is raw."),
    x: str = typer.Option("step", "--x", help="step, images (seen) or hours (of training)."),
    linear: bool = typer.Option(False, "--linear", help="Losses, norms and rates on a linear axis."),
    out: Path = typer.Option(None, "--out", help="Picture to write; default: RUN/curves.png, of several curves.png."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Draw the curves of one or several runs.

    The overview shows losses (full, masked, validation), gradient norm, learning rate, throughput, and the losses by
    timestep at the end. Triangles mark steps left out, returns to older states and spikes of the loss.

    Example: edt plot runs/a runs/b --metric val_loss --x hours
    """
    from ..training.curves import draw_curves

    target = out or (runs[0] / "curves.png" if len(runs) == 1 else Path("curves.png"))
    drawn = draw_curves(runs, list(metric or []) or None, target, smooth=smooth, log_y=not linear, x=x)
    facts = {"out": str(target), "runs": [str(run) for run in runs], "metrics": drawn, "x": x, "smooth": smooth}
    finish(f"drew {', '.join(drawn)} to {target}", facts, as_json)
