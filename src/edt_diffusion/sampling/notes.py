"""What a picture says of itself: how it was made, and how to make it again."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..util.errors import UserError
from ..util.pictures import read_notes
from .samples import Samples

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

    def of(self, seed: int, label: int | None, name: str | None, class_names: Sequence[str] = ()) -> dict[str, str]:
        """Texts by PNG keyword, for one picture.

        Args:
            seed: of the picture.
            label: of the picture; None of an unconditional model.
            name: of its class.
            class_names: of the model, in label order; empty if they are not known.
        """
        which = [] if label is None else ["--classes", _class_word(label, class_names)]
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


def _class_word(label: int, class_names: Sequence[str]) -> str:
    """What `--classes` reads as this label: its number, unless that is the name of a class. Names come first there."""
    number = str(label)
    return class_names[label] if number in class_names else number


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
        raise UserError(f"{path} does not say how it was made: expected a PNG that edt has written")
    return facts


def shareable_name(model: str) -> str:
    """The name of a model as pictures may tell it: without the folders that a whole path goes through."""
    path = Path(model).expanduser()
    return path.name if path.is_absolute() or ".." in path.parts else str(model)


def command_words(model: str, samples: Samples, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The words of a command that makes such pictures; which one is left open."""
    setting, modulation = samples.setting, facts["attention_modulation"]
    words = ["edt", "sample", model, "--steps", str(samples.steps), "--batch-size", str(samples.batch)]
    if setting.scheduler is not None:
        words += ["--scheduler", setting.scheduler]
    if samples.labels is not None:
        words += ["--guidance", repr(setting.guidance)]
    if setting.channels != "all":
        words += ["--guidance-channels", setting.channels]
    for name, option in (("guidance_schedule", "constant"), ("precision", "fp32"), ("cache", "none")):
        if (value := getattr(setting, name)) != option:
            words += [f"--{name.replace('_', '-')}", value]
    if modulation is None:
        words += ["--amm", "off"]
    else:
        words += ["--amm", ",".join(map(str, modulation["blocks"])), "--amm-formula", modulation["formula"]]
        if modulation["radius"] is not None:
            words += ["--amm-radius", str(modulation["radius"])]
    return tuple(words)
