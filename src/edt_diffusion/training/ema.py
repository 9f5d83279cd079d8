"""Averages of a model's weights over the training: the weights that are sampled from.

Only trainable parameters are averaged. The EDT authors average frozen position tables too, which drifts them by up to
1.7e-4 in float32; buffers and frozen parameters stay the model's own here.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from ..util.errors import UserError
from .averages import TrainedParameters, WeightAverage
from .power import MAX_WIDTH, power_decay, power_exponent, width_name
from .sharding import whole_state

_INTERVALS = 32  # between the snapshots of a run, if their distance is not given


class EMAConfig(BaseModel):
    """Averages of the weights (`ema:` in a configuration).

    `decay` and, for short runs that shall forget their random start, `warmup` are those of the average that is sampled
    from. `power` lists relative widths of further averages, of which snapshots are kept so that `edt ema` can make the
    average of any width after the training; two widths, such as [0.05, 0.10], are enough. `snapshot_every` counts
    steps; null means a 32nd of the run.
    """

    model_config = ConfigDict(extra="forbid")

    decay: float = Field(default=0.9999, ge=0, lt=1)
    warmup: bool = True
    power: tuple[float, ...] = ()
    snapshot_every: int | None = Field(default=None, ge=1)

    @field_validator("power")
    @classmethod
    def _distinct_widths(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        for width in widths:
            if not 0.0 < width < MAX_WIDTH:
                raise UserError(f"ema.power={list(widths)}: expected widths between 0 and {MAX_WIDTH}, as [0.05, 0.10]")
        if len({width_name(width) for width in widths}) < len(widths):
            raise UserError(f"ema.power={list(widths)}: expected widths that differ in three decimals, as [0.05, 0.10]")
        return widths

    def interval(self, steps: int) -> int:
        """Steps between two snapshots in a run of `steps`."""
        return self.snapshot_every or -(-steps // _INTERVALS)


class EMA(WeightAverage):
    """Exponential moving average.

    With warm-up, decay_k = min(decay, (1 + k) / (10 + k)) where k = 0, 1, ... counts the updates made before: a short
    run does not keep its random start. Without, decay_k = decay from the first update on (the EDT authors).

    Args:
        model: see `WeightAverage`.
        decay: in [0, 1).
        warmup: see above.
        trained: see `WeightAverage`.

    Raises:
        ValueError: if decay is outside its range.
    """

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, warmup: bool = True, trained: TrainedParameters | None = None
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay = {decay}: expected a number in [0, 1), such as 0.9999")
        self.decay = decay
        self.warmup = warmup
        super().__init__(model, trained)

    def decay_at(self, k: int) -> float:
        return min(self.decay, (1 + k) / (10 + k)) if self.warmup else self.decay


class PowerEMA(WeightAverage):
    """Power-function average (Karras et al. 2024, arXiv 2312.02696, section 3.1): weight t^gamma on the t-th update.

    Its width is a constant share of the training so far, so the random start is forgotten at once (update 1 replaces
    it), and averages of other widths can be made of its snapshots afterwards (`training.posthoc`).

    Args:
        model: see `WeightAverage`.
        sigma_rel: relative width, standard deviation of the weights over the length of the training, in (0, 0.28).
        trained: see `WeightAverage`.

    Attributes:
        sigma_rel: as given.
        gamma: the exponent.

    Raises:
        UserError: if sigma_rel is outside its range.
    """

    def __init__(self, model: nn.Module, sigma_rel: float, trained: TrainedParameters | None = None) -> None:
        self.sigma_rel = sigma_rel
        self.gamma = power_exponent(sigma_rel)
        super().__init__(model, trained)

    def decay_at(self, k: int) -> float:
        return power_decay(self.gamma, k + 1)


class EMASet:
    """Every average of a run: the exponential one that is sampled from, and power-function ones for later.

    Args:
        model: see `WeightAverage`.
        config: which averages.

    Attributes:
        main: the exponential average.
        powers: the others, by name ("ema-0.050" for the relative width 0.05).
        averages: all of them by name, `main` as "ema".
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.trained = TrainedParameters(model)
        self.main = EMA(model, config.decay, config.warmup, self.trained)
        self.powers = {width_name(width): PowerEMA(model, width, self.trained) for width in config.power}
        self.averages: dict[str, WeightAverage] = {"ema": self.main, **self.powers}

    @property
    def num_updates(self) -> int:
        """Number of updates made."""
        return self.main.num_updates

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move every average towards the model's parameters; see `WeightAverage.update`."""
        self.main.refuse_inside_swap()
        tensors = self.trained.tensors(model)
        for average in self.averages.values():
            average.move_towards(tensors)

    def swap(self, model: nn.Module) -> AbstractContextManager[None]:
        """Put the exponential average into the model for the length of a `with` block; see `WeightAverage.swap`."""
        return self.main.swap(model)

    def state_dict(self) -> dict[str, Any]:
        """Return `{"num_updates": int, "groups": {"ema": {name: tensor}, "ema-0.050": ...}}`, tensors live, float32."""
        groups = {name: average.state_dict()["parameters"] for name, average in self.averages.items()}
        return {"num_updates": self.num_updates, "groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in place and on the present devices; all averages or none.

        Raises:
            ValueError: if the averages, their names or their shapes are not these.
        """
        groups: dict[str, dict[str, Tensor]] = state["groups"]
        if groups.keys() != self.averages.keys():
            raise ValueError(
                f"the saved averages are {', '.join(groups)}, this run's {', '.join(self.averages)}: keep ema.power as "
                "it was, for a power-function average must see the training from its start"
            )
        for name, average in self.averages.items():
            average.check(groups[name])
        for name, average in self.averages.items():
            average.fill(int(state["num_updates"]), groups[name])

    def snapshot(self) -> tuple[int, dict[float, dict[str, Tensor]]]:
        """Number of updates, and the power-function averages by width, whole and on the CPU: for `SnapshotStore.save`.

        Where parameters are sharded, every process must call it.
        """
        widths = {average.sigma_rel: average.state_dict()["parameters"] for average in self.powers.values()}
        return self.num_updates, {width: whole_state(parameters) for width, parameters in widths.items()}
