"""`edt demo`."""

from pathlib import Path

import typer

from .output import finish, quiet_libraries


def demo(
    overrides: list[str] = typer.Argument(None, metavar="key.path=value", help="Settings to change."),
    out: Path = typer.Option(Path("runs/demo"), "--out", help="Run folder."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Train a small EDT on real handwritten digits (no network needed), sample every class, and judge the result.

    Writes samples.png, amm.png, loss.png and report.json into the run folder. Run it again to resume.

    Example: edt demo --out runs/demo
    """
    from ..studies.demo import run_demo

    quiet_libraries()
    report = run_demo(out, overrides, quiet)
    if report is None:
        finish(f"stopped and saved; run the same command again to go on ({out})", {"finished": False}, as_json)
        return
    lines = [
        f"training            {report['train_steps']} steps in {report['train_seconds']:.0f} s",
        f"recognised          {report['class_fidelity']:.1%} of {report['generated_digits']} generated digits "
        f"(guidance {report['guidance_scale']:g}, AMM off)",
        f"  with AMM          {report['class_fidelity_amm']:.1%}",
        f"  without guidance  {report['class_fidelity_unguided']:.1%}",
        f"  real, held out    {report['judge_accuracy_on_held_out_real_digits']:.1%}",
        f"novelty             {report['memorisation_ratio']:.2f}  (distance to the nearest training digit; "
        "real held-out digits = 1)",
        f"diversity           {report['diversity_ratio']:.2f}  (distance within a class; real digits = 1)",
        f"wrote {out}/samples.png, amm.png, loss.png, report.json and the model in {out}/model",
    ]
    finish("\n".join(lines), report | {"folder": str(out)}, as_json)
