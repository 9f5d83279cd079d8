"""Meters of the training loop: means of metrics, losses by timestep, throughput. None makes a step wait."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from ..util.hardware import peak_memory


class MeanMetrics:
    """Means of the metrics over the steps since they were last read.

    They are summed on the device, so that no step waits for them. A run that was stopped between two lines counts from
    the step at which it goes on.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, parts: list[dict[str, Tensor]], weight: float = 1.0) -> None:
        """Count one step in.

        Args:
            parts: scalars by name, of each of the step's micro-batches.
            weight: of this step against others; steps of equal batches weigh the same.
        """
        self._names = list(parts[0])
        values = torch.stack([torch.stack([part[name].float() for name in self._names]) for part in parts]).mean(0)
        values = values * weight
        self._sum = values if self._sum is None else self._sum + values
        self._weight += weight

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over steps and processes; begins anew. Empty if no step was counted."""
        if self._sum is None or not self._weight:
            return {}
        means = torch.as_tensor(accelerator.reduce(self._sum / self._weight, reduction="mean"))
        self._sum, self._weight = None, 0.0
        return dict(zip(self._names, means.tolist(), strict=True))


class TimestepBins:
    """Mean loss in equal parts of the range of timesteps, since it was last read.

    A mean over all timesteps hides at which noise levels a model still learns.

    Args:
        bins: number of parts.
    """

    def __init__(self, bins: int = 10) -> None:
        self.bins = bins
        self._totals: dict[str, Tensor] = {}  # sums and counts, (2, bins), on the losses' device

    def add(self, t_share: Tensor, losses: dict[str, Tensor]) -> None:
        """Count samples in, without waiting for the device; a loss that is not finite is passed over.

        Args:
            t_share: (B,) place in the range of timesteps, in [0, 1).
            losses: (B,) loss of each sample, by pass ("full", "masked").
        """
        places = (t_share * self.bins).long().clamp(0, self.bins - 1)
        for name, loss in losses.items():
            counted = torch.isfinite(loss)
            rows = torch.stack([torch.where(counted, loss.float(), 0.0), counted.float()])
            if name not in self._totals:
                self._totals[name] = torch.zeros(2, self.bins, device=loss.device)
            self._totals[name].index_add_(1, places.to(loss.device), rows)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over samples and processes; begins anew.

        Returns:
            "loss_full_t0" (least noise), "loss_full_t1", ...; a part in which no sample fell is left out.
        """
        if not self._totals:
            return {}
        totals = torch.as_tensor(accelerator.reduce(torch.stack(list(self._totals.values())), reduction="sum"))
        names = [name if name.startswith("loss") else f"loss_{name}" for name in self._totals]
        self._totals = {}
        return {
            f"{name}_t{place}": total / count
            for name, (sums, counts) in zip(names, totals.tolist(), strict=True)
            for place, (total, count) in enumerate(zip(sums, counts, strict=True))
            if count
        }


class Throughput:
    """Speed of the loop: wall-clock from one reading to the next, without what `pause` encloses.

    What happens between two steps counts, unless paused. On a GPU the clock is ahead of the work that is queued: read
    after something has waited for the device, as the reading of a metric does.

    Args:
        batch_size: images per step, over all processes.
        flops_per_step: floating-point operations of the model in one step; see `training_flops`.
        peak_flops: FLOP/s that the hardware that shares this step can do, or None if unknown; see
            `util.hardware.measured_matmul_peak`, which is of one device.
        device: whose memory is told.
        seconds: what the run had taken before.
        clock: seconds from an arbitrary start.
    """

    def __init__(
        self,
        batch_size: int,
        flops_per_step: float,
        peak_flops: float | None,
        *,
        device: torch.device | str = "cpu",
        seconds: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.batch_size, self.flops_per_step, self.peak_flops = batch_size, flops_per_step, peak_flops
        self.device, self._clock = device, clock
        self._before = seconds
        self._start: float | None = None  # of the window
        self._last = 0.0  # end of the last step
        self._steps = self._pauses = 0
        self._waited = self._paused = self._paused_after = 0.0

    @property
    def seconds(self) -> float:
        """What the run has taken up to the end of the last step, pauses left out."""
        return self._before + self._window()

    def start_step(self) -> None:
        """A step begins; the first one starts the clock."""
        if self._start is None:
            self._start = self._last = self._clock()

    def end_step(self) -> None:
        """A step is made."""
        assert self._start is not None, "start_step comes first"
        self._last = self._clock()
        self._paused += self._paused_after
        self._paused_after = 0.0
        self._steps += 1

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Encloses the fetching of a batch."""
        begun = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - begun

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Encloses what is no training: sampling, validation, saving. A pause within a pause counts once."""
        begun, self._pauses = self._clock(), self._pauses + 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._start is not None and not self._pauses:
                self._paused_after += self._clock() - begun

    def read(self) -> dict[str, float]:
        """Figures since they were last read; begins anew. Empty if no step was made.

        Returns:
            "images_per_second"; "step_seconds"; "data_wait_share" (0 to 1, of the time the loop waited for data);
            "mfu" (model-flops utilisation, 0 to 1; only if the peak is known); "memory_gib" (peak so far, see
            `util.hardware.peak_memory`); "seconds" (of the whole run, pauses left out).
        """
        if not self._steps:
            return {}
        seconds = max(self._window(), 1e-9)
        values = {
            "images_per_second": self._steps * self.batch_size / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait_share": self._waited / seconds,
        }
        if self.peak_flops:
            values["mfu"] = self._steps * self.flops_per_step / seconds / self.peak_flops
        memory = peak_memory(self.device)
        if memory is not None:
            values["memory_gib"] = memory / 2**30
        self._before = values["seconds"] = self.seconds
        # A pause since the last step belongs to the next window, which begins where that step ended.
        self._start, self._steps = self._last, 0
        self._waited = self._paused = 0.0
        return values

    def _window(self) -> float:
        return 0.0 if self._start is None else self._last - self._start - self._paused


def training_flops(multiply_adds: float, batch: int, passes: float, checkpointed: bool = False) -> float:
    """Floating-point operations of one training step, matrix products and convolutions only.

    A multiply-add is 2 operations, and the backward pass takes twice the forward pass: 2 x 3 x multiply-adds x images x
    passes (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). This is what model-flops utilisation is made of.

    Args:
        multiply_adds: of one image through the network once.
        batch: images per step.
        passes: forward passes of each image, 2 for a full and a masked one; a pass with fewer tokens may count less.
        checkpointed: count the forward pass once more, as gradient checkpointing runs it: what the hardware does, not
            what the model needs.
    """
    return 2.0 * (4 if checkpointed else 3) * multiply_adds * batch * passes
