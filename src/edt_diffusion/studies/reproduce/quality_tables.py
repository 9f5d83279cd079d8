"""The paper's quality tables and figures as data: what is trained, how it is sampled, what stands in the rows.

What is known of them is that of arXiv 2410.23788's tables by their captions; where a detail is not known, the choice
made here is said in `differs`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ...models.masking import INPUT_MASKS
from ...nn.modulation import AttentionModulation
from .base import Base
from .published import FID, GUIDED_FID, GUIDED_INCEPTION_SCORE, INCEPTION_SCORE, Published
from .study import ALL_METRICS, PLAIN, ArmOf, Study, VariantOf

_FULL = {"objective.passes": "full"}
# Tokens left out at the input and guessed by a side interpolater, as MDTv2 trains.
_MDT_MASKING = {
    "model.side_interpolater": True, "objective.masks.input": list(INPUT_MASKS), "objective.masks.down": [],
    "objective.passes": "full+masked",
}  # fmt: skip
_EDT_MASKING = {"objective.passes": "full+masked"}
_NO_TIE = {"model.token_information_enhancement": False}
_NO_PES = {"model.positional_encoding_supplement": False}

_EDT = ArmOf("edt", "EDT")
_EDT_STAR = ArmOf("edt-star", "EDT* (no masked training)", settings=_FULL)
_DIT = ArmOf("dit", "DiT", "DiT")
_MDT = ArmOf("mdt", "MDTv2", "MDTv2")


def _amm_sampling(base: Base) -> Mapping[str, Any]:
    return {"amm": _words(base.modulation())}


def _amm_setting(base: Base) -> Mapping[str, Any]:
    return {"objective.train_with_amm": True, "model.attention_modulation": base.modulation().to_config()}


def _words(setting: AttentionModulation, radius: str | None = None) -> str:
    """A modulation as `edt sample --amm` takes it, with another radius if one is given."""
    radius = radius if radius is not None else None if setting.radius is None else str(setting.radius)
    told = [] if setting.formula == AttentionModulation.formula else [f"formula={setting.formula}"]
    told += [] if radius is None else [f"radius={radius}"]
    return "+".join(map(str, setting.blocks)) + (":" + "+".join(told) if told else "")


_OFF = VariantOf("off", "AMM off", {"amm": "off"})
_ON = VariantOf("on", "AMM on", _amm_sampling)
_OWN = VariantOf("on", "AMM on", {"amm": "on"})  # where each backbone has a placement of its own


def _placed(choose: Callable[[list[int], list[int]], list[int]]) -> Callable[[Base], Mapping[str, Any]]:
    """Modulation of blocks chosen among those of the encoder and of the decoder that have large enough grids."""

    def sampling(base: Base) -> Mapping[str, Any]:
        network = base.network("EDT")
        depths, fitting = network.stage_depths, base.modulated_blocks()
        half = sum(depths[: len(depths) // 2])
        decoder = sum(depths[: len(depths) // 2 + 1])
        chosen = choose([b for b in fitting if b < half], [b for b in fitting if b >= decoder])
        return {"amm": _words(AttentionModulation(tuple(chosen), base.modulation().formula))}

    return sampling


def _every_second(blocks: list[int]) -> list[int]:
    """The second, fourth, ... of a list, or its only one."""
    return blocks[1::2] or blocks


_PLACEMENTS = (
    _OFF,
    VariantOf("encoder", "every second block of the encoder", _placed(lambda enc, dec: _every_second(enc))),
    VariantOf("both", "every second block of both", _placed(lambda e, d: [*_every_second(e), *_every_second(d)])),
    VariantOf("decoder", "every second block of the decoder", _placed(lambda enc, dec: _every_second(dec))),
    VariantOf("whole-decoder", "every block of the decoder", _placed(lambda enc, dec: dec)),
    VariantOf("chosen", "the placement of AMM used elsewhere", _amm_sampling),
)

# Multiples of the paper's radius; from 1.42 on no pair is cut.
_RADII = ("0.6R", "0.8R", "1R", "1.2R", "1.5R")


def _radius(radius: str) -> Callable[[Base], Mapping[str, Any]]:
    return lambda base: {"amm": _words(base.modulation(), radius)}


def _range(low: float, high: float) -> str:
    return f"{low:g}-{high:g}"


def _masks(first: tuple[float, float], second: tuple[float, float]) -> Mapping[str, Any]:
    return {"objective.masks.down": [list(first), list(second)], "objective.passes": "full+masked"}


_FIRST = tuple((low / 10, (low + 1) / 10) for low in range(1, 6))
_SECOND = tuple((low / 10, (low + 1) / 10) for low in range(1, 5))
_FIXED_FIRST = (0.4, 0.5)

_UNGUIDED: dict[tuple[str, str, str], dict[str, Published]] = {
    ("edt", "on", size): {"fid": FID[size, 400], "is": INCEPTION_SCORE[size, 400]} for size in ("S", "B", "XL")
}
_GUIDED: dict[tuple[str, str, str], dict[str, Published]] = {
    ("edt", "guided-2", "XL"): {"fid": GUIDED_FID["XL", 2000], "is": GUIDED_INCEPTION_SCORE["XL", 2000]}
}

STUDIES: dict[str, Study] = {
    "table1": Study(
        "EDT, EDT* (no masked training), DiT and MDTv2 without guidance",
        (_EDT, _EDT_STAR, _DIT, _MDT),
        (_OFF, _OWN),
        baseline=("mdt", "off"),
        published=_UNGUIDED,
        speed=True,
        published_of="EDT at 400 thousand iterations",
    ),
    "table2": Study(
        "the same at twice the resolution",
        (_EDT, _DIT, _MDT),
        metrics=("fid", "is", "sfid"),
        baseline=("mdt", "plain"),
        speed=True,
        doubled=True,
    ),
    "table3": Study(
        "EDT, DiT and MDTv2 with and without AMM",
        (_EDT, _DIT, _MDT),
        (_OFF, _OWN),
        notes=("AMM acts in sampling only; each backbone has its own placement.",),
        figure="bars",
    ),
    "table4": Study(
        "token information enhancement (TIE), positional encoding supplement (PES) and masked training, without AMM",
        (
            ArmOf("none", "neither", settings={**_NO_TIE, **_NO_PES, **_FULL}),
            ArmOf("tie", "TIE", settings={**_NO_PES, **_FULL}),
            ArmOf("pes", "PES", settings={**_NO_TIE, **_FULL}),
            ArmOf("tie-pes", "TIE, PES", settings=_FULL),
            ArmOf("tie-pes-mdt", "TIE, PES, MDT masking", settings=_MDT_MASKING),
            ArmOf("tie-pes-edt", "TIE, PES, EDT masking", settings=_EDT_MASKING),
        ),
        baseline=("tie-pes", "plain"),
        differs=("Which combinations the paper's rows are is not known to this project; these are ours.",),
        figure="bars",
    ),
    "table8": Study(
        "AMM in neither, in training and inference, or in inference only",
        (ArmOf("plain", "trained without AMM"), ArmOf("amm", "trained with AMM", settings=_amm_setting)),
        (_OFF, _ON),
        baseline=("plain", "off"),
        notes=(
            "The paper's three are: without and off, without and on (inference only), with and on. Trained with AMM "
            "and sampled without is added.",
        ),
        figure="bars",
    ),
    "table9": Study(
        "placement of AMM in the encoder, the decoder, or both",
        (_EDT,),
        _PLACEMENTS,
        baseline=("edt", "off"),
        differs=("The blocks of the paper's four arrangements are not known to this project; these are ours.",),
        figure="bars",
    ),
    "table10": Study(
        "radius R of AMM",
        (_EDT,),
        (_OFF, *(VariantOf(f"r{radius.removesuffix('R')}", f"radius {radius}", _radius(radius)) for radius in _RADII)),
        baseline=("edt", "off"),
        notes=("R = sqrt((N - 1)² + 4) for N x N tokens, the paper's best; from 1.42 R on no pair of tokens is cut.",),
        differs=("Which radii the paper compares is not known to this project.",),
        figure="bars",
    ),
    "table11": Study(
        "mask ratio of the first down-sampling module",
        tuple(
            ArmOf(f"first-{_range(*share)}", f"first {_range(*share)}", settings=_masks(share, (0.0, 0.0)))
            for share in _FIRST
        ),
        metrics=ALL_METRICS,
        differs=("The second module hides nothing here; what it hides in the paper's table is not known.",),
        notes=("The paper finds 0.3-0.4 best here, and its code uses 0.4-0.5.",),
        figure="bars",
    ),
    "table12": Study(
        "mask ratio of the second down-sampling module, the first at 0.4-0.5",
        tuple(
            ArmOf(f"second-{_range(*share)}", f"second {_range(*share)}", settings=_masks(_FIXED_FIRST, share))
            for share in _SECOND
        ),
        metrics=ALL_METRICS,
        notes=("The authors' code uses 0.1-0.2.",),
        figure="bars",
    ),
    "table13": Study(
        "guidance: EDT at 2, DiT at 1.5, MDTv2 at 3.8 with a power-cosine schedule",
        (_EDT, _DIT, _MDT),
        (
            VariantOf("none", "no guidance"),
            VariantOf("guided-2", "guidance 2 (EDT's)", {"guidance": 2.0}),
            VariantOf("guided-1.5", "guidance 1.5 (DiT's)", {"guidance": 1.5}),
            VariantOf(
                "guided-3.8",
                "guidance 3.8, power-cosine (MDTv2's)",
                {"guidance": 3.8, "guidance_schedule": "power-cosine"},
            ),
        ),
        published=_GUIDED,
        differs=("Each model is sampled with each guidance, not with its own only.",),
        published_of="EDT-XL at 2000 thousand iterations",
        figure="bars",
    ),
    "table14": Study(
        "EDT* with and without AMM along training",
        (_EDT_STAR,),
        (_OFF, _ON),
        metrics=("fid",),
        points=tuple(eighth / 8 for eighth in range(1, 9)),
        notes=("Points are eighths of the budget, as the paper's are of 400 thousand iterations.",),
        figure="curves",
    ),
    "figure6": Study(
        "pictures with and without AMM from the same seeds",
        (_EDT,),
        (_OFF, _ON),
        metrics=(),
        single=True,
        figure="pictures",
    ),
    "figure10": Study(
        "losses of the full and the masked input, with MDT's masking and with EDT's",
        (
            ArmOf("mdt-mask", "MDT masking", settings=_MDT_MASKING),
            ArmOf("edt-mask", "EDT masking", settings=_EDT_MASKING),
        ),
        (PLAIN,),
        metrics=(),
        notes=("Both are trained on the same EDT network, the one with MDT's masking with a side interpolater.",),
        figure="losses",
    ),
}
