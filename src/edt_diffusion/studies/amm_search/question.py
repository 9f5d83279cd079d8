"""The folder of a search: what was asked, so that another question is refused, and the answer when there is one."""

import json
from pathlib import Path
from typing import Any

from ...evaluation.result import environment
from ...nn.modulation import AttentionModulation
from ...util.errors import UserError
from ...util.files import atomic_write_json
from .candidates import config_of

QUESTION, ANSWER = "question.json", "amm.json"

# Says only where something lay.
_NOT_COMPARED = "from"


def begin(
    out: Path, asked: dict[str, Any], saved: AttentionModulation | None, device: str
) -> AttentionModulation | None:
    """Write the question, or make sure that it is the folder's; returns the setting saved when it was first asked."""
    path = out / QUESTION
    if not path.exists():
        foreign = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
        if foreign:
            raise UserError(f"{out} holds {foreign[0]!r} and no {QUESTION} of edt amm search: choose another --out")
        atomic_write_json(path, {**asked, "saved": config_of(saved), "environment": environment(device)})
        return saved
    try:
        there = json.loads(path.read_text("utf-8"))
        had = there["saved"]
        saved = None if had is None else AttentionModulation.from_config(had)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: remove {out}, or name another folder by --out") from None
    now, then = compared(asked), compared(there)
    changed = [name for name in now if now[name] != then.get(name)]
    if changed:
        raise UserError(
            f"{out} holds a search with another {', another '.join(changed)}: choose another --out, or ask the same as "
            "then"
        )
    return saved


def read_answer(out: Path) -> dict[str, Any] | None:
    """The answer in a folder, or None if there is none yet.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads((out / ANSWER).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{out / ANSWER} is damaged: remove it and run the same command again") from None


def compared(question: dict[str, Any]) -> dict[str, Any]:
    """What of a question decides the answer."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: kept(entry) for name, entry in value.items() if name != _NOT_COMPARED}

    return kept(question)


def settings_of(part: Any) -> dict[str, str]:
    """What a part's configuration says, without names of files and versions."""
    own = {} if part is None else part.config
    return {name: repr(own[name]) for name in own if not name.startswith("_")}


def default_folder(model: str) -> Path:
    """Where the folders of a model's searches lie when nobody says otherwise."""
    path = Path(model)
    return path / "amm" if path.is_dir() else Path("amm") / path.name
