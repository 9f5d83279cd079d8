"""`edt amm`: where attention modulation helps a model, and what it does."""

import inspect as introspection
import sys
from pathlib import Path

import typer

from .output import finish, quiet_libraries


def search(
    model: str = typer.Argument(metavar="MODEL", help="Run folder, diffusers folder or hub name."),
    reference: str = typer.Option(None, "--reference", metavar="PATH", help="Real pictures, or .npz (training set)."),
    extractor: str = typer.Option("inception", "--extractor", metavar="NAME[=FILE]", help="As for edt evaluate."),
    metric: str = typer.Option(None, "--metric", metavar="NAME", help="fid, kid, ... (fid, or kid of wide features)."),
    guidance: float = typer.Option(None, "--guidance", min=0.0, metavar="X", help="Guidance scale (1.5); 1 is off."),
    scheduler: str = typer.Option("ddim", "--scheduler", metavar="NAME", help="ddpm, ddim, dpm++, euler, ..."),
    steps: int = typer.Option(18, "--steps", min=1, metavar="N", help="Sampling steps."),
    precision: str = typer.Option("fp32", "--precision", metavar="NAME", help="fp32, bf16, fp16, ..."),
    blocks: str = typer.Option(None, "--blocks", metavar="A-B,C", help="To try (all whose grid allows it)."),
    radii: str = typer.Option("0.5R,0.75R,1R", "--radii", metavar="A,B", help="To try."),
    formulas: str = typer.Option("exp,cos", "--formulas", metavar="A,B", help="To try."),
    max_blocks: int = typer.Option(2, "--max-blocks", metavar="N", help="Modulated at once, at most."),
    images: int = typer.Option(200, "--images", metavar="N", help="Pictures of each candidate in the first rung."),
    budget_images: int = typer.Option(None, "--budget-images", metavar="N", help="At most, in the search."),
    confirm: int = typer.Option(5000, "--confirm", metavar="N", help="Fresh pictures behind the answer."),
    least_gain: float = typer.Option(0.01, "--least-gain", metavar="X", help="Share of off's value to be gained."),
    seed: int = typer.Option(0, "--seed", metavar="N", help="Seed of the pictures."),
    batch_size: int = typer.Option(None, "--batch-size", min=1, metavar="N", help="Pictures computed at once."),
    out: Path = typer.Option(None, "--out", metavar="FOLDER", help="For everything (default: amm/ in the model)."),
    apply: bool = typer.Option(True, "--apply/--no-apply", help="Save the answer in the model's folder."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Such as cuda:0 (a GPU, else cpu)."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress, no table."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Find where attention modulation helps a trained model, or that off is best. Interrupted, run it again.

    Example: edt amm search runs/a --reference pictures/ --guidance 1.5
    """
    from ..sampling.stopping import Stopped
    from ..studies.amm_search import Plan, Request, conclusion, lines
    from ..studies.amm_search import search as run

    quiet_libraries()
    sampling = {"guidance": guidance, "scheduler": scheduler, "steps": steps, "precision": precision}
    request = Request(
        model=model, reference=reference, extractor=extractor, metric=metric,
        sampling={name: value for name, value in sampling.items() if value is not None},
        blocks=blocks, radii=radii, formulas=formulas, plan=Plan(first=images, max_blocks=max_blocks),
        budget=budget_images, confirm=confirm, least_gain=least_gain, seed=seed, batch=batch_size, out=out,
        apply=apply, device=device, quiet=quiet or as_json,
    )  # fmt: skip
    try:
        outcome = run(request)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    if not (as_json or quiet):
        print("\n".join([*lines(outcome.facts), outcome.told]))
    for note in outcome.facts["notes"]:
        print(f"WARNING: {note}", file=sys.stderr)
    written = [str(path) for path in outcome.written]
    finish(conclusion(outcome.facts), {**outcome.facts, "out": written, "applied": outcome.told}, as_json)


def show(
    model: str = typer.Argument(metavar="MODEL", help="Run folder, diffusers folder, hub name, or a size as EDT-S/2."),
    blocks: str = typer.Option(None, "--blocks", metavar="A-B,C", help="Modulated blocks (saved or suggested ones)."),
    formula: str = typer.Option(None, "--formula", metavar="NAME", help="exp or cos."),
    radius: str = typer.Option(None, "--radius", metavar="R", help="Cells, or such as 0.75R."),
    image_size: str = typer.Option("256", "--image-size", metavar="N", help="Pixels, as 256 or 256x384, with a size."),
    guidance: float = typer.Option(1.0, "--guidance", min=0.0, metavar="X", help="That a suggestion is for."),
    class_: str = typer.Option(None, "--class", metavar="NAME", help="Name or number of the class (the first)."),
    picture: Path = typer.Option(None, "--picture", metavar="FILE", help="To look at (one is sampled)."),
    timestep: int = typer.Option(None, "--timestep", metavar="T", help="Noise level, 0 to 999 (300)."),
    heads: str = typer.Option(None, "--heads", metavar="A,B", help="Drawn alone, beside the mean."),
    seed: int = typer.Option(0, "--seed", metavar="N", help="Of the sampled picture and of the noise."),
    out: Path = typer.Option(Path("amm"), "--out", metavar="FOLDER", help="For pictures and amm_show.json."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Such as cuda:0 (a GPU, else cpu)."),
    quiet: bool = typer.Option(False, "--quiet", help="No table."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show a modulation matrix, the pairs it keeps, its gain, and a model's attention with and without it.

    Example: edt amm show runs/a --blocks 7,10 --class tench
    """
    from ..studies.amm_show import Request, table
    from ..studies.amm_show import show as run
    from ..util.errors import UserError

    quiet_libraries()
    try:
        alone = [int(head) for head in (heads or "").split(",") if head.strip()]
    except ValueError:
        raise UserError(f"--heads {heads}: expected numbers with commas between, such as 0,3") from None
    request = Request(
        model=model, image_size=image_size, blocks=blocks, formula=formula, radius=radius, guidance=guidance,
        classes=class_, picture=picture, timestep=timestep, heads=alone, seed=seed, out=out, device=device,
    )  # fmt: skip
    outcome = run(request)
    for note in outcome.notes:
        print(f"WARNING: {note}", file=sys.stderr)
    if not (as_json or quiet):
        print("\n".join(table(outcome.facts)))
    written = [str(path) for path in outcome.written]
    finish("wrote " + " and ".join(written), {**outcome.facts, "out": written}, as_json)


amm = typer.Typer(name="amm", rich_markup_mode=None)


@amm.callback(invoke_without_command=True, epilog="Example: edt amm show EDT-S/2")
def about(context: typer.Context) -> None:
    """Attention modulation (AMM): where it helps a model, and what it does."""
    if context.invoked_subcommand is None:
        print(context.get_help(), flush=True)


for _command, _short in (
    (search, "Where it helps a trained model, if anywhere."),
    (show, "The matrix, and attention with and without."),
):
    _text, _, _example = introspection.getdoc(_command).rpartition("\n\n")  # pyright: ignore[reportOptionalMemberAccess]
    amm.command(help=_text, short_help=_short, epilog=f"\b\n{_example}")(_command)
