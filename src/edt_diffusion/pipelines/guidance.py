"""Guidance: what a sampler is given for each step, from one or two predictions of raw networks.

Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) moves the prediction for a class away from that for no
class. Autoguidance (Karras et al., arXiv 2406.02507) moves it away from that of a weaker network for the same class.
How far may change over the steps: within an interval of noise levels only (Kynkäänniemi et al., arXiv 2404.07724), or
along a power of a cosine, as MDTv2 (arXiv 2303.14389) samples.
"""

import contextlib
import math
import re
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..caching import reset
from ..util.errors import UserError
from ..util.lookup import lookup, nearest

# "authors" guides the first three channels only, as the released DiT, MDT and EDT samplers do on four-channel latents.
GUIDANCE_CHANNELS: dict[str, int | None] = {"all": None, "authors": 3}


@dataclass(frozen=True)
class Constant:
    """The same scale at every step."""

    def scale(self, scale: float, level: float) -> float:
        """The scale at noise level `level` = t / T, in 0 ... 1."""
        return scale


@dataclass(frozen=True)
class Interval:
    """The scale within low <= t / T <= high, none (one pass a step) outside.

    The steps of highest noise, which guidance narrows to few layouts, and those of lowest noise, which it hardly
    changes, are left alone.
    """

    low: float = 0.1
    high: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"guidance interval {self.low:g} to {self.high:g}: expected 0 <= low < high <= 1")

    def scale(self, scale: float, level: float) -> float:
        """As `Constant.scale`."""
        return scale if self.low <= level <= self.high else 1.0


@dataclass(frozen=True)
class PowerCosine:
    """1 + (scale - 1) (1 - cos(pi (1 - t / T)^power)) / 2: none at pure noise, all of it at the end."""

    power: float = 4.0

    def __post_init__(self) -> None:
        if not (self.power > 0 and math.isfinite(self.power)):
            raise UserError(f"guidance power {self.power:g}: expected a finite number above 0, such as 4")

    def scale(self, scale: float, level: float) -> float:
        """As `Constant.scale`."""
        share = min(max(1 - level, 0.0), 1.0)
        return 1 + (scale - 1) * (1 - math.cos(math.pi * share**self.power)) / 2


Schedule = Constant | Interval | PowerCosine
GUIDANCE_SCHEDULES: dict[str, type] = {"constant": Constant, "interval": Interval, "power-cosine": PowerCosine}


def parse_schedule(text: "str | Schedule") -> Schedule:
    """A schedule by name, with settings after a colon: "constant", "interval:low=0.2,high=0.8", "power-cosine:power=4".

    Raises:
        UserError: an unknown name or setting (with the nearest one), or a value that is no number or out of range.
    """
    if not isinstance(text, str):
        return text
    name, _, settings = text.partition(":")
    kind = lookup(GUIDANCE_SCHEDULES, name.strip(), "guidance schedule")
    known = [field.name for field in fields(kind)]
    given: dict[str, float] = {}
    for word in (word for word in re.split(r"[,+]", settings) if word.strip()):
        key, sign, value = (part.strip() for part in word.partition("="))
        if not sign or key not in known:
            guess = nearest(key, known)
            hint = f" (did you mean {guess!r}?)" if guess else ""
            expected = ", ".join(f"{entry}=NUMBER" for entry in known) or "no settings"
            raise UserError(
                f"{word.strip()!r} is no setting of the guidance schedule {name!r}: expected {expected}{hint}"
            )
        if key in given:
            raise UserError(f"{key} of the guidance schedule {name!r} is given twice: give it once")
        try:
            given[key] = float(value)
        except ValueError:
            raise UserError(f"{key}={value} of the guidance schedule {name!r}: expected a number") from None
    return kind(**given)


def schedule_word(schedule: Schedule) -> str:
    """The word that `parse_schedule` makes an equal schedule of, with all settings."""
    name = next(name for name, kind in GUIDANCE_SCHEDULES.items() if isinstance(schedule, kind))
    settings = ",".join(f"{field.name}={getattr(schedule, field.name)!r}" for field in fields(schedule))
    return f"{name}:{settings}" if settings else name


@dataclass(frozen=True)
class Guidance:
    """How predictions are guided.

    Attributes:
        scale: 1 is off and costs one pass a step; larger values move further.
        schedule: how the scale changes over the steps.
        channels: "all", or "authors" for the first three of the noise channels.
        joint: both predictions of classifier-free guidance in one batch, or one after the other (half the memory).
        weaker: a network for autoguidance, of the same inputs and outputs; None for classifier-free guidance.

    Raises:
        UserError: a scale below 0 or not finite, or an unknown name of channels.
    """

    scale: float = 1.0
    schedule: Schedule = Constant()
    channels: str = "all"
    joint: bool = True
    weaker: Any = None

    def __post_init__(self) -> None:
        if self.channels not in GUIDANCE_CHANNELS:
            raise UserError(f"guidance_channels={self.channels!r}: expected {' or '.join(GUIDANCE_CHANNELS)}")
        if not (self.scale >= 0 and math.isfinite(self.scale)):
            raise UserError(f"guidance_scale={self.scale:g}: expected 0 or more (1 is off)")

    @property
    def always_doubled(self) -> bool:
        """Whether every step of a conditional model has both halves in one batch."""
        return self.scale != 1.0 and self.schedule == Constant() and self.weaker is None and self.joint


class GuidedNetwork:
    """A network as a sampler calls it: `guided(sample, timestep)` gives the raw prediction in float32.

    Passes over the network run in cache contexts: "cond_uncond" for both halves in one batch, the unconditional half
    first; "cond" and "uncond" for separate ones; "weaker" for a weaker network. Where steps change between one pass and
    two, features kept for reuse are forgotten, because they are of steps long past.

    Args:
        network: a denoiser such as `EDTTransformer2DModel`.
        labels: what it is asked for: (B,) int64; or (B, classes + 1), weights of the rows of its class table; or None.
        guidance: see `Guidance`; without effect where `labels` is None and there is no weaker network.
        horizon: T, what the network is told at pure noise.

    Attributes:
        passes: passes of the batch over a network so far: 1 a step, or 2 with guidance.
    """

    def __init__(self, network: Any, labels: Tensor | None, guidance: Guidance, horizon: float) -> None:
        self.network, self.labels, self.guidance, self.horizon = network, labels, guidance, horizon
        self.null = None if labels is None else null_labels(labels, network.null_label)
        channels = network.config.in_channels
        self.guided_channels = min(GUIDANCE_CHANNELS[guidance.channels] or channels, channels)
        self.passes = 0
        self._ways: str | None = None
        if guidance.weaker is not None:
            _check_alike(network.config, guidance.weaker.config)

    def reset(self) -> None:
        """Forget features that either network keeps for reuse."""
        reset(self.network)
        if self.guidance.weaker is not None:
            reset(self.guidance.weaker)

    def scale_at(self, timestep: Tensor | float) -> float:
        """The guidance scale at a timestep; 1 means one pass."""
        if self.labels is None and self.guidance.weaker is None:
            return 1.0
        return self.guidance.schedule.scale(self.guidance.scale, float(timestep) / self.horizon)

    @property
    def doubled(self) -> bool:
        """Whether guided steps hold both halves in one batch."""
        return self.guidance.weaker is None and self.guidance.joint

    def __call__(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """(B, C, H, W) and one timestep -> (B, out_channels, H, W), float32."""
        scale = self.scale_at(timestep)
        joint = scale != 1.0 and self.doubled
        ways = "joint" if joint else "single" if scale == 1.0 else "separate"
        if self._ways not in (None, ways):
            self.reset()
        self._ways = ways
        if joint:
            labels = torch.cat([self.null, self.labels])  # pyright: ignore[reportArgumentType, reportCallIssue]
            both = self._pass(self.network, "cond_uncond", torch.cat([sample, sample]), timestep, labels)
            uncond, cond = both.chunk(2)
            return combine(cond, uncond, scale, self.guided_channels)
        cond = self._pass(self.network, "cond", sample, timestep, self.labels)
        if scale == 1.0:
            return cond
        if self.guidance.weaker is not None:
            # In a context of its own: it may be the very network.
            other = self._pass(self.guidance.weaker, "weaker", sample, timestep, self.labels)
        else:
            other = self._pass(self.network, "uncond", sample, timestep, self.null)
        return combine(cond, other, scale, self.guided_channels)

    def _pass(
        self, network: Any, context: str, sample: Tensor, timestep: Tensor | float, labels: Tensor | None
    ) -> Tensor:
        self.passes += 2 if context == "cond_uncond" else 1
        cached = network.cache_context(context) if hasattr(network, "cache_context") else contextlib.nullcontext()
        with cached:
            output = network(
                hidden_states=sample.to(network.dtype), timestep=timestep, class_labels=labels, return_dict=False
            )
        return output[0].float()


def _check_alike(config: Any, weaker: Any) -> None:
    for name in ("num_classes", "in_channels", "sample_size"):
        ours, theirs = (list(one[name]) if isinstance(one[name], tuple) else one[name] for one in (config, weaker))
        if ours != theirs:
            raise UserError(
                f"the weaker network has {name}={theirs} and the model {ours}: autoguidance needs equal ones"
            )


def null_labels(labels: Tensor, null: int) -> Tensor:
    """Labels of the same form that mean no class."""
    if not labels.is_floating_point():
        return torch.full_like(labels, null)
    weights = torch.zeros_like(labels)
    weights[:, null] = 1
    return weights


def combine(cond: Tensor, other: Tensor, scale: float, guided_channels: int | None = None) -> Tensor:
    """Move one prediction away from another.

    Args:
        cond, other: network outputs, (B, C, H, W) or with 2 C channels where the variance is predicted too; `other` is
            unconditional, or of a weaker network.
        scale: 1 returns `cond`, larger values move further.
        guided_channels: number of leading channels that are guided; the others (variance channels, and in the
            authors' form every channel after the third) keep the conditional prediction. None guides all given
            channels.

    Returns:
        other + scale * (cond - other) on the guided channels, `cond` elsewhere.
    """
    if guided_channels is None or guided_channels >= cond.shape[1]:
        return other + scale * (cond - other)
    guided = cond.clone()
    head = slice(0, guided_channels)
    guided[:, head] = other[:, head] + scale * (cond[:, head] - other[:, head])
    return guided
