"""Attention modulation as a person writes it: `off`, `auto`, the name of a preset, or block numbers."""

import re
from typing import Any

from ..util.errors import UserError


def choose_modulation(
    model: Any, amm: str, formula: str = "exp", radius: str | None = None, guidance_scale: float = 1.0
) -> None:
    """Set a model's attention modulation from words.

    Args:
        model: a backbone with `set_attention_modulation`.
        amm: "saved" leaves the model as it is; "off"; "on" is the published placement for this model, or where none is
            known the middle block of each stage of the decoder; "auto" is the published placement or off; the name of
            a preset; or block numbers such as "7,10" (or "7+10"), which settings may follow after a colon:
            "7+10:formula=cos+radius=0.9R".
        formula: "exp" or "cos", with block numbers.
        radius: cells, or a multiple such as "0.9R", with block numbers.
        guidance_scale: of the sampling, which published placements depend on.

    Raises:
        UserError: none of these, or blocks that the model does not have.
    """
    word = amm
    amm, formula, radius = _with_settings(amm, formula, radius)
    if amm == "saved":
        return
    if amm == "on":
        setting = model.suggested_modulation(guidance_scale)
        if setting is None:
            raise UserError("--amm on: no placement is known or suggested for this model: give block numbers")
        model.set_attention_modulation(list(setting.blocks), setting.formula, setting.radius)
        return
    if amm in ("off", "auto") or amm in model.amm_presets:
        model.set_attention_modulation(preset=None if amm == "off" else amm, guidance_scale=guidance_scale)
        return
    try:
        cells = float(radius) if radius and not radius.rstrip().endswith("R") else radius
        blocks = [int(block) for block in amm.replace("+", ",").split(",")]
        model.set_attention_modulation(blocks, formula, cells)
    except ValueError as error:
        known = ", ".join(["saved", "off", "on", "auto", *model.amm_presets])
        raise UserError(f"--amm {word}: expected {known}, or block numbers such as 7,10 ({error})") from None


def _with_settings(amm: str, formula: str, radius: str | None) -> tuple[str, str, str | None]:
    """Blocks, formula and radius of a word such as "7+10:radius=0.9R"."""
    blocks, colon, settings = amm.partition(":")
    given = {"formula": formula, "radius": radius}
    for word in re.split(r"[,+]", settings) if colon else ():
        name, _, value = (part.strip() for part in word.partition("="))
        if name not in given or not value:
            raise UserError(f"--amm {amm}: expected formula=NAME or radius=NUMBER after the colon, as 7+10:radius=0.9R")
        given[name] = value
    return blocks, str(given["formula"]), given["radius"]
