"""Samples of a model by their number: picture i depends on the seed, its label and the setting only."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..pipelines import ClassConditionalPipeline
from ..pipelines.class_conditional import GUIDANCE_CHANNELS
from ..pipelines.modulation import choose_modulation
from ..pipelines.schedulers import SCHEDULERS, default_steps, scheduler_like, set_steps
from ..util.errors import UserError
from ..util.rng import image_seed
from .settings import SamplingSetting

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Samples:
    """The samples of one setting, made when they are asked for.

    Args:
        pipeline: the model; it is changed only within a call.
        setting: how they are made.
        labels: int64 (N,), or None for an unconditional model.
        count: N.
        seed: picture i is made from `image_seed(seed, i)`.
        batch: pictures computed at once. Batches are always full, so that no picture depends on where a range ends.

    Raises:
        UserError: the setting does not fit the model or the machine.
    """

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        setting: SamplingSetting,
        labels: np.ndarray | None,
        count: int,
        seed: int = 0,
        batch: int = 64,
    ) -> None:
        self.pipeline, self.setting, self.labels = pipeline, setting, labels
        self.count, self.seed, self.batch = count, seed, batch
        if setting.precision == "fp16" and pipeline.device.type == "cpu":
            raise UserError("precision=fp16: a CPU computes it a hundred times slower: use fp32 or bf16")
        if labels is None and setting.guidance != 1.0:
            raise UserError(f"guidance={setting.guidance:g}: this model is unconditional and cannot be guided: use 1")
        sampler = self._scheduler()
        longest = sampler.config["num_train_timesteps"]
        self.steps = default_steps(sampler) if setting.steps is None else setting.steps
        if self.steps > longest:
            raise UserError(
                f"steps={self.steps}: the model's noising process has {longest} steps, give at most as many"
            )
        sampler = copy.deepcopy(sampler)  # what is wrong is told before anything is made
        set_steps(sampler, self.steps)
        if int(sampler.timesteps[0]) == 0:
            raise UserError(f"steps={self.steps}: this scheduler needs at least 2")
        with self._prepared():
            pass

    def __len__(self) -> int:
        return self.count

    def make(self, start: int, stop: int) -> tuple[np.ndarray, float]:
        """Pictures `start` to `stop` - 1, uint8 (N, H, W, C), and the seconds that they took."""
        begun = time.perf_counter()
        with self._prepared():
            starts = range(start, stop, self.batch)
            pictures = np.concatenate([self._batch(first, min(first + self.batch, stop)) for first in starts])
        return pictures, time.perf_counter() - begun

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the sampling: names and numbers that were meant, not the words given."""
        with self._prepared() as network:
            modulation = network.attention_modulation
        return {
            "guidance": self.setting.guidance,
            "guided_channels": GUIDANCE_CHANNELS[self.setting.channels] or "all",
            "scheduler": _scheduler_name(self._scheduler()),
            "steps": self.steps,
            "attention_modulation": None if modulation is None else {
                "blocks": list(modulation.blocks), "formula": modulation.formula, "radius": modulation.radius,
            },
            "precision": self.setting.precision,
            "cache": self.setting.cache,
        }  # fmt: skip

    def _scheduler(self) -> Any:
        pipeline = self.pipeline
        if self.setting.scheduler is None:
            return pipeline.scheduler
        return scheduler_like(self.setting.scheduler, pipeline.scheduler, pipeline.transformer.config.learn_sigma)

    def _batch(self, start: int, stop: int) -> np.ndarray:
        numbers = list(range(start, stop))
        numbers += [stop - 1] * (self.batch - len(numbers))
        images = self.pipeline(
            None if self.labels is None else [int(self.labels[number]) for number in numbers],
            guidance_scale=self.setting.guidance,
            guidance_channels=self.setting.channels,
            num_inference_steps=self.steps,
            scheduler=self.setting.scheduler,
            seeds=[image_seed(self.seed, number) for number in numbers],
            output_type="uint8",
        ).images  # pyright: ignore[reportAttributeAccessIssue]
        return images[: stop - start]

    @contextmanager
    def _prepared(self) -> Iterator[Any]:
        """The pipeline with the network in the wanted precision and modulation; yields the network."""
        kept = self.pipeline.transformer
        dtype = _DTYPES[self.setting.precision]
        network = kept
        if kept.dtype != dtype:
            # From the original every time: what a lower precision has rounded does not come back.
            network = getattr(self, "_cast", None)
            if network is None:
                network = self._cast = copy.deepcopy(kept).to(dtype)
        before = network.attention_modulation
        self.pipeline.transformer = network
        try:
            choose_modulation(network, self.setting.amm, guidance_scale=self.setting.guidance)
            yield network
        finally:
            network._set_modulation(before)
            self.pipeline.transformer = kept


def _scheduler_name(scheduler: Any) -> str:
    """Our name of a scheduler, or that of its class."""
    known = (name for name, choice in SCHEDULERS.items() if isinstance(scheduler, choice.kind))
    return next(known, type(scheduler).__name__)
