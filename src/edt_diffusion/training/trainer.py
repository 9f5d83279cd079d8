"""The training loop: restore, then step, log, sample, save, until done or told to stop.

Everything random is keyed by (seed, step, position), and the whole state is in the checkpoint, so that an interrupted
run continues as if it had never stopped. To resume, run the same command again.

`update.py` makes a step, `saving.py` writes and takes back, `feed.py` brings the data; this file says when.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..objectives import MaskedTraining
from ..util.errors import UserError
from ..util.files import remove_temporaries
from ..util.hardware import memory_name
from .config import TrainConfig
from .console import Console
from .ema import EMASet
from .feed import Feed
from .guards import Guards, diverged
from .interrupt import StopRequest
from .lock import RunLock
from .log import MetricLog
from .meters import Throughput
from .pace import Pace
from .parallel import Parallel
from .parts import Parts
from .saving import Export, Saving
from .session import Session
from .update import Outcome, Update

# Given the number of steps made, returns numbers for the log and pictures (uint8, (H, W, C)) for it, or nothing.
Call = Callable[[int], Mapping[str, Any] | None]

# Micro-batches on which weights in doubt may prove themselves.
_BATCHES_TRIED = 3


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
        pace: a budget that ends the run besides its steps, and where weights are kept on the way; None is none.
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
        export: Export,
        callbacks: list[Callback | tuple[int, Call]],
        snapshot_every: int = 0,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        max_seconds: float | None = None,
        pace: Pace | None = None,
        trackers: Callable[[], list[Any]] = list,
        quiet: bool = False,
    ) -> None:
        self.folder, self.config, self.quiet = folder, config, quiet
        self.accelerator = accelerator
        self.parallel = Parallel(accelerator, model, config)
        self.network = self.parallel.network
        self.ema = make_ema(self.network)
        self.optimizer = self.parallel.prepare(
            make_optimizer([p for p in self.network.parameters() if p.requires_grad])
        )
        self.objective = objective
        self.make_loader = make_loader
        self.callbacks = [each if isinstance(each, Callback) else Callback(*each) for each in callbacks]
        self.guards = Guards(config.guards)
        self.meter = Throughput(config.batch_size, flops_per_step, peak_flops, device=accelerator.device)
        self.stop = StopRequest(max_seconds)
        self.update = Update(
            config, seed, self.parallel, self.optimizer, objective, learning_rate, self.ema, self.guards, self.meter,
            self.stop,
        )  # fmt: skip
        parts = Parts(self.network, self.ema, self.optimizer, objective.timesteps, self.guards, accelerator.scaler)
        self.pace = pace
        self.saving = Saving(folder, config, self.parallel, self.ema, parts, export, snapshot_every, pace)
        self.trackers = trackers
        self.step = 0
        self.lock = RunLock(folder, active=accelerator.is_main_process)
        self._seconds, self._since = 0.0, None
        self._calls_take = 0.0  # seconds of the longest round of callbacks

    @property
    def seconds(self) -> float:
        """Wall-clock time of the training up to the last save, or up to now while it runs, resumed runs included."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def restore(self) -> None:
        """Load the newest whole checkpoint of the run folder, if there is one; nothing is written.

        Raises:
            UserError: if there are checkpoints but none is usable, or they are of another architecture.
        """
        numbers = self.saving.restore()
        if numbers is not None:
            self.step, self._seconds = numbers["step"], numbers["seconds"]
            if self.pace is not None:
                self.pace.load(numbers.get("pace"))
            elif numbers.get("pace") is not None:
                raise UserError(
                    f"{self.saving.folder} holds a run with a budget, of a matrix: go on with it by the command that "
                    "began it"
                )

    def fit(self) -> bool:
        """Train from the step reached (see `restore`) to the last one.

        Returns:
            True when the last step is made or the budget is spent, False when a signal or the clock stopped the run
            (its state is saved).

        Raises:
            UserError: if the run diverges in spite of its guards, a checkpoint cannot be written, for instance to a
                full disk, or another process trains in the folder.
        """
        with self.lock:
            main = self.accelerator.is_main_process
            if main:
                remove_temporaries(self.folder, self.saving.store.folder, self.saving.snapshots.folder)
                self.saving.snapshots.drop_after(self.step)
            session = Session(
                MetricLog(self.folder, self.step, self.trackers()) if main else None,
                Console(
                    self.config.steps, self.step, self.quiet or not main, memory=memory_name(self.accelerator.device)
                ),
                self.config.timestep_bins,
            )
            if not self._over():
                self._since = time.perf_counter()
                if self.step:
                    session.console.message("going on from here")
            try:
                with self.stop:
                    self._loop(session)
            finally:
                self._since = None  # what came after the last save is not in it, and would not be counted on a resume
                session.close()
        return self._over()

    def _over(self) -> bool:
        """Whether all steps are made, or the budget is spent."""
        return self.step >= self.config.steps or (self.pace is not None and self.pace.done)

    def _uncharged(self) -> AbstractContextManager[None]:
        """Encloses what is not charged to the budget."""
        return nullcontext() if self.pace is None else self.pace.pause()

    def _loop(self, session: Session) -> None:
        self.parallel.model.train()
        if self.step == 0:
            self.saving.keep_first(self.seconds)
        feed = Feed(
            self.make_loader, self.step, self.config.micro_batches,
            told=lambda message: session.tell(self.step, "loader", message),
        )  # fmt: skip
        stopping = self.parallel.agree(self.stop.requested)
        if self.pace is not None:
            self.pace.begin()
        while not self._over() and not stopping:
            self.meter.start_step()
            self.update.reserve = self.saving.seconds + (self._calls_take if self._due(self.step + 1) else 0.0)
            outcome = self.update(self.step, feed)
            self.step += 1
            self.meter.end_step()
            if self.pace is not None:
                self.pace.made(self.step)
            session.take(self.step, outcome)
            lost = outcome.verdict.problem if outcome.go_back else None
            if lost is None:
                stopping, lost = self._after_step(outcome, session)
            if lost is not None:
                self._go_back(lost, session)
                feed.restart(self.step)
                stopping = False  # if it was asked for, the next step says so again
        if self.pace is not None:
            self.pace.end()
        feed.close()
        best = self.saving.best
        if best.metric and best.value is None and not stopping:
            session.console.message(f"no value called {best.metric!r} was logged: best/ was not written")
        if self.step and not self.saving.model_is_there():
            self.saving.write_model(self.step)

    def _after_step(self, outcome: Outcome, session: Session) -> tuple[bool, str | None]:
        """Log, call back, save, whatever is due; whether to stop, and why the run must go back if it must."""
        last = self._over()
        points = [] if self.pace is None else self.pace.reached()
        due = self.step % self.config.save_every == 0 or last or outcome.stop or bool(points)
        due = due or (self.pace is not None and self.pace.save_due())
        values: dict[str, float] = {}
        # With each save a line too: what a line is the mean of is not in the checkpoint.
        if due or self.step % self.config.log_every == 0:
            values = session.read(self.accelerator) | self.meter.read() | {"seconds": self.seconds}
            values |= {"lr": outcome.rate, "grad_norm": outcome.grad_norm}
            if self.pace is not None:
                values |= self.pace.told()
            if self.guards.skipped:
                values["skipped_steps"] = self.guards.skipped
        # Who asks for a stop may not wait for pictures: what they show can be made from the checkpoint.
        called = [] if outcome.stop and not last else self._due(self.step)
        with self.meter.pause(), self._uncharged():
            if called:
                begun = time.perf_counter()
                values |= self._call(called, session)
                self._calls_take = max(self._calls_take, time.perf_counter() - begun)
            if called or values:
                self.saving.keep_best(self.step, values)
            session.report(self.step, values)
            self.saving.snapshot(self.step)
            for point in points:
                self._keep(point)
        # One process need not wait for the next exchange to know.
        stopping = outcome.stop or (self.accelerator.num_processes == 1 and self.stop.requested)
        session.unsaved |= due
        if not (session.unsaved or stopping):
            return stopping, None
        with self._uncharged():
            return stopping, self._save(session)

    def _keep(self, point: float) -> None:
        """Keep the averaged weights of a point of the budget, with what they cost."""
        assert self.pace is not None
        facts = {**self.pace.kept(point), "images": self.step * self.config.batch_size}
        self.saving.keep_copy(self.step, self.pace.points[point], facts)

    def _due(self, step: int) -> list[Callback]:
        return [each for each in self.callbacks if each.every and step % each.every == 0]

    def _call(self, called: list[Callback], session: Session) -> dict[str, float]:
        """Run callbacks with the averaged weights in the network; the numbers that they return."""
        values: dict[str, float] = {}
        with self.saving.evaluating():
            for each in called:
                if not (self.accelerator.is_main_process or each.everywhere or self.parallel.sharded):
                    continue
                for name, value in (each.call(self.step) or {}).items():
                    if isinstance(value, np.ndarray):
                        session.show(name, self.step, value)
                    else:
                        values[name] = float(value)
        self.accelerator.wait_for_everyone()
        return values

    def _save(self, session: Session) -> str | None:
        """Save; or, if the weights are good for nothing any more, save nothing and say so."""
        if not self.saving.finite():
            return "the weights became non-finite"
        if self.guards.in_row and not self._healthy():
            # A state in doubt is not saved. Steps remain in which the run may recover, or go back.
            return "the loss stayed non-finite" if self._over() else None
        with self.meter.pause():
            session.sync()
            self._seconds, self._since = self.seconds, time.perf_counter()
            self.saving.save(self.step, self._seconds)
        session.unsaved = False
        return None

    def _healthy(self) -> bool:
        feed = Feed(self.make_loader, self.step, self.config.micro_batches, lambda _message: None)
        try:
            # More than one, because a row of the data may be bad for ever.
            return any(self.update.healthy(self.step, feed) for _ in range(_BATCHES_TRIED))
        finally:
            feed.close()

    def _go_back(self, what: str, session: Session) -> None:
        """Return to the last good state with a lower learning rate; later lines of the log are dropped.

        Raises:
            UserError: the run has returned too often already.
        """
        tries = self.config.max_rollbacks
        if not self.guards.go_back():
            rate, clip = self.optimizer.defaults["lr"], self.config.max_grad_norm
            raise diverged(what, self.step, rate, clip, self.saving.saved_at, tries)
        counters = self.guards.counters()
        failed, self.step = self.step, self.saving.go_back()
        self.guards.load({**self.guards.state(), **counters})
        self.optimizer.zero_grad(set_to_none=True)
        if self.pace is not None:
            self.pace.went_back(self.step)
        session.begin_anew(self.step)
        factor, number = self.guards.rate_factor, self.guards.rollbacks
        session.tell(
            self.step, "rollback",
            f"{what} at step {failed}: back here, with the learning rate times {factor:g} (return {number} of {tries})",
        )  # fmt: skip
