"""A film of how pictures come about: the estimate of the outcome above, the noisy picture below, step by step."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..util.files import atomic_write_bytes
from ..util.pictures import grid
from .plan import Plan
from .samples import Samples

# Frames at most, how long each stands and how long the last.
FRAMES, SECONDS, LAST_SECONDS = 40, 0.12, 2.0
PICTURES = 4


class Recorder:
    """A callback for the end of each step that keeps at most `FRAMES` frames, evenly spread, with the last.

    Attributes:
        steps: the numbers of the steps that are kept.
    """

    def __init__(self) -> None:
        self._every = 1
        self._frames: list[tuple[int, np.ndarray]] = []
        self._last: tuple[Any, int, dict[str, torch.Tensor]] | None = None

    def __call__(self, pipeline: Any, step: int, timestep: float, values: dict[str, torch.Tensor]) -> None:
        self._last = (pipeline, step, {name: tensor.detach().clone() for name, tensor in values.items()})
        if step % self._every == 0:
            self._frames.append((step, _frame(pipeline, values)))
        if len(self._frames) > FRAMES - 1:  # every other one, of those that come as well
            self._every *= 2
            self._frames = [(number, frame) for number, frame in self._frames if number % self._every == 0]

    def frames(self) -> list[tuple[int, np.ndarray]]:
        """(step, picture) of each frame, uint8 (H, W, 3)."""
        assert self._last is not None, "nothing was sampled"
        pipeline, step, values = self._last
        return [(number, frame) for number, frame in self._frames if number != step] + [
            (step, _frame(pipeline, values))
        ]


def _frame(pipeline: Any, values: dict[str, torch.Tensor]) -> np.ndarray:
    rows = [pipeline.decode(values[name], output_type="uint8") for name in ("predicted", "latents")]
    return np.asarray(grid(np.concatenate(rows), len(rows[0])))


def trajectory_rows(plan: Plan) -> list[int]:
    """The pictures of the film: the first of the first classes, or the first ones."""
    classes = list(plan.by_class().values())
    rows = [rows[turn] for turn in range(PICTURES) for rows in classes if turn < len(rows)]
    return rows[:PICTURES]


def write_trajectory(samples: Samples, plan: Plan, path: Path) -> int:
    """Sample a few pictures again, in a batch of their own, and write a GIF of it.

    Returns:
        The number of frames.
    """
    recorder, rows, setting = Recorder(), trajectory_rows(plan), samples.setting
    with samples._prepared():
        samples.pipeline(
            None if plan.labels is None else [int(plan.labels[row]) for row in rows],
            guidance_scale=setting.guidance,
            guidance_channels=setting.channels,
            guidance=setting.guidance_schedule,
            num_inference_steps=samples.steps,
            scheduler=setting.scheduler,
            cache=setting.cache,
            seeds=[plan.seeds[row] for row in rows],
            output_type="latent",
            callback_on_step_end=recorder,
        )
    frames = [Image.fromarray(frame) for _, frame in recorder.frames()]
    times = [round(SECONDS * 1000)] * (len(frames) - 1) + [round(LAST_SECONDS * 1000)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    atomic_write_bytes(path, buffer.getvalue())
    return len(frames)
