"""The answer of a search in the model's folder, where every later sampling finds it."""

import json
from pathlib import Path
from typing import Any

from ...util.errors import UserError
from ...util.files import atomic_write_json
from .candidates import options

# What of an answer lies beside the model.
REPORT = "amm.json"


def save_setting(model: str, answer: dict[str, Any], apply: bool) -> str:
    """Write the found modulation into the configuration of a saved model, and what was found beside it.

    A run's `model/` is what is written to. Further training writes that folder anew, with the modulation of the run's
    configuration and other weights, of which the search says nothing.

    Args:
        model: run folder, diffusers folder or hub name.
        answer: of the search; see `job.Outcome.facts`.
        apply: False changes nothing.

    Returns:
        What was done, in one line.
    """
    from ...nn.modulation import AttentionModulation

    setting = answer["answer"]["setting"]
    found = None if setting is None else AttentionModulation.from_config(setting)
    by_hand = f"edt sample {options(found)}"
    folder = Path(model)
    folder = folder / "model" if (folder / "model" / "model_index.json").is_file() else folder
    path = folder / "transformer" / "config.json"
    if not path.is_file():
        return f"{model} is no folder here and stays as it is: {by_hand}"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the folder anew") from None
    had = config.get("attention_modulation")
    if not apply:
        return f"{folder} stays as it is; with it: {by_hand}" if had != setting else f"{folder} has it already"
    if had != setting:
        atomic_write_json(path, {**config, "attention_modulation": setting})
    # The report last: where it lies, the setting is in place.
    atomic_write_json(folder / REPORT, answer)
    if had == setting:
        return f"{folder} has AMM off, as before" if setting is None else f"{folder} has it already"
    if setting is None:
        return f"AMM, which was saved in {folder}, is now off"
    return f"saved in {folder}: later samplings have it (training on writes that folder anew, without it)"
