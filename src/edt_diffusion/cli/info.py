"""`edt info`."""

from pathlib import Path
from typing import Any

import typer

from .output import finish, quiet_libraries


def info(
    model: str = typer.Argument(
        metavar="MODEL", help="EDT-S/2, -B/2, -XL/2, a run folder, diffusers folder, hub name; or a PNG that edt made."
    ),
    image_size: str = typer.Option(
        "256", "--image-size", help="Pixels, as 256 or 256x384; a named size works on latents of an eighth of it."
    ),
    guidance: float = typer.Option(1.0, "--guidance", help="Guidance scale for which to show the published AMM."),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show parameters, multiply-adds, token grids and attention modulation of a model, or how a picture was made.

    Example: edt info EDT-S/2 --image-size 512
    """
    from ..models.summary import describe, named_model
    from ..pipelines.loading import load_pipeline

    quiet_libraries()
    if Path(model).suffix.lower() == ".png":
        from ..sampling.notes import read_facts

        made = read_facts(Path(model))
        finish("\n".join([model, *_said_by_picture(made)]), {**made, "picture": model}, as_json)
        return
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


_SHORTER = {
    "what": "made with", "guidance_channels": "guided", "guidance_schedule": "schedule", "jump_length": "jump length",
}  # fmt: skip
# Shown in a line of their own form, or not at all.
_APART = ("seed", "label", "class", "model", "sampling", "attention_modulation", "batch", "version", "again")


def _words(setting: dict | None) -> str:
    if setting is None:
        return "none"
    radius = "" if setting["radius"] is None else f", radius {setting['radius']}"
    return f"blocks {', '.join(map(str, setting['blocks']))}, formula {setting['formula']}{radius}"


def _said_by_picture(facts: dict[str, Any]) -> list[str]:
    """Lines about how a picture was made, for those facts that it tells."""
    known = {**{name: value for name, value in facts.items() if name not in _APART}, **facts.get("sampling", {})}
    known |= {name: facts[name] for name in ("attention_modulation",) if name in facts}
    lines = {}
    if facts.get("label") is not None:
        name = facts.get("class")
        lines["class"] = f"{facts['label']}" if name is None else f"{facts['label']} ({name})"
    elif "label" in facts:
        lines["class"] = "none"
    lines["seed"] = facts.get("seed")
    if origin := facts.get("model"):
        lines["model"] = f"{origin.get('from')} ({str(origin.get('transformer_sha256'))[:12]})"
    lines |= {_SHORTER.get(name, name): _shown(value) for name, value in known.items() if name not in _APART}
    if "attention_modulation" in known:
        lines["AMM"] = _words(known["attention_modulation"])
    lines["batch"] = facts.get("batch")
    if "version" in facts:
        lines["made by"] = f"edt-diffusion {facts['version']}"
    lines["again"] = facts.get("again")
    return [f"{name:<14} {value}" for name, value in lines.items() if value is not None]


def _shown(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(one) for one in value if one is not None) or None
    return value
