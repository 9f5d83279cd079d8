"""Running a matrix: which work is next, in processes of their own, and stopping them without losing anything."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ...training.interrupt import StopRequest
from ...training.lines import read_log
from ...util.errors import UserError
from ...util.lock import Lock
from .folder import STOPPED, MatrixFolder, Run
from .plan import Matrix
from .results import Results

_LOOK_SECONDS = 0.25
_TELL_SECONDS = 60.0


def run_matrix(
    matrix: Matrix, folder: Path | str, processes: int = 1, threads: int | None = None, quiet: bool = False
) -> Results:
    """Do what of a matrix is not done, and read the results.

    Each training and each scoring is a process of its own, of which `processes` run at a time. On a stop signal those
    that train save what they have; run again to go on. A run that fails does not keep the others from going on.

    Args:
        matrix: what is wanted.
        folder: where all of it lies; see `folder`.
        processes: trainings and scorings at a time. On one GPU, 1.
        threads: CPU threads of each; None shares the cores out, but gives a training one thread where CPU time is its
            budget, of which threads that wait for each other use up their part, too.
        quiet: say nothing on the terminal.

    Returns:
        Results; `stopped`, `missing` and `failed` say what is not there and why.

    Raises:
        UserError: the folder is of another matrix or in use, real pictures or the extractor cannot be had, or every
            run failed.
    """
    if processes < 1 or (threads is not None and threads < 1):
        raise UserError(f"processes={processes}, threads={threads}: expected at least 1 of each")
    place = MatrixFolder(Path(folder))
    if place.path.is_dir() and (place.path / "matrix.json").is_file():
        with _lock(place.path):
            place.begin(matrix)
    else:
        place.begin(matrix)
    with _lock(place.path):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = threads or max(1, cores // processes)
        training = 1 if threads is None and matrix.budget.kind == "cpu" else share
        work = _Work(place, matrix, processes, {"prepare": share * processes, "train": training, "score": share}, quiet)
        work.run()
    results = Results.read(place.path, matrix)
    results.stopped, results.failed = work.stopped, work.failed
    if work.failed and not work.stopped and not results.records and not results.done:
        first = next(iter(work.failed.values()))
        raise UserError(f"no run of the matrix in {place.path} came to its end: {first}")
    return results


def _lock(path: Path) -> Lock:
    return Lock(path / ".lock", f"another process runs the matrix in {path}: wait for it, or choose another folder")


@dataclass
class _Job:
    what: str
    run: Run | None
    process: subprocess.Popen[bytes]

    @property
    def name(self) -> str:
        return self.what if self.run is None else f"{self.run}-{self.what}"


class _Work:
    def __init__(
        self, folder: MatrixFolder, matrix: Matrix, processes: int, threads: dict[str, int], quiet: bool
    ) -> None:
        self.folder, self.matrix, self.processes, self.threads, self.quiet = folder, matrix, processes, threads, quiet
        self.runs = [Run(arm.name, seed) for seed in matrix.seeds for arm in matrix.arms]
        self.failed: dict[str, str] = {}
        self.stopped = False
        self._jobs: list[_Job] = []
        self._left: set[str] = set()  # jobs that were ended from outside

    def run(self) -> None:
        """Work until nothing is left to do, or a signal comes."""
        request = StopRequest()
        try:
            with request:
                if self._next() is not None and self.matrix.images and not self.folder.prepared.is_file():
                    self._start("prepare", None)
                    self._until_done(request)
                    if "prepare" in self.failed:
                        raise UserError(self.failed["prepare"])
                told = time.monotonic()
                while not request.requested:
                    self._look()
                    while len(self._jobs) < self.processes and (following := self._next()) is not None:
                        self._start(*following)
                    if not self._jobs:
                        break
                    if time.monotonic() - told > _TELL_SECONDS:
                        told = time.monotonic()
                        self._tell_progress()
                    time.sleep(_LOOK_SECONDS)
                self._until_done(request)
                self.stopped = request.requested
        finally:
            for job in self._jobs:  # a second signal: at once
                job.process.kill()
                job.process.wait()

    def _until_done(self, request: StopRequest) -> None:
        asked = False
        while self._jobs:
            if request.requested and not asked:
                asked = True
                self._say(f"stopping ({request.reason}): trainings save what they have")
                for job in self._jobs:
                    with contextlib.suppress(OSError):
                        _ask_to_stop(job.process)
            self._look()
            if self._jobs:
                time.sleep(_LOOK_SECONDS)

    def _next(self) -> tuple[str, Run] | None:
        """What to start now: a run's scores come as soon as it is trained."""
        busy = {job.name for job in self._jobs} | set(self.failed) | self._left
        for run in self.runs:
            trained = self.folder.spent(run).is_file()
            if not trained and f"{run}-train" not in busy:
                return "train", run
            if trained and self.folder.missing_scores(self.matrix, run) and f"{run}-score" not in busy:
                return "score", run
        return None

    def _start(self, what: str, run: Run | None) -> None:
        words = [sys.executable, "-m", "edt_diffusion.studies.matrix.job", str(self.folder.path), what]
        count = str(self.threads[what])
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        package = str(Path(__file__).parents[3])  # where this package is imported from, installed or not
        environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        name = what if run is None else f"{run}-{what}"
        with open(self.folder.log(name), "ab") as log:
            process = subprocess.Popen(
                words if run is None else [*words, str(run)], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self._jobs.append(_Job(what, run, process))
        self._say(f"{name} begins")

    def _look(self) -> None:
        for job in list(self._jobs):
            code = job.process.poll()
            if code is None:
                continue
            self._jobs.remove(job)
            if job.process.stdin is not None:
                job.process.stdin.close()
            if code == 0:
                self._say(f"{job.name} is done")
            elif code == STOPPED or code < 0:
                self._left.add(job.name)
                self._say(f"{job.name} was stopped")
            else:
                self.failed[job.name] = self._last_words(job.name, code)
                self._say(f"{job.name} failed: {self.failed[job.name]}")

    def _last_words(self, name: str, code: int) -> str:
        lines = self.folder.log(name).read_text("utf-8", errors="replace").strip().splitlines()
        return (lines[-1] if lines else f"ended with {code}") + ("" if code == 2 else f" (see {self.folder.log(name)})")

    def _tell_progress(self) -> None:
        done = sum(self.folder.spent(run).is_file() for run in self.runs)
        told = []
        for job in self._jobs:
            share = ""
            if job.what == "train" and job.run is not None:
                lines = read_log(self.folder.run(job.run))
                share = f" {100 * lines[-1].get('budget_share', 0):.0f} %" if lines else ""
            told.append(job.name + share)
        self._say(f"{done} of {len(self.runs)} runs are trained; now {', '.join(told)}")

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    import signal

    process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
