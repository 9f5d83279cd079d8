"""The training loop: restore, then step, log, sample, save, until done or told to stop.

Everything random is keyed by (seed, step, position), and the whole state is in the checkpoint, so that an interrupted
run continues as if it had never stopped. To resume, run the same command again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from ..objectives import MaskedTraining, StepLoss
from ..util.errors import UserError
from .config import TrainConfig
from .ema import EMA
from .interrupt import StopRequest
from .log import MetricLog, ProgressReport
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
        self.step = 0
        self.seconds = 0.0
        self.stop = StopRequest()

    def fit(self) -> bool:
        """Train from the step reached (see `restore`) to the last one.

        Returns:
            True when the last step is made, False when a signal stopped the run (its state is saved).

        Raises:
            UserError: if a checkpoint cannot be written, for instance to a full disk.
        """
        self.model.train()
        main = self.accelerator.is_main_process
        log = MetricLog(self.folder, self.step) if main else None
        progress = ProgressReport(self.config.steps, self.step, self.quiet or not main)
        saved_at, images, clock = self.step, 0, time.perf_counter()
        try:
            with self.stop:
                loader = self.make_loader(self.step)
                while self.step < self.config.steps and not self._must_stop():
                    loss, grad_norm, rate = self._train_step(loader)
                    self.step += 1
                    images += self.config.batch_size
                    logged = self.step % self.config.log_every == 0 or self.step == self.config.steps
                    now = time.perf_counter()
                    speed = images / max(now - clock, 1e-9)
                    values: dict[str, float] = {}
                    if logged:
                        values = self._averaged(loss) | {
                            "lr": rate,
                            "grad_norm": float(grad_norm),
                            "images_per_second": speed,
                        }
                        self.seconds += now - clock
                        values["seconds"] = self.seconds
                        images, clock = 0, now
                    progress.step(self.step, values.get("loss"), speed)
                    values |= self._call_back()
                    if values and log is not None:
                        log.write(self.step, values)
                    if self.step % self.config.save_every == 0:
                        self._save(log)
                        saved_at = self.step
                if saved_at != self.step:
                    self._save(log)
        finally:
            progress.close()
            if log is not None:
                log.close()
        return self.step >= self.config.steps

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
            with nullcontext() if last else self.accelerator.no_sync(self.model), self.accelerator.autocast():
                part = self.objective(
                    self.model,
                    batch["images"].to(device, non_blocking=True),
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
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.max_grad_norm, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.network)
        self._update_timesteps(parts, torch.cat(positions))
        return parts, grad_norm, rate

    def _update_timesteps(self, parts: list[StepLoss], positions: Tensor) -> None:
        """Give the sampler the losses of the whole global batch in position order, so that all processes agree."""
        device = self.accelerator.device
        gathered = [
            self.accelerator.gather(x.to(device))
            for x in (positions, torch.cat([p.t for p in parts]), torch.cat([p.sampler_loss for p in parts]))
        ]
        order = gathered[0].argsort()  # pyright: ignore[reportAttributeAccessIssue]
        t, losses = (x[order].cpu().numpy() for x in gathered[1:])  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
        self.objective.timesteps.update(t, losses)

    def _averaged(self, parts: list[StepLoss]) -> dict[str, float]:
        """Metrics of one step, averaged over micro-batches and processes."""
        names = list(parts[0].metrics)
        values = torch.stack([torch.stack([part.metrics[name].float() for name in names]) for part in parts]).mean(0)
        values = self.accelerator.reduce(values, reduction="mean")
        return dict(zip(names, values.tolist(), strict=True))  # pyright: ignore[reportAttributeAccessIssue]

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
        if self.accelerator.is_main_process:
            try:
                if log is not None:
                    log.sync()
                # First the model: whenever a kill comes, no checkpoint is newer than the model beside it.
                with self._evaluating():
                    self.export()
                self.store.save(self.step, self._parts().capture(self.step, self.seconds))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"step {self.step} cannot be saved in {self.folder} ({error}): make room and run the same command "
                    "again; it goes on from the last step saved"
                ) from error
        self.accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Load the newest whole checkpoint of the run folder, if there is one; nothing is written.

        Raises:
            UserError: if there are checkpoints but none is usable, or they are of another architecture.
        """
        step = self.store.newest()
        if step is None:
            return
        numbers = self._parts().apply(self.store.load(step), f"the checkpoint {self.store.path(step)}")
        self.step, self.seconds = numbers["step"], numbers["seconds"]

    def _parts(self) -> Parts:
        return Parts(self.network, self.ema, self.optimizer, self.objective.timesteps, self.accelerator.scaler)

    def _must_stop(self) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop.requested
        flag = torch.tensor([float(self.stop.requested)], device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0  # pyright: ignore[reportArgumentType]
