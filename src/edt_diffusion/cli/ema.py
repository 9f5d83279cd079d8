"""`edt ema`."""

from pathlib import Path
from typing import Any

import typer

from .output import finish, quiet_libraries

# Widths whose fit is told when none is asked for.
_SHOWN = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)


def ema(
    run: Path = typer.Argument(metavar="RUN", help="Run folder of a training with ema.power."),
    sigma_rel: float = typer.Option(None, "--sigma-rel", help="Wanted width, as a share of the run, such as 0.1."),
    step: int = typer.Option(None, "--step", min=1, help="Step with a snapshot (default: the newest)."),
    out: Path = typer.Option(None, "--out", help="Folder to write; must not exist (default: in RUN)."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Average the weights of a finished or running training over another length (EDM2).

    Writes a diffusers folder for edt sample. Without --sigma-rel, lists the
    snapshots and how well they give which width.

    Example: edt ema runs/a --sigma-rel 0.1
    """
    from ..training.posthoc import SnapshotStore, known_widths, reconstruct
    from ..training.power import width_name
    from ..util.errors import UserError
    from ..util.lookup import nearest

    quiet_libraries()
    if not run.is_dir():
        guess = nearest(run.name, [entry.name for entry in run.parent.iterdir()] if run.parent.is_dir() else [])
        hint = f" (did you mean '{run.parent / guess}'?)" if guess else ""
        raise UserError(f"{run} does not exist: expected a run folder{hint}")
    folder = run / "ema"
    if sigma_rel is None:
        if out is not None:
            raise UserError("--out needs --sigma-rel, the width of the average to write")
        snapshots = SnapshotStore(folder).snapshots(step)
        facts = _listing(snapshots, known_widths(snapshots))
        finish("\n".join(_lines(folder, facts)), {"folder": str(folder), **facts}, as_json)
        return
    name = width_name(sigma_rel) + ("" if step is None else f"-step-{step:08d}")
    target = run / name if out is None else out
    if target.exists():
        raise UserError(f"{target} exists already: name a new folder with --out")
    made = reconstruct(folder, sigma_rel, step)
    _write(run, made.parameters, target)
    told = {"folder": str(target), "sigma_rel": sigma_rel, "step": made.step, "fit_error": made.fit_error,
            "snapshots": made.snapshots}  # fmt: skip
    finish(f"wrote {target}: width {sigma_rel:g} at step {made.step}, fit error {made.fit_error:.1%}", told, as_json)


def _listing(snapshots: list[Any], widths: list[float]) -> dict[str, Any]:
    from ..training.posthoc import fit
    from ..training.power import MAX_WIDTH

    wanted = sorted({*_SHOWN, *widths}) if len(widths) > 1 else widths
    return {
        "steps": [snapshot.step for snapshot in snapshots],
        "widths": widths,
        "range": [0.0, MAX_WIDTH] if len(widths) > 1 else None,
        "fit_errors": {f"{width:g}": fit(snapshots, width)[1] for width in wanted},
    }


def _lines(folder: Path, facts: dict[str, Any]) -> list[str]:
    steps = facts["steps"]
    shown = ", ".join(map(str, steps if len(steps) < 7 else [*steps[:3], "...", *steps[-2:]]))
    if facts["range"]:
        low, high = facts["range"]
        possible = f"--sigma-rel between {low:g} and {high:g}"
    else:
        possible = "that width only: train with two, such as ema.power=[0.05,0.10], to make others"
    return [
        f"{folder}: {len(steps)} snapshots",
        f"steps      {shown}",
        f"widths     {', '.join(f'{width:g}' for width in facts['widths'])}",
        f"possible   {possible}",
        f"fit error  at step {steps[-1]}; 0 is exact",
        *(f"  {width:<8} {error:.1%}" for width, error in facts["fit_errors"].items()),
    ]


def _write(run: Path, parameters: dict[str, Any], target: Path) -> None:
    """The run's pipeline with other weights."""
    import torch

    from ..assemble import finetuning
    from ..pipelines.loading import load_pipeline
    from ..training.lora import without_adapters
    from ..util.files import atomic_directory, make_folder

    pipeline = load_pipeline(run)
    trained: Any = pipeline.transformer
    if any(".lora_" in name for name in parameters):
        trained = finetuning.averaged(run, pipeline, parameters)
        pipeline.register_modules(transformer=without_adapters(trained))
    else:
        own = dict(trained.named_parameters())
        finetuning.refuse_strange(run, parameters, own)
        with torch.no_grad():
            for name, value in parameters.items():
                own[name].copy_(value)
    make_folder(target.parent)
    with atomic_directory(target) as folder:
        pipeline.save_pretrained(folder)
        finetuning.save_adapters(trained, folder)
