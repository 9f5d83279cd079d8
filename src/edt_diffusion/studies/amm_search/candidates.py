"""Which settings of attention modulation a search tries, and what they are called."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ...nn.modulation import FORMULAS, AttentionModulation, default_radius_squared_or_given, modulation_matrix
from ...util.errors import UserError
from ...util.lookup import lookup

Radius = float | str | None


def words(setting: AttentionModulation | None) -> str:
    """A setting as tables write it: "off", or such as "7+10 exp 0.75R"."""
    if setting is None:
        return "off"
    return f"{'+'.join(map(str, setting.blocks))} {setting.formula} {radius_words(setting.radius)}"


def radius_words(radius: Radius) -> str:
    """A radius as users write it; the default is "1R"."""
    return "1R" if radius is None else str(radius) if isinstance(radius, str) else f"{radius:g}"


def config_of(setting: AttentionModulation | None) -> dict[str, Any] | None:
    """A setting as JSON holds it; None for off."""
    return None if setting is None else setting.to_config()


def options(setting: AttentionModulation | None) -> str:
    """What `edt sample` has to be told for a setting."""
    if setting is None:
        return "--amm off"
    radius = "" if setting.radius is None else f" --amm-radius {radius_words(setting.radius)}"
    return f"--amm {','.join(map(str, setting.blocks))} --amm-formula {setting.formula}{radius}"


def parse_blocks(text: str, count: int) -> list[int]:
    """Block numbers from such as "0-11" or "3,7-9".

    Raises:
        UserError: another form, or a number that is not in 0 ... `count` - 1.
    """
    out: list[int] = []
    for part in text.replace("+", ",").split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not 0 <= first <= last < count:
            raise UserError(f"--blocks {text!r}: expected numbers from 0 to {count - 1}, such as 0-{count - 1} or 3,5")
        out += range(first, last + 1)
    return sorted(set(out))


def parse_radii(text: str, option: str = "--radii") -> list[Radius]:
    """Radii from such as "0.5R,0.75R,1R" or "4,6"; "1R" is the default one, None.

    Raises:
        UserError: one is neither a positive number of cells nor a positive multiple of R.
    """
    out: list[Radius] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            relative = part.endswith("R")
            radius: Radius = f"{float(part[:-1]):g}R" if relative else float(part)
            default_radius_squared_or_given(3, 3, radius)
        except ValueError:
            raise UserError(f"{option} {text!r}: expected such as 0.5R,0.75R,1R, or numbers of cells") from None
        out.append(None if radius == "1R" else radius)
    return list(dict.fromkeys(out))


def parse_formulas(text: str) -> list[str]:
    """Formulas from such as "exp,cos".

    Raises:
        UserError: an unknown one.
    """
    out = [part.strip() for part in text.split(",")]
    for name in out:
        lookup(FORMULAS, name, "attention modulation formula")
    return list(dict.fromkeys(out))


def usable_blocks(network: Any, wanted: Sequence[int] | None = None) -> list[int]:
    """The blocks of a backbone whose grid is large enough for modulation.

    Args:
        network: see `models.amm`.
        wanted: of these only.

    Raises:
        UserError: there is none.
    """
    layers = network.attention_layers()
    among = range(len(layers)) if wanted is None else wanted
    blocks = [block for block in among if min(layers[block][1]) >= 3]
    if not blocks:
        raise UserError(
            "no block among those asked for has a token grid of at least 3x3, which attention modulation needs: name "
            "others by --blocks"
        )
    return blocks


def single_blocks(blocks: Iterable[int], radii: Sequence[Radius], formulas: Sequence[str]) -> list[AttentionModulation]:
    """Every block with every radius and formula."""
    return [
        AttentionModulation((block,), formula, radius) for block in blocks for formula in formulas for radius in radii
    ]


def extended(parent: AttentionModulation, block: int) -> AttentionModulation:
    """A setting with one block more."""
    return AttentionModulation((*parent.blocks, block), parent.formula, parent.radius)


class Distinct:
    """Settings by what they do: two whose matrices are equal are one, on small grids a matter of course.

    Args:
        network: the backbone that they are for.
    """

    def __init__(self, network: Any) -> None:
        self._grids = [grid for _, grid in network.attention_layers()]
        self._known: dict[tuple, AttentionModulation] = {}
        self._digests: dict[tuple, bytes] = {}

    def __call__(self, setting: AttentionModulation) -> AttentionModulation:
        """The first setting seen that does the same."""
        effect = tuple((block, self._digest(self._grids[block], setting)) for block in setting.blocks)
        return self._known.setdefault(effect, setting)

    def of(self, settings: Iterable[AttentionModulation]) -> list[AttentionModulation]:
        """Without those that do the same as one before them."""
        return list(dict.fromkeys(map(self, settings)))

    def _digest(self, grid: tuple[int, int], setting: AttentionModulation) -> bytes:
        key = (grid, setting.formula, setting.radius)
        if key not in self._digests:
            matrix = modulation_matrix(*grid, setting.formula, setting.radius)
            self._digests[key] = hashlib.sha256(matrix.numpy().data).digest()
        return self._digests[key]
