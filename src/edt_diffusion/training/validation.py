"""Loss on pictures that are not trained on, at timesteps, noise and masks that never change.

The loss of a training batch varies with the timesteps and noise that were drawn by more than a good change of the
model moves it. Here row i of the held-out pictures always gets timestep (i + 1/2) T / n of n, spread over the rows in a
fixed random order, and noise and masks of its own, so that two values of one run, or of two runs with equal settings,
differ by the weights alone.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..objectives import MaskedTraining, PassDraws, StepDraws
from ..objectives.terms import is_continuous
from ..util.errors import UserError
from ..util.rng import Purpose, normals, stream

_SEED_SHIFT = 0x5EED_0F_7E57  # the draws of validation are none of the training's


class ValidationConfig(BaseModel):
    """Held-out loss (`validation:` in a configuration); without `share` and `path` there is none.

    Attributes:
        share: of the training pictures, of every class alike, that are held out.
        path: pictures or a store of their own instead, read with the other settings of `data:`.
        every: steps between evaluations; null is that of the log lines times ten.
        pictures: at most so many are used.
        batch_size: null is that of a training micro-batch.
    """

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    share: float = Field(default=0.0, ge=0, lt=1)
    path: str | None = None
    every: int | None = Field(default=None, ge=1)
    pictures: int = Field(default=512, ge=1)
    batch_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> "ValidationConfig":
        if self.share and self.path is not None:
            raise UserError(
                f"validation.share={self.share} and validation.path={self.path} were both given: give one of them"
            )
        if not self.share and self.path is None:
            for name in ("every", "pictures", "batch_size"):
                value, usual = getattr(self, name), type(self).model_fields[name].default
                if value != usual:  # a saved configuration names all
                    raise UserError(
                        f"validation.{name}={value} does nothing without pictures to validate on: give "
                        "validation.share or validation.path, or leave it out"
                    )
        return self


class HeldOut(Protocol):
    """Rows that give tensors, and their labels; see `data.loader.TrainingData`."""

    @property
    def labels(self) -> np.ndarray | None: ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int, flip: bool) -> Tensor: ...


class ValidationLoss:
    """The loss of fixed held-out samples; a callback that every process calls.

    Args:
        dataset: the held-out rows; at most `pictures` of them, evenly spaced, are used.
        objective: whose loss; with all its passes, labels kept, AMM as in training.
        accelerator: device, precision and the processes that share the rows.
        network: the bare network, which holds the weights to judge when this is called.
        seed: the run's seed.
        pictures: at most so many rows.
        batch_size: rows at once.

    Calling it with the number of steps made returns `val_loss` (the sum over passes, as the training's `loss`),
    `val_loss_full`, `val_loss_masked`, whichever passes there are.
    """

    def __init__(
        self,
        dataset: HeldOut,
        objective: MaskedTraining,
        accelerator: Any,
        network: Any,
        seed: int,
        pictures: int = 512,
        batch_size: int = 32,
    ) -> None:
        self.objective, self.accelerator, self.network = objective, accelerator, network
        self.dataset, self.batch_size = dataset, batch_size
        self.seed = seed ^ _SEED_SHIFT
        count = min(pictures, len(dataset))
        self.rows = np.arange(count) * len(dataset) // count
        places = stream(self.seed, Purpose.VALIDATION).permutation(count)
        self.uniforms = (places + 0.5) / count

    def __call__(self, _step: int) -> dict[str, float]:
        names = list(self.objective.passes)
        sums = [self._losses(places) for places in self._batches()]
        # Batches are added up in float64 here, not on the device: Apple's has none.
        totals = torch.stack(sums).cpu().numpy().sum(axis=0, dtype=np.float64)
        mine = torch.from_numpy(totals.astype(np.float32)).to(self.accelerator.device)
        told = torch.as_tensor(self.accelerator.reduce(mine, reduction="sum")).tolist()
        losses = {f"val_loss_{name}": value / told[-1] for name, value in zip(names, told, strict=False)}
        return {"val_loss": sum(losses.values()), **losses}

    def _batches(self) -> Iterator[np.ndarray]:
        """This process's batches of places. A sharded network needs every process in every forward pass."""
        step, world = self.batch_size, self.accelerator.num_processes
        starts = list(range(0, len(self.rows), step))
        rounds = -(-len(starts) // world)
        for turn in range(rounds):
            number = turn * world + self.accelerator.process_index
            if number < len(starts):
                yield np.arange(starts[number], min(starts[number] + step, len(self.rows)))
            else:
                yield np.arange(0)

    def _losses(self, places: np.ndarray) -> Tensor:
        """Sums of every pass's loss over some places, and their number, float32 (passes + 1,)."""
        counted = len(places)
        if not counted:
            places = np.arange(1)  # takes part, and counts for nothing
        device = self.accelerator.device
        rows = self.rows[places]
        inputs = self.dataset.batch(rows, np.zeros(len(rows), dtype=np.int64), self.seed, False).to(device)
        labels = self.dataset.labels
        known = None
        if self.network.null_label is not None and labels is not None:
            known = torch.from_numpy(labels[rows].astype(np.int64)).to(device)
        with self.accelerator.autocast():
            loss = self.objective.loss_of(self.network, inputs, self._draws(places, known, tuple(inputs.shape[1:])))
        sums = [values.float().sum() * (1 if counted else 0) for values in loss.pass_losses.values()]
        return torch.stack([*sums, torch.tensor(float(counted), device=device)])

    def _draws(self, places: np.ndarray, labels: Tensor | None, shape: tuple[int, ...]) -> StepDraws:
        """The draws of some rows, functions of the row's place alone; no label is dropped."""
        steps = self.objective.timesteps.num_timesteps
        continuous = is_continuous(self.objective.objective)
        t = self.uniforms[places] * steps
        keys = places.tolist()
        passes = []
        for index, name in enumerate(self.objective.passes):
            plan = self.objective.mask_plan if name == "masked" else None
            masks = None if plan is None else plan.draw(self.seed, 0, keys, self.network.mask_grids)
            noise = normals(self.seed, Purpose.NOISE, 0, keys, shape, index)
            passes.append(PassDraws(name, noise, labels, masks))
        times = torch.from_numpy(t.astype(np.float32) if continuous else t.astype(np.int64))
        return StepDraws(times, torch.ones(len(keys)), passes)
