"""`edt info`."""

import typer

from .output import finish, quiet_libraries


def info(
    model: str = typer.Argument(
        metavar="MODEL", help="EDT-S/2, EDT-B/2, EDT-XL/2, or a run folder, diffusers folder or hub name."
    ),
    image_size: str = typer.Option(
        "256", "--image-size", help="Pixels, as 256 or 256x384; a named size works on latents of an eighth of it."
    ),
    guidance: float = typer.Option(1.0, "--guidance", help="Guidance scale for which to show the published AMM."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show parameters, multiply-adds, token grids and attention modulation of a model.

    Example: edt info EDT-S/2 --image-size 512
    """
    from ..models.summary import describe, named_model
    from ..pipelines.loading import load_pipeline

    quiet_libraries()
    named = named_model(model, image_size)
    network = named if named is not None else load_pipeline(model).transformer
    facts = describe(network, guidance)
    parameters = facts["parameters"]
    lines = [
        f"{model}",
        f"input          {facts['in_channels']} x {facts['sample_size'][0]} x {facts['sample_size'][1]}, "
        f"patch {facts['patch_size']}, classes {facts['num_classes'] if facts['num_classes'] is not None else 'none'}",
        f"parameters     {parameters['total']:,} with position tables, {parameters['trainable']:,} trained",
        f"multiply-adds  {facts['multiply_adds'] / 1e9:.3f} G per picture and step",
        "stage  blocks  width  heads  grid     multiply-adds",
    ]
    for stage in facts["stages"]:
        grid = f"{stage['grid'][0]}x{stage['grid'][1]}"
        share = stage["multiply_adds"] / facts["multiply_adds"]
        lines.append(
            f"{stage['stage']:>5}  {stage['blocks']:>6}  {stage['width']:>5}  {stage['heads']:>5}  {grid:<7}  "
            f"{stage['multiply_adds'] / 1e9:.3f} G ({share:.0%})"
        )
    lines += [
        f"AMM now        {_words(facts['amm'])}",
        f"AMM published  {_words(facts['amm_published'])} at guidance {guidance:g}",
    ]
    finish("\n".join(lines), {"model": model, **facts}, as_json)


def _words(setting: dict | None) -> str:
    if setting is None:
        return "none"
    radius = "" if setting["radius"] is None else f", radius {setting['radius']}"
    return f"blocks {', '.join(map(str, setting['blocks']))}, formula {setting['formula']}{radius}"
