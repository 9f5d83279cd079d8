"""`edt evaluate`."""

from pathlib import Path
from typing import Any, get_args

import typer

from .output import finish, leave_at_once, quiet_libraries


def evaluate(
    what: str = typer.Argument(metavar="WHAT", help="Model (run, folder, hub) or pictures (folder, .npz)."),
    axes: list[str] = typer.Argument(None, metavar="[AXIS]...", help="More axes of --sweep."),
    reference: str = typer.Option(None, "--reference", metavar="PATH", help="Real pictures, or .npz (training set)."),
    extractor: str = typer.Option(
        "inception",
        "--extractor",
        metavar="NAME[=FILE]",
        help="inception, dinov2, clip, pixels; or a .ts file.",
    ),
    number: int = typer.Option(None, "-n", "--number", min=2, metavar="N", help="Samples (5000), or pictures to take."),
    sweep: list[str] = typer.Option(
        None, "--sweep", metavar="AXIS=A,B", help="Of guidance, amm, steps, scheduler, cache."
    ),
    guidance: float = typer.Option(None, "--guidance", metavar="X", help="Guidance scale; 1 is off (default)."),
    channels: str = typer.Option(None, "--guidance-channels", metavar="NAME", help="all, or authors (first three)."),
    scheduler: str = typer.Option(None, "--scheduler", metavar="NAME", help="ddpm, ddim, dpm++, unipc, euler, ..."),
    steps: int = typer.Option(None, "--steps", metavar="N", help="Sampling steps (the scheduler's usual number)."),
    amm: str = typer.Option(None, "--amm", metavar="NAME", help="saved, off, on, auto, a preset, or blocks as 7+10."),
    precision: str = typer.Option(None, "--precision", metavar="NAME", help="fp32, bf16, fp16, fp8, int8, ..."),
    labels: str = typer.Option(None, "--labels", metavar="NAME", help="balanced, random, or reference (usual)."),
    metrics: str = typer.Option(None, "--metrics", metavar="A,B", help="all, or some of fid, sfid, is, precision, ..."),
    judge: bool = typer.Option(False, "--judge", help="Class fidelity, and copies of training pictures."),
    judge_by: str = typer.Option(None, "--judge-by", metavar="NAME", help="conv, linear, logits, or a saved one."),
    training: str = typer.Option(None, "--training", metavar="PATH", help="Pictures trained on (the run's)."),
    size: str = typer.Option(None, "--size", metavar="H[xW]", help="Bring pictures of a folder to this size."),
    seed: int = typer.Option(0, "--seed", metavar="N", help="Seed of the samples."),
    batch_size: int = typer.Option(None, "--batch-size", min=1, metavar="N", help="Pictures computed at once."),
    keep: str = typer.Option(None, "--keep", metavar="NAME", help="none, features (usual) or pictures, on disk."),
    save_samples: Path = typer.Option(None, "--save-samples", metavar="NPZ", help="Write the samples as ADM does."),
    save_statistics: Path = typer.Option(None, "--save-statistics", metavar="NPZ", help="Write mu and sigma."),
    out: Path = typer.Option(None, "--out", metavar="FOLDER", help="Results (default: evaluation/ beside the model)."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Such as cuda:0 (a GPU, else cpu)."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Measure how good pictures are: FID and others, with intervals. Interrupted, run it again to go on.

    Example: edt evaluate runs/a --reference real/ --sweep guidance=1,2 amm=off,on
    """
    import os
    import sys
    from dataclasses import asdict

    from ..assemble.evaluating import Request
    from ..assemble.evaluating import evaluate as run
    from ..data.encoding_job import parse_size
    from ..evaluation.judging import JudgeSettings
    from ..evaluation.report import text_table
    from ..evaluation.sweep import Keep
    from ..util.errors import UserError

    quiet_libraries()
    given: dict[str, Any] = {
        "guidance": guidance, "channels": channels, "scheduler": scheduler, "steps": steps, "amm": amm,
        "precision": precision,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if keep is not None and keep not in get_args(Keep):
        raise UserError(f"--keep {keep}: expected {', '.join(get_args(Keep))}")
    words = [*(sweep or []), *(axes or [])]
    for word in words:
        if (name := word.partition("=")[0]) in given:
            option = "guidance-channels" if name == "channels" else name
            raise UserError(f"{name} is given as --{option} and in the sweep ({word}): leave one out")
    if training is not None and not judge:
        raise UserError(f"--training {training} is for --judge: add it, or leave it out")
    if judge_by is not None and not judge:
        raise UserError(f"--judge-by {judge_by} is for --judge: add it, or leave it out")
    request = Request(
        what=what, sweep=words, sampling=given, reference=reference, training=training,
        extractor=extractor or "inception",
        samples=number, labels=labels or "auto", seed=seed, batch=batch_size, metrics=metrics,
        judge=JudgeSettings(judge_by or "auto") if judge else None,
        size=None if size is None else parse_size(size), out=out, save_samples=save_samples,
        save_statistics=save_statistics, keep=keep or "features",  # pyright: ignore[reportArgumentType]
        device=device, quiet=quiet,
    )  # fmt: skip
    outcome = run(request)
    if int(os.environ.get("RANK", "0")):
        leave_at_once()
    if not as_json and outcome.results:
        print(text_table(outcome.results))
    warnings = [*outcome.notes, *(warning for result in outcome.results for warning in result.warnings)]
    for warning in dict.fromkeys(warnings):
        print(f"WARNING: {warning}", file=sys.stderr)
    facts = {"out": [str(path) for path in outcome.written], "results": [asdict(result) for result in outcome.results]}
    finish("wrote " + " and ".join(str(path) for path in outcome.written), facts, as_json)
