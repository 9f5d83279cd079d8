"""The training loop: restore, then step, log, sample, save, until done or told to stop.

Everything random is keyed by (seed, step, position), and the whole state is in the checkpoint, so that an interrupted
run continues as if it had never stopped. To resume, run the same command again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..objectives import MaskedTraining, StepLoss
from ..util.errors import UserError
from ..util.files import atomic_directory, atomic_write_json, remove_temporaries
from ..util.hardware import memory_name
from ..util.rng import Purpose, stream
from .best import Best
from .config import TrainConfig
from .console import Console
from .disk import told_by_the_disk
from .ema import EMASet
from .guards import Guards, Verdict, all_finite, diverged, scaler_skips
from .interrupt import StopRequest
from .lock import RunLock
from .log import MetricLog
from .meters import MeanMetrics, Throughput, TimestepBins
from .parallel import Parallel
from .parts import Parts
from .posthoc import SnapshotStore
from .sharding import whole_state
from .state import Checkpoint, CheckpointStore

# Given the number of steps made, returns numbers for the log and pictures (uint8, (H, W, C)) for it, or nothing.
Call = Callable[[int], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Callback:
    """Something done every so many steps with the EMA weights in the network: pictures, validation, evaluation.

    Attributes:
        every: steps between calls; 0 is never.
        call: see `Call`.
        everywhere: every process calls it, and what the main process gets is logged; otherwise only the main one does.
    """

    every: int
    call: Call
    everywhere: bool = False


@dataclass(frozen=True)
class _Outcome:
    """What one step came to."""

    parts: list[StepLoss]
    grad_norm: float
    rate: float
    verdict: Verdict
    go_back: bool


class Trainer:
    """Runs a training to its end.

    Args:
        folder: the run folder.
        config: settings of the loop.
        seed: the run's seed, key of every draw.
        accelerator: device, precision and processes; see `parallel.make_accelerator`.
        model: the bare network; moved to the device here.
        objective: what is minimised.
        make_optimizer: builds the optimizer over the model's trainable parameters.
        learning_rate: rate as a function of the number of steps already made.
        make_ema: builds the averages from the network.
        make_loader: endless micro-batches from a given step on; see `data.loader.training_loader`.
        export: fills an empty folder with the model as a diffusers folder: the weights in the network, which are the
            averaged ones then, or the state dict given if it is not None. The main process calls it.
        callbacks: what is done now and then; a pair is (every, call).
        snapshot_every: steps between snapshots of the power-function averages, if there are any.
        flops_per_step: of forward and backward passes over the global batch, for the utilisation that is logged.
        peak_flops: of all devices together, FLOP/s; None if it is not known.
        max_seconds: stop and save after so long; None is no limit.
        trackers: accelerate's trackers, already started.
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
        make_ema: Callable[[torch.nn.Module], EMASet],
        make_loader: Callable[[int], Iterator[dict[str, Any]]],
        export: Callable[[Path, dict[str, Tensor] | None], None],
        callbacks: list[Callback | tuple[int, Call]],
        snapshot_every: int = 0,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        max_seconds: float | None = None,
        trackers: Callable[[], list[Any]] = list,
        quiet: bool = False,
    ) -> None:
        self.folder, self.config, self.seed, self.quiet = folder, config, seed, quiet
        self.accelerator = accelerator
        self.parallel = Parallel(accelerator, model, config)
        self.network = self.parallel.network
        self.ema = make_ema(self.network)
        self.optimizer = self.parallel.prepare(
            make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        )
        self.model = self.parallel.model
        self.objective = objective
        self.learning_rate = learning_rate
        self.make_loader = make_loader
        self.export = export
        self.callbacks = [each if isinstance(each, Callback) else Callback(*each) for each in callbacks]
        self.store = CheckpointStore(folder / "checkpoints", config.keep_checkpoints, config.keep_every)
        self.snapshots = SnapshotStore(folder / "ema")
        self.snapshot_every = snapshot_every
        self.guards = Guards(config.guards)
        self.best = Best(folder, config.best_metric, config.best_mode)
        self.meter = Throughput(config.batch_size, flops_per_step, peak_flops, device=accelerator.device)
        self.trackers = trackers
        self.step = self.saved_at = 0
        self.stop = StopRequest(max_seconds)
        self.lock = RunLock(folder, active=accelerator.is_main_process)
        self._initial: Checkpoint | None = None
        self._seconds, self._since = 0.0, None
        self._save_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock time spent in `fit`, over all processes that have worked on the run one after the other."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def fit(self) -> bool:
        """Train from the step reached (see `restore`) to the last one.

        Returns:
            True when the last step is made, False when a signal or the clock stopped the run (its state is saved).

        Raises:
            UserError: if the run diverges in spite of its guards, a checkpoint cannot be written, for instance to a
                full disk, or another process trains in the folder.
        """
        with self.lock:
            main = self.accelerator.is_main_process
            if main:
                remove_temporaries(self.folder, self.store.folder, self.snapshots.folder)
                self.snapshots.drop_after(self.step)
            log = MetricLog(self.folder, self.step, self.trackers()) if main else None
            memory = memory_name(self.accelerator.device)
            console = Console(self.config.steps, self.step, self.quiet or not main, memory=memory)
            if self.step and self.step < self.config.steps:
                console.message("going on from here")
            if self.step < self.config.steps:
                self._since = time.perf_counter()
            try:
                with self.stop:
                    self._loop(log, console)
            finally:
                self._seconds, self._since = self.seconds, None
                console.close()
                if log is not None:
                    log.close()
        return self.step >= self.config.steps

    def _loop(self, log: MetricLog | None, console: Console) -> None:
        self.model.train()
        if self.step == 0:
            self._initial = self._kept()
        means, bins = MeanMetrics(), TimestepBins(self.config.timestep_bins)
        loader = self.make_loader(self.step)
        stopping = self.parallel.agree(self.stop.requested)
        waiting = False
        while self.step < self.config.steps and not stopping:
            self.meter.start_step()
            outcome, stopping = self._train_step(loader)
            self.step += 1
            self.meter.end_step()
            if outcome.verdict.apply:
                means.add([part.metrics for part in outcome.parts])
                if self.config.timestep_bins:
                    for part in outcome.parts:
                        bins.add(part.t_share, part.pass_losses)
            if outcome.verdict.problem:
                done = "" if outcome.verdict.apply else "; the step was left out"
                self._tell(log, console, "spike" if outcome.verdict.apply else "skip", outcome.verdict.problem + done)
            lost = outcome.verdict.problem if outcome.go_back else None
            values: dict[str, float] = {}
            if lost is None:
                last = self.step == self.config.steps
                due = self.step % self.config.save_every == 0 or last or stopping
                # With each save a line too: what a line is the mean of is not in the checkpoint.
                if told := self.step % self.config.log_every == 0 or due:
                    values = self._read(means, bins) | {"lr": outcome.rate, "grad_norm": outcome.grad_norm}
                values |= self._call_back(log)
                if told or self._due():
                    self._keep_best(values)
                if values and log is not None:
                    log.write(self.step, values)
                console.step(self.step, values or None)
                self._snapshot()
                # One process need not wait for the next exchange to know.
                stopping = stopping or (self.accelerator.num_processes == 1 and self.stop.requested)
                lost = self._save(log) if due or stopping or waiting else None
                # A state that is in doubt is not saved: the next good step will be.
                waiting = lost is None and self.saved_at != self.step and (due or waiting)
            if lost is not None:
                self._go_back(lost, log, console)
                loader.close()  # pyright: ignore[reportAttributeAccessIssue]
                loader, stopping = self.make_loader(self.step), False
                means, bins = MeanMetrics(), TimestepBins(self.config.timestep_bins)
        if self.best.metric and self.best.value is None and not stopping:
            console.message(f"no value called {self.best.metric!r} was logged: best/ was not written")
        if self.step and not (self.folder / "model" / "model_index.json").is_file():
            self._write_model(self.folder / "model")  # a kill came between the renames that replace it

    def _train_step(self, loader: Iterator[dict[str, Any]]) -> tuple[_Outcome, bool]:
        """Forward and backward over all micro-batches, then one update; and whether to stop after it."""
        begun, rank = time.perf_counter(), self.accelerator.process_index
        # Whatever a module draws from torch's generator is then a function of the step too.
        torch.manual_seed(int(stream(self.seed, Purpose.MODULE, self.step, rank).integers(0, 1 << 63)))
        parts: list[StepLoss] = []
        positions: list[Tensor] = []
        micro = self.config.micro_batches
        for index in range(micro):
            with self.parallel.exchange(last=index == micro - 1):
                with self.accelerator.autocast():
                    part, places = self._forward(loader)
                self.accelerator.backward(part.total / micro)
            parts.append(part)
            positions.append(places)
        rate = self.learning_rate(self.step) * self.guards.rate_factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.unscale_gradients()
        norm = self.parallel.grad_norm()
        self.stop.check_clock(time.perf_counter() - begun + self._save_seconds)
        t, losses, norms, stopping = self._gathered(parts, torch.cat(positions), norm)
        verdict = self.guards.judge(losses, norms)
        if not verdict.apply and scaler_skips(self.accelerator.scaler, self.parallel.gradients()):
            verdict = Verdict(True)  # the scaler leaves it out, and tries a smaller scale
        if verdict.apply:
            if self.config.max_grad_norm:
                self.parallel.clip(self.config.max_grad_norm, norm)
            self.optimizer.step()
            self.ema.update(self.network)
            self.objective.timesteps.update(t, losses)
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        go_back = self.guards.count(verdict)
        return _Outcome(parts, float(norms.max()), rate, verdict, go_back), stopping

    def _forward(self, loader: Iterator[dict[str, Any]]) -> tuple[StepLoss, Tensor]:
        """The loss of the next micro-batch, and its places in the global batch."""
        with self.meter.data_wait():
            batch = next(loader)
        device = self.accelerator.device
        labels = None if self.network.null_label is None else batch["class_labels"]
        part = self.objective(
            self.model,
            batch["inputs"].to(device, non_blocking=True),
            None if labels is None else labels.to(device, non_blocking=True),
            seed=self.seed,
            step=self.step,
            positions=[int(p) for p in batch["positions"]],
            draws=batch.get("draws"),
        )
        return part, torch.as_tensor(batch["positions"])

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
        places, times, losses_ = (rows[:, :-2].reshape(len(rows), 3, -1)[:, k].reshape(-1) for k in range(3))
        order = places.argsort()
        times = times[order]
        if not t.is_floating_point():
            times = times.astype(np.int64)
        return times, losses_[order], rows[:, -2], bool(rows[:, -1].any())

    def _read(self, means: MeanMetrics, bins: TimestepBins) -> dict[str, float]:
        values = means.read(self.accelerator)
        if self.config.timestep_bins:
            values |= bins.read(self.accelerator)
        values |= self.meter.read() | {"seconds": self.seconds}
        if self.guards.skipped:
            values |= {"skipped_steps": self.guards.skipped}
        return values

    def _tell(self, log: MetricLog | None, console: Console, kind: str, message: str) -> None:
        console.step(self.step)
        console.message(message)
        if log is not None:
            log.event(self.step, kind, message)

    def _call_back(self, log: MetricLog | None) -> dict[str, float]:
        values: dict[str, float] = {}
        due = self._due()
        if not due:
            return values
        main = self.accelerator.is_main_process
        with self.meter.pause(), self._evaluating():
            for each in due:
                if not (main or each.everywhere or self.parallel.sharded):
                    continue
                for name, value in (each.call(self.step) or {}).items():
                    if not isinstance(value, np.ndarray):
                        values[name] = float(value)
                    elif log is not None:
                        log.image(name, self.step, value)
            self.accelerator.wait_for_everyone()
        return values

    def _due(self) -> list[Callback]:
        return [each for each in self.callbacks if each.every and self.step % each.every == 0]

    def _keep_best(self, values: Mapping[str, float]) -> None:
        """Write the averaged weights as `best/` if these values are the best so far."""
        # The main process says so: it alone has all values. All know when there are any.
        if not self.best.metric or not self.parallel.agree(self.best.is_better(values)):
            return
        with self.meter.pause():
            self._write_model(self.best.path, self.best.taken(self.step, values))
            self.accelerator.wait_for_everyone()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """EMA weights in the network, eval mode."""
        with self.ema.swap(self.network), torch.no_grad():
            self.parallel.forget_gathered()
            self.network.eval()
            try:
                yield
            finally:
                self.network.train()
        self.parallel.forget_gathered()

    def _save(self, log: MetricLog | None) -> str | None:
        """Save; or, if the weights are good for nothing any more, save nothing and say so."""
        begun = time.perf_counter()
        averages = self.ema.state_dict()["groups"].values()
        tensors = [*self.network.parameters(), *(tensor for group in averages for tensor in group.values())]
        if self.parallel.agree(not all_finite(self.parallel.parts(tensors))):
            return "the weights became non-finite"
        if self.guards.in_row and not self._healthy():
            # Steps remain in which the run may recover, or go back.
            return "the loss stayed non-finite" if self.step == self.config.steps else None
        with self.meter.pause(), told_by_the_disk(self.step, self.folder):
            if log is not None:
                log.sync()
            # First the model: whenever a kill comes, no checkpoint is newer than the model beside it.
            self._write_model(self.folder / "model")
            captured = self._parts().capture(self._numbers())
            if self.parallel.sharded:
                self.store.save_together(self.step, captured)
            elif self.accelerator.is_main_process:
                self.store.save(self.step, captured)
        self.accelerator.wait_for_everyone()
        self.saved_at, self._initial = self.step, None
        self._save_seconds = time.perf_counter() - begun
        return None

    def _healthy(self) -> bool:
        """Whether the weights give a finite loss on the next step's batch: after bad steps it may be them or the data.

        Every process calls it.
        """
        loader = self.make_loader(self.step + 1)
        with torch.no_grad(), self.accelerator.autocast():
            part, _ = self._forward(loader)
        loader.close()  # pyright: ignore[reportAttributeAccessIssue]
        return not self.parallel.agree(not all_finite([part.total]))

    def _snapshot(self) -> None:
        """Keep the power-function averages of this step, if it is one whose averages are kept."""
        every = self.snapshot_every
        if not self.ema.powers or not every or (self.step % every and self.step != self.config.steps):
            return
        with self.meter.pause(), told_by_the_disk(self.step, self.folder):
            updates, averages = self.ema.snapshot()
            if self.accelerator.is_main_process:
                self.snapshots.save(self.step, updates, averages)

    def _write_model(self, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write the averaged weights as a diffusers folder, with `facts` as `best.json` in it if there are any."""
        with told_by_the_disk(self.step, self.folder), self._evaluating():
            state = whole_state(self.network.state_dict()) if self.parallel.sharded else None
            if self.accelerator.is_main_process:
                with atomic_directory(folder, replace=True) as target:
                    self.export(target, state)
                    if facts is not None:
                        atomic_write_json(target / "best.json", facts)

    def _go_back(self, what: str, log: MetricLog | None, console: Console) -> None:
        """Return to the last good state with a lower learning rate; later lines of the log are dropped.

        Raises:
            UserError: the run has returned too often already.
        """
        if not self.guards.go_back():
            raise diverged(
                what, self.step, self.optimizer.defaults["lr"], self.config.max_grad_norm, self.saved_at,
                self.config.max_rollbacks,
            )  # fmt: skip
        counters = self.guards.counters()
        step = None if self._initial is not None else self.store.newest()
        if step is None and self._initial is None:
            raise UserError(f"{what} at step {self.step}, and {self.store.folder} holds no checkpoint to return to")
        last = self._initial if step is None else self.store.load(step)
        assert last is not None
        numbers = self._parts().apply(last, "the state returned to")
        self.guards.load({**self.guards.state(), **counters})
        failed, self.step = self.step, numbers["step"]
        self.best.load(numbers.get("best"))
        self.optimizer.zero_grad(set_to_none=True)
        if log is not None:
            self.snapshots.drop_after(self.step)
            log.rewind(self.step)
        rate, tries = self.guards.rate_factor, f"{self.guards.rollbacks} of {self.config.max_rollbacks}"
        self._tell(
            log, console, "rollback",
            f"{what} at step {failed}: back here, with the learning rate times {rate:g} (return {tries})",
        )  # fmt: skip

    def _kept(self) -> Checkpoint:
        """A copy of the present state on the CPU, to return to before the first checkpoint."""
        captured = self._parts().capture(self._numbers())
        copied = {
            group: {name: tensor.clone() for name, tensor in whole_state(tensors).items()}
            for group, tensors in captured.tensors.items()
        }
        return Checkpoint(copied, captured.numbers)

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
        self._seconds = numbers["seconds"]
        self.best.load(numbers.get("best"))

    def _numbers(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "best": self.best.state()}

    def _parts(self) -> Parts:
        return Parts(
            self.network, self.ema, self.optimizer, self.objective.timesteps, self.guards, self.accelerator.scaler
        )
