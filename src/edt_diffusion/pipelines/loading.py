"""Finding and opening a trained pipeline, with errors that a user can act on."""

import json
from pathlib import Path
from textwrap import shorten

from ..util.errors import UserError
from ..util.lookup import nearest
from .class_conditional import ClassConditionalPipeline


def load_pipeline(source: str | Path) -> ClassConditionalPipeline:
    """The pipeline in a run folder, diffusers folder, or under a hub name.

    Raises:
        UserError: if there is none, or it is damaged or of a kind unknown here.
    """
    path = Path(source)
    if path.exists():
        inner = path / "model" if (path / "model" / "model_index.json").is_file() else path
        if not (inner / "model_index.json").is_file():
            why = (
                "its training has saved no model yet"
                if (path / "config.yaml").is_file()
                else "no model_index.json there"
            )
            raise UserError(f"{path} holds no model ({why}): expected a run folder or a diffusers folder")
        _check_kind(inner / "model_index.json")
    elif path.is_absolute() or path.parent.is_dir() or str(source).count("/") != 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        guess = nearest(path.name, siblings)
        hint = f" (did you mean '{path.parent / guess}'?)" if guess else ""
        raise UserError(
            f"{source} does not exist: expected a run folder, a diffusers folder, or a hub name user/model{hint}"
        )
    try:
        pipeline = ClassConditionalPipeline.from_pretrained(source)
    except Exception as error:
        reason = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        whole = "a whole folder that edt train or edt convert wrote"
        raise UserError(f"{source} cannot be loaded as an EDT pipeline ({reason}): expected {whole}") from None
    for part in (pipeline.transformer, pipeline.vae):
        for name, tensor in part.state_dict().items() if part is not None else ():
            if tensor.device.type == "meta":
                raise UserError(f"{source} lacks the weights {name}: the folder is incomplete")
    return pipeline


def _check_kind(index: Path) -> None:
    """Refuse a folder of another pipeline class by its name, before diffusers stumbles over its parts."""
    try:
        kind = json.loads(index.read_text("utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is damaged (no JSON with a '_class_name'): copy the folder anew") from None
    if kind != ClassConditionalPipeline.__name__:
        raise UserError(
            f"{index.parent} holds a {kind}: expected a {ClassConditionalPipeline.__name__}, as edt train writes"
        )
