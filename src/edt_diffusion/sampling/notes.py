"""What a picture says of itself: how it was made, and how to make it again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..util.errors import UserError
from ..util.pictures import read_notes

# The keyword under which a PNG holds all facts as JSON. `Software`, `Title` and `Comment` are for other programs.
KEYWORD = "edt-diffusion"


@dataclass(frozen=True)
class Notes:
    """The notes of a job's pictures.

    Attributes:
        model: what a manifest says of the model; "from" is shown.
        sampling: what it says of the sampling.
        batch: pictures computed at once.
        command: the words of a command that makes such pictures, without class and seed.
    """

    model: Mapping[str, Any]
    sampling: Mapping[str, Any]
    batch: int
    command: tuple[str, ...]

    def of(self, seed: int, label: int | None, name: str | None) -> dict[str, str]:
        """Texts by PNG keyword, for one picture."""
        which = [] if label is None else ["--classes", str(label)]
        again = shlex.join([*self.command, *which, "--seeds", str(seed)])
        facts = {
            "seed": seed, "label": label, "class": name, "batch": self.batch, "sampling": dict(self.sampling),
            "model": dict(self.model), "version": __version__, "again": again,
        }  # fmt: skip
        texts = {} if name is None else {"Title": name}
        return {
            **texts,
            "Software": f"edt-diffusion {__version__}",
            "Comment": again,
            KEYWORD: json.dumps(facts, ensure_ascii=False),
        }


def read_facts(path: Path) -> dict[str, Any]:
    """What a PNG of `edt sample` says of itself.

    Returns:
        seed, label, class, batch, sampling, model, version and again (a command).

    Raises:
        UserError: it is no PNG, or says nothing.
    """
    text = read_notes(path).get(KEYWORD)
    try:
        facts = json.loads(text or "")
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise UserError(f"{path} does not say how it was made: expected a PNG that edt sample has written")
    return facts
