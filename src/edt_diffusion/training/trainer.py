"""The training loop: restore, then step, log, sample, save, until done or told to stop.

Everything random is keyed by (seed, step, position), and the whole state is in the checkpoint, so that an interrupted
run continues as if it had never stopped. To resume, run the same command again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..objectives import MaskedTraining, StepLoss
from ..util.errors import UserError
from ..util.files import remove_temporaries
from .config import TrainConfig
from .disk import told_by_the_disk
from .divergence import all_finite, diverged, first_non_finite, scaler_skips
from .ema import EMA
from .interrupt import StopRequest
from .lock import RunLock
from .log import MeanMetrics, MetricLog, ProgressReport
from .state import CheckpointStore, Parts

# Called with the number of steps made; takes pictures, evaluates, and so on. Returns values for the log, or None.
Callback = Callable[[int], Mapping[str, float] | None]


class Trainer:
    """Runs a training to its end.

    Args:
        folder: the run folder.
        config: settings of the loop.
        seed: the run's seed, key of every draw.
        accelerator: device, precision and processes.
        model: the bare network; moved to the device here.
        objective: what is minimised.
        make_optimizer: builds the optimizer over the model's trainable parameters.
        learning_rate: rate as a function of the number of steps already made.
        make_ema: builds the EMA from the network.
        make_loader: endless micro-batches from a given step on; see `data.loader.training_loader`.
        export: writes the newest EMA weights (in the model while it is called) as the run's `model/` folder.
        callbacks: (every, callback) pairs, called with the EMA weights in the model.
        quiet: no progress on the terminal.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: TrainConfig,
        seed: int,
        accelerator: Accelerator,
        model: Any,
        objective: MaskedTraining,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        learning_rate: Callable[[int], float],
        make_ema: Callable[[torch.nn.Module], EMA],
        make_loader: Callable[[int], Iterator[dict[str, Any]]],
        export: Callable[[], None],
        callbacks: list[tuple[int, Callback]],
        quiet: bool = False,
    ) -> None:
        self.folder, self.config, self.seed, self.quiet = folder, config, seed, quiet
        self.accelerator = accelerator
        self.network = model.to(accelerator.device)
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.ema = make_ema(self.network)
        optimizer = make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.objective = objective
        self.learning_rate = learning_rate
        self.make_loader = make_loader
        self.export = export
        self.callbacks = callbacks
        self.store = CheckpointStore(folder / "checkpoints", config.keep_checkpoints)
        self.step = self.saved_at = 0
        self.seconds = 0.0
        self.stop = StopRequest()
        self.lock = RunLock(folder, active=accelerator.is_main_process)

    def fit(self) -> bool:
        """Train from the step reached (see `restore`) to the last one.

        Returns:
            True when the last step is made, False when a signal stopped the run (its state is saved).

        Raises:
            UserError: if the loss diverges, a checkpoint cannot be written, for instance to a full disk, or another
                process trains in the folder.
        """
        with self.lock:
            main = self.accelerator.is_main_process
            if main:
                remove_temporaries(self.folder, self.store.folder)
            log = MetricLog(self.folder, self.step) if main else None
            progress = ProgressReport(self.config.steps, self.step, self.quiet or not main)
            try:
                with self.stop:
                    self._loop(log, progress)
            finally:
                progress.close()
                if log is not None:
                    log.close()
        return self.step >= self.config.steps

    def _loop(self, log: MetricLog | None, progress: ProgressReport) -> None:
        self.model.train()
        images, clock = 0, time.perf_counter()
        means = MeanMetrics()
        loader = self.make_loader(self.step)
        while self.step < self.config.steps and not self._must_stop():
            parts, grad_norm, rate = self._train_step(loader)
            means.add([part.metrics for part in parts])
            self.step += 1
            images += self.config.batch_size
            now = time.perf_counter()
            speed = images / max(now - clock, 1e-9)
            values: dict[str, float] = {}
            if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                self.seconds += now - clock
                values = means.read(self.accelerator) | {
                    "lr": rate, "grad_norm": float(grad_norm), "images_per_second": speed, "seconds": self.seconds,
                }  # fmt: skip
                images, clock = 0, now
            progress.step(self.step, values.get("loss"), speed)
            values |= self._call_back()
            if values and log is not None:
                log.write(self.step, values)
            if self.step % self.config.save_every == 0:
                self._save(log)
        if self.saved_at != self.step:
            self._save(log)
        elif self.step and not (self.folder / "model" / "model_index.json").is_file():
            self._write_model()  # a kill came between the renames that replace it

    def _train_step(self, loader: Iterator[dict[str, Any]]) -> tuple[list[StepLoss], Tensor, float]:
        """Forward and backward over all micro-batches, then one update."""
        parts: list[StepLoss] = []
        positions: list[Tensor] = []
        micro = self.config.micro_batches
        for index in range(micro):
            batch = next(loader)
            device = self.accelerator.device
            labels = None if self.network.null_label is None else batch["class_labels"]
            last = index == micro - 1
            # Gradients are exchanged once a step, with the last micro-batch.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    part = self.objective(
                        self.model,
                        batch["inputs"].to(device, non_blocking=True),
                        None if labels is None else labels.to(device, non_blocking=True),
                        seed=self.seed,
                        step=self.step,
                        positions=[int(p) for p in batch["positions"]],
                    )
                self.accelerator.backward(part.total / micro)
            parts.append(part)
            positions.append(torch.as_tensor(batch["positions"]))
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.unscale_gradients()
        trained = [p for p in self.network.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        t, losses = self._checked(parts, torch.cat(positions), grad_norm)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.max_grad_norm, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.network)
        self.objective.timesteps.update(t, losses)
        return parts, grad_norm, rate

    def _checked(self, parts: list[StepLoss], positions: Tensor, grad_norm: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and losses of the whole global batch in position order, alike in all processes, and finite."""
        local = (
            positions,
            torch.cat([part.t for part in parts]),
            torch.cat([part.sampler_loss for part in parts]),
            grad_norm.float().reshape(1),
        )
        device = self.accelerator.device
        places, t, losses, norms = (torch.as_tensor(self.accelerator.gather(x.to(device))) for x in local)
        order = places.argsort()
        t = t[order].cpu().numpy()
        # The check waits for the device no more often than the timestep sampler does.
        losses, norms = np.split(torch.cat([losses[order], norms]).cpu().numpy(), [len(t)])
        bad = first_non_finite(losses, norms)
        if bad is not None:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            if not scaler_skips(self.accelerator.scaler, gradients):
                raise self._diverged(f"{bad[0]} became {bad[1]}", self.step + 1)
        return t, losses

    def _diverged(self, what: str, step: int) -> UserError:
        return diverged(what, step, self.optimizer.defaults["lr"], self.config.max_grad_norm, self.saved_at)

    def _call_back(self) -> dict[str, float]:
        values: dict[str, float] = {}
        due = [call for every, call in self.callbacks if every and self.step % every == 0]
        if due and self.accelerator.is_main_process:
            with self._evaluating():
                for call in due:
                    values |= call(self.step) or {}
        if due:
            self.accelerator.wait_for_everyone()
        return values

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """EMA weights in the network, eval mode."""
        with self.ema.swap(self.network), torch.no_grad():
            self.network.eval()
            try:
                yield
            finally:
                self.network.train()

    def _save(self, log: MetricLog | None) -> None:
        if not all_finite([*self.ema.state_dict()["parameters"].values(), *self.network.parameters()]):
            raise self._diverged("the weights became non-finite", self.step)
        if self.accelerator.is_main_process:
            with told_by_the_disk(self.step, self.folder):
                if log is not None:
                    log.sync()
                # First the model: whenever a kill comes, no checkpoint is newer than the model beside it.
                self._write_model()
                self.store.save(self.step, self._parts().capture(self.step, self.seconds))
        self.accelerator.wait_for_everyone()
        self.saved_at = self.step

    def _write_model(self) -> None:
        if self.accelerator.is_main_process:
            with told_by_the_disk(self.step, self.folder), self._evaluating():
                self.export()

    def restore(self) -> None:
        """Load the newest whole checkpoint of the run folder, if there is one; nothing is written.

        Raises:
            UserError: if there are checkpoints but none is usable, or they are of another architecture.
        """
        step = self.store.newest()
        if step is None:
            return
        numbers = self._parts().apply(self.store.load(step), f"the checkpoint {self.store.path(step)}")
        self.step = self.saved_at = numbers["step"]
        self.seconds = numbers["seconds"]

    def _parts(self) -> Parts:
        return Parts(self.network, self.ema, self.optimizer, self.objective.timesteps, self.accelerator.scaler)

    def _must_stop(self) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop.requested
        flag = torch.tensor([float(self.stop.requested)], device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0  # pyright: ignore[reportArgumentType]
