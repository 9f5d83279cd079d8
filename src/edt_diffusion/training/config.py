"""Settings of the loop, the optimizer and the EMA (`train:`, `optimizer:` and `ema:` in a configuration)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..util.errors import UserError
from ..util.lookup import lookup
from .guards import GuardSettings
from .optim import LR_SCHEDULES, OPTIMIZERS, build_optimizer, learning_rate


class TrainConfig(BaseModel):
    """Settings of the loop (`train:` in a configuration).

    Attributes:
        steps: optimizer steps.
        batch_size: global batch, over all processes and micro-batches.
        micro_batches: parts into which a process splits its share to save memory.
        mixed_precision: autocast to "bf16" or "fp16" (GPU only); weights, loss and averages stay float32.
        matmul_precision: of float32 matrix products; "high" is TF32 on a GPU, "medium" bfloat16 inside.
        gradient_checkpointing: recompute activations in the backward pass: everywhere, or in the stages listed.
        joint_passes: the full and the masked pass as one doubled batch or as two; null is the faster by device.
        sharding: "fsdp2" spreads weights, gradients, optimizer and averages over the processes.
        deepspeed: a DeepSpeed configuration (JSON), handed to accelerate. Untested.
        compile: compile the repeated blocks.
        max_grad_norm: clip gradients to this norm; 0 is never.
        max_skipped_steps: so many steps in a row without a finite loss and gradient send the run back to its last good
            state, with the learning rate times `rollback_rate`; after `max_rollbacks` returns it ends.
        spikes: what to do about a loss `spike_threshold` robust standard deviations above the recent ones.
        log_every: steps between log lines.
        timestep_bins: parts of the noise range whose losses are logged apart; 0 is none.
        trackers: experiment trackers besides TensorBoard, such as wandb or trackio, if installed.
        sample_every: steps between sample grids; 0 is never.
        save_every: steps between checkpoints.
        keep_checkpoints: so many of the newest are kept.
        keep_every: checkpoints at multiples of it are kept for ever; 0 is none.
        best_metric: the weights with the best value of this logged metric are kept in best/; null is val_loss where
            there is validation.
        best_mode: whether the least or the greatest value is best.
    """

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(default=400_000, ge=1, description="optimizer steps")
    batch_size: int = Field(default=256, ge=1, description="global batch, over all processes and micro-batches")
    micro_batches: int = Field(
        default=1, ge=1, description="parts into which a process splits its batch to save memory"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    gradient_checkpointing: bool | tuple[int, ...] = False
    joint_passes: bool | None = None
    sharding: Literal["none", "fsdp2"] = "none"
    deepspeed: str | None = None
    compile: bool = False
    max_grad_norm: float = Field(default=0.0, ge=0, description="clip gradients to this norm; 0 = never")
    max_skipped_steps: int = Field(default=5, ge=1)
    max_rollbacks: int = Field(default=3, ge=0)
    rollback_rate: float = Field(default=0.5, gt=0, le=1)
    spikes: Literal["off", "warn", "skip"] = "warn"
    spike_threshold: float = Field(default=10.0, gt=0)
    log_every: int = Field(default=50, ge=1)
    timestep_bins: int = Field(default=10, ge=0)
    trackers: tuple[str, ...] = ()
    sample_every: int = Field(default=1000, ge=0, description="0 = never")
    save_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    keep_every: int = Field(default=0, ge=0, description="keep the checkpoints of these steps for ever; 0 = none")
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare `no` as false

    @property
    def guards(self) -> GuardSettings:
        """When steps are left out and the run goes back."""
        return GuardSettings(
            self.max_skipped_steps, self.max_rollbacks, self.rollback_rate, self.spikes, self.spike_threshold
        )

    @field_validator("spikes", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value

    @model_validator(mode="after")
    def _splits_evenly(self) -> "TrainConfig":
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"train.batch_size={self.batch_size} cannot be split into train.micro_batches={self.micro_batches} "
                f"equal parts: use a multiple, such as {-(-self.batch_size // self.micro_batches) * self.micro_batches}"
            )
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> "TrainConfig":
        usual = type(self).model_fields["spike_threshold"].default  # which a saved configuration names too
        if self.spikes == "off" and self.spike_threshold != usual:
            raise UserError(
                f"train.spike_threshold={self.spike_threshold:g} does nothing with train.spikes=off: choose warn or "
                f"skip, or leave the threshold at {usual:g}"
            )
        if self.best_mode == "max" and self.best_metric is None:
            raise UserError(
                "train.best_mode=max needs train.best_metric, the logged value whose greatest is best: name it (the "
                "usual val_loss is best where it is least)"
            )
        return self


class OptimizerConfig(BaseModel):
    """Optimizer and learning rate; the defaults are the authors' for S and B (XL starts at 5e-4).

    `decay_steps: null` means the number of training steps.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = "adan"
    lr: float = Field(default=1e-3, gt=0, lt=1e36)
    betas: tuple[float, ...] | None = None
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: str = "paper"
    final_lr: float = Field(default=5e-5, ge=0)
    decay_steps: int | None = Field(default=400_000, ge=1)
    warmup_steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _known(self) -> "OptimizerConfig":
        lookup(OPTIMIZERS, self.name, "optimizer")
        lookup(LR_SCHEDULES, self.schedule, "learning-rate schedule")
        wanted = {"adan": 3, "adamw": 2}[self.name]
        if self.betas is not None and len(self.betas) != wanted:
            raise ValueError(f"{self.name} takes {wanted} betas, {len(self.betas)} were given")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: expected numbers from 0 up to, but not, 1")
        return self

    def make(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Build the optimizer over `params`."""
        extra = {} if self.betas is None else {"betas": self.betas}
        return build_optimizer(self.name, params, self.lr, eps=self.eps, weight_decay=self.weight_decay, **extra)

    def rate(self, steps: int) -> Callable[[int], float]:
        """Learning rate as a function of the updates made, in a run of `steps` updates."""
        return partial(
            learning_rate,
            schedule=self.schedule,
            base_lr=self.lr,
            final_lr=self.final_lr,
            decay_steps=self.decay_steps or steps,
            warmup_steps=self.warmup_steps,
        )
