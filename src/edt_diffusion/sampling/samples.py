"""Samples of a model by their number: picture i depends on the seed, its label and the setting only."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..pipelines import ClassConditionalPipeline
from ..pipelines.guidance import GUIDANCE_CHANNELS
from ..pipelines.modulation import choose_modulation
from ..pipelines.precision import in_precision
from ..pipelines.schedulers import default_steps, scheduler_like, scheduler_name, set_steps
from ..util.errors import UserError
from ..util.rng import image_seed
from .settings import SamplingSetting


class Samples:
    """The samples of one setting, made when they are asked for.

    Args:
        pipeline: the model; it is changed only within a call.
        setting: how they are made.
        labels: int64 (N,), or None for an unconditional model.
        count: N.
        seed: picture i is made from `image_seed(seed, i)`.
        batch: pictures computed at once. Batches are always full and begin at multiples of `batch`, so that no picture
            depends on where a range begins or ends.
        seeds: one per picture, in place of those.

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
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.pipeline, self.setting, self.labels = pipeline, setting, labels
        self.count, self.seed, self.batch, self.seeds = count, seed, batch, seeds
        self._converted: Any = None  # the network in the wanted precision
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
            first = start - start % self.batch
            starts = range(first, stop, self.batch)
            pictures = np.concatenate([self._batch(begin, min(begin + self.batch, self.count)) for begin in starts])
        return pictures[start - first : stop - first], time.perf_counter() - begun

    def seed_of(self, number: int) -> int:
        """The seed of picture `number`."""
        return image_seed(self.seed, number) if self.seeds is None else self.seeds[number]

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the sampling: names and numbers that were meant, not the words given."""
        with self._prepared() as network:
            modulation = network.attention_modulation
        return {
            "guidance": self.setting.guidance,
            "guided_channels": GUIDANCE_CHANNELS[self.setting.channels] or "all",
            "guidance_schedule": self.setting.guidance_schedule,
            "scheduler": scheduler_name(self._scheduler()),
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
            seeds=[self.seed_of(number) for number in numbers],
            output_type="uint8",
            guidance=self.setting.guidance_schedule,
            cache=self.setting.cache,
        ).images  # pyright: ignore[reportAttributeAccessIssue]
        return images[: stop - start]

    @contextmanager
    def _prepared(self) -> Iterator[Any]:
        """The pipeline with the network in the wanted precision and modulation; yields the network."""
        kept = self.pipeline.transformer
        network = self._converted
        if network is None:
            # From the original: what a lower precision has rounded does not come back.
            network = self._converted = in_precision(kept, self.setting.precision)
        before = network.attention_modulation
        self.pipeline.transformer = network
        try:
            choose_modulation(network, self.setting.amm, guidance_scale=self.setting.guidance)
            yield network
        finally:
            network._set_modulation(before)
            self.pipeline.transformer = kept
