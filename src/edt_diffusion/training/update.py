"""One optimizer step over the global batch: forward and backward over micro-batches, judged, then applied or not."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..objectives import MaskedTraining, StepLoss
from ..util.rng import Purpose, stream
from .config import TrainConfig
from .ema import EMASet
from .guards import Guards, Verdict, all_finite, scaler_skips
from .interrupt import StopRequest
from .meters import Throughput
from .parallel import Parallel


@dataclass(frozen=True)
class Outcome:
    """What a step came to.

    Attributes:
        parts: losses of this process's micro-batches.
        grad_norm: of the whole gradient, before clipping.
        rate: the learning rate.
        verdict: whether the step was applied.
        go_back: whether the run must return to an earlier state.
        stop: whether any process was asked to stop.
    """

    parts: list[StepLoss]
    grad_norm: float
    rate: float
    verdict: Verdict
    go_back: bool
    stop: bool


class Update:
    """Makes optimizer steps. Every process of a job makes the same ones.

    Args:
        config: settings of the loop.
        seed: the run's seed.
        parallel: the network as the processes hold it.
        optimizer: prepared by `parallel`.
        objective: what is minimised; may be replaced.
        learning_rate: rate as a function of the number of steps already made.
        ema: the averages, moved with each step that is applied.
        guards: decide which steps are applied.
        meter: is told of waiting for data.
        stop: is asked once a step.

    Attributes:
        reserve: seconds that a save takes, and what is due after the coming step, kept back from the time allowed.
    """

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        parallel: Parallel,
        optimizer: Any,
        objective: MaskedTraining,
        learning_rate: Callable[[int], float],
        ema: EMASet,
        guards: Guards,
        meter: Throughput,
        stop: StopRequest,
    ) -> None:
        self.config, self.seed = config, seed
        self.parallel, self.accelerator = parallel, parallel.accelerator
        self.optimizer, self.objective, self.learning_rate = optimizer, objective, learning_rate
        self.ema, self.guards, self.meter, self.stop = ema, guards, meter, stop
        self.reserve = 0.0

    def __call__(self, step: int, batches: Iterator[dict[str, Any]]) -> Outcome:
        """Make the update that follows `step` updates."""
        begun, rank = time.perf_counter(), self.accelerator.process_index
        # Whatever a module draws from torch's generator is then a function of the step too.
        torch.manual_seed(int(stream(self.seed, Purpose.MODULE, step, rank).integers(0, 1 << 63)))
        parts: list[StepLoss] = []
        positions: list[Tensor] = []
        micro = self.config.micro_batches
        for index in range(micro):
            with self.parallel.exchange(last=index == micro - 1):
                part, places = self.forward(step, batches)
                self.parallel.backward(part.total / micro)
            parts.append(part)
            positions.append(places)
        rate = self.learning_rate(step) * self.guards.rate_factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.unscale_gradients()
        norm = self.parallel.grad_norm()
        self.stop.check_clock(time.perf_counter() - begun + self.reserve)
        t, losses, norms, stop = self._gathered(parts, torch.cat(positions), norm)
        verdict = self.guards.judge(losses, norms)
        if verdict.apply:
            if self.config.max_grad_norm:
                self.parallel.clip(self.config.max_grad_norm, norm)
            self.parallel.apply(self.optimizer)
            self.ema.update(self.parallel.network)
            self.objective.timesteps.update(t, losses)
        elif scaler_skips(self.accelerator.scaler, self.parallel.gradients()):
            self.optimizer.step()  # which the scaler leaves out, to try a smaller scale
            verdict = Verdict(False)
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(parts, float(norms.max()), rate, verdict, self.guards.count(verdict), stop)

    def forward(self, step: int, batches: Iterator[dict[str, Any]]) -> tuple[StepLoss, Tensor]:
        """The loss of the next micro-batch, and its places in the global batch."""
        with self.meter.data_wait():
            batch = next(batches)
        device = self.accelerator.device
        labels = None if self.parallel.network.null_label is None else batch["class_labels"]
        with self.accelerator.autocast():
            part = self.objective(
                self.parallel.model,
                batch["inputs"].to(device, non_blocking=True),
                None if labels is None else labels.to(device, non_blocking=True),
                seed=self.seed,
                step=step,
                positions=[int(p) for p in batch["positions"]],
                draws=batch.get("draws"),
            )
        return part, torch.as_tensor(batch["positions"])

    def healthy(self, step: int, batches: Iterator[dict[str, Any]]) -> bool:
        """Whether the weights give a finite loss on a batch: after bad steps it may be them or the data.

        Every process calls it.
        """
        with torch.no_grad():
            part, _ = self.forward(step, batches)
        self.parallel.forget_gathered()
        return not self.parallel.agree(not all_finite([part.total]))

    def _gathered(
        self, parts: list[StepLoss], positions: Tensor, grad_norm: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        """Timesteps and losses of the global batch in position order, gradient norms, and whether any process stops.

        Alike in all processes; one exchange and one wait for the device per step.
        """
        device = self.accelerator.device
        t = torch.cat([part.t for part in parts])
        losses = torch.cat([part.sampler_loss for part in parts]).float()
        # float32 holds places and timesteps exactly, up to 2^24.
        told = torch.cat([
            positions.to(device).float(), t.float(), losses, grad_norm.reshape(1).float(),
            torch.tensor([float(self.stop.requested)], device=device),
        ])  # fmt: skip
        rows = torch.as_tensor(self.accelerator.gather(told[None])).cpu().numpy()  # (processes, 3 b + 2)
        places, times, values = (rows[:, :-2].reshape(len(rows), 3, -1)[:, k].reshape(-1) for k in range(3))
        order = places.argsort()
        times = times[order]
        if not t.is_floating_point():
            times = times.astype(np.int64)
        return times, values[order], rows[:, -2], bool(rows[:, -1].any())
