"""The folder of a job: what was asked for, what is there, what is missing.

`job.json` is the first file to come. It holds everything that decides a picture, so that the same command goes on and
another one is refused. Who computes which batch does not matter: every file has one possible content.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import __version__
from ..util.disk import disk_full
from ..util.errors import UserError
from ..util.files import atomic_write_json, make_folder, remove_temporaries
from ..util.progress import CountProgress
from .plan import Plan
from .samples import Samples
from .writers import Writer

PLAN = "job.json"

_FORMAT = 1
# How long a process waits for another to begin, and the main one for a batch of another.
_BEGIN_SECONDS = 120.0
_PATIENCE_SECONDS = 1800.0
_WAIT_SECONDS = 0.5
# Looking how far the others are means listing folders.
_LOOK_SECONDS = 2.0


class OtherJob(UserError):
    """The folder holds another job, or something else."""


class Job:
    """A job in its folder.

    Args:
        folder: where the pictures go.
        facts: what decides them, beside the plan; plain values.
        plan: which pictures.
        writer: the form in which they are kept.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], plan: Plan, writer: Writer) -> None:
        self.folder, self.plan, self.writer = folder, plan, writer
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))

    def begin(self, alone: bool) -> None:
        """Write what is asked for, or compare it with what the folder was begun with. The caller holds its lock.

        Args:
            alone: whether no other process can be at work in the folder.

        Raises:
            OtherJob: it was begun with something else.
            UserError: it cannot be written to.
        """
        make_folder(self.folder)
        there = read_job(self.folder)
        if there is None:
            foreign = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))
            if foreign:
                raise OtherJob(
                    f"{self.folder} holds {foreign[0]!r} and no {PLAN} of edt sample: choose another --out, or empty it"
                )
        else:
            self._refuse_others(there)
            if alone:
                remove_temporaries(*self.writer.folders())
            if there["count"] == len(self.plan):
                return
            filled, odd = divmod(there["count"], self.plan.batch)
            # A cache may look at a whole batch, and the last one of the smaller job was filled up otherwise.
            if odd and self.facts["sampling"]["cache"] != "none":
                self.writer.drop(filled)
        told = {"what": "edt sample", "format": _FORMAT, **self.facts, "count": len(self.plan)}
        atomic_write_json(
            self.folder / PLAN, {**told, "pictures_sha256": self.plan.digest(len(self.plan)), "version": __version__}
        )

    def wait_until_begun(self) -> None:
        """On processes other than the main one of several: until that has begun this very job.

        Raises:
            UserError: the folder holds another job, or none comes.
        """
        since = time.monotonic()
        while (there := read_job(self.folder)) is None or there["count"] < len(self.plan):
            if time.monotonic() - since > _BEGIN_SECONDS:
                raise UserError(f"{self.folder / PLAN} does not come: has the main process stopped?")
            time.sleep(_WAIT_SECONDS)
        self._refuse_others(there)

    def _refuse_others(self, there: dict[str, Any]) -> None:
        had, now = _flat(there), _flat(self.facts)
        for name in now | had:  # a fact that only one of them has is one that differs, unless it is None
            then, value = had.get(name), now.get(name)
            if name not in _NOT_COMPARED and then != value:
                shown = _NAMES.get(name, name.rpartition(".")[2].replace("_", " "))
                raise OtherJob(
                    f"{self.folder} holds a job with another {shown} ({_short(then)}, now {_short(value)}): "
                    "choose another --out, or give the same as then"
                )
        count = there["count"]
        if count > len(self.plan):
            raise OtherJob(
                f"{self.folder} holds a job of {count} pictures, now {len(self.plan)}: choose another --out, or give "
                "-n as then or larger"
            )
        if there.get("pictures_sha256") != self.plan.digest(count):
            raise OtherJob(
                f"{self.folder} holds a job with other classes or seeds: choose another --out, or give the same as then"
            )

    def compute(
        self,
        samples: Samples,
        batches: Iterable[int],
        told: Callable[[int], None] | None = None,
    ) -> None:
        """Make whole batches and keep what is missing of them; `told` gets the number of pictures kept of each.

        Raises:
            UserError: the disk refuses.
        """
        for batch in batches:
            rows = self.plan.rows(batch)
            pictures, _ = samples.make(rows.start, rows.stop)
            with told_by_the_disk(self.folder):
                written = self.writer.write(batch, pictures)
            if told is not None:
                told(written)

    def wait(self, progress: CountProgress, working: Callable[[], bool] | None = None) -> None:
        """Wait until nothing is missing, or until `working` says that nobody is at it any more.

        Raises:
            UserError: nothing has come for half an hour.
        """
        least, since = self.writer.waiting(), time.monotonic()
        while least and (working is None or working()):
            time.sleep(_WAIT_SECONDS)
            now = self.writer.waiting()
            progress(len(self.plan) - now, len(self.plan))
            if now < least:
                least, since = now, time.monotonic()
            elif time.monotonic() - since > _PATIENCE_SECONDS:
                raise UserError(
                    f"{least} pictures are missing in {self.folder}, and no other process has written one for "
                    f"{_PATIENCE_SECONDS / 60:.0f} minutes: run the same command again, it makes them"
                )

    def finish(self) -> list[Path]:
        """Put together what is to be put together, and say where it is.

        Raises:
            UserError: the disk refuses.
        """
        with told_by_the_disk(self.folder):
            written = self.writer.finish()
        remove_temporaries(*self.writer.folders())
        return written


class Counter:
    """Tells how far a job is: of this process alone, or of all by looking into the folder now and then.

    Args:
        job: the job.
        found: pictures that were there.
        shared: whether others work at it.
        progress: where to tell it.
    """

    def __init__(self, job: Job, found: int, shared: bool, progress: CountProgress) -> None:
        self.job, self.done, self.shared, self.progress = job, found, shared, progress
        self._looked = time.monotonic()
        progress(found, len(job.plan))

    def __call__(self, pictures: int) -> None:
        total = len(self.job.plan)
        if not self.shared:
            self.done += pictures
        elif time.monotonic() - self._looked > _LOOK_SECONDS:
            self.done = total - self.job.writer.waiting()
            self._looked = time.monotonic()
        self.progress(min(self.done, total), total)


def read_job(folder: Path) -> dict[str, Any] | None:
    """What the job in a folder was asked for; None if there is none.

    Raises:
        UserError: the file is damaged or of a later version.
    """
    path = folder / PLAN
    try:
        there = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        there = None
    if not isinstance(there, dict) or not isinstance(there.get("count"), int) or there.get("format") != _FORMAT:
        raise OtherJob(f"{path} is damaged or of another version: choose another --out, or remove {folder}")
    return there


@contextmanager
def told_by_the_disk(folder: Path) -> Iterator[None]:
    """Turn failures to write into one line with the remedy.

    Raises:
        UserError: the block could not write.
    """
    try:
        yield
    except OSError as error:
        remedy = "make room" if disk_full(error) else "mend that"
        raise UserError(
            f"pictures cannot be written to {folder} ({error.strerror or error}): {remedy} and run the same command "
            "again; it makes those that are missing"
        ) from error


# What the file says beside the facts, and a fact that decides no picture.
_NOT_COMPARED = {"what", "format", "count", "pictures_sha256", "version", "model.from"}
# Facts that are compared as a whole: None, or several values.
_WHOLE = {"sampling.attention_modulation"}
# Facts whose names need saying otherwise.
_NAMES = {
    "to": "form (--to)",
    "model.transformer_sha256": "model",
    "model.vae_sha256": "autoencoder",
    "model.settings_sha256": "configuration of the model",
    "batch": "batch size",
    "sampling.steps": "number of steps",
    "sampling.cache": "feature cache",
    "labels": "choice of labels",
}


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts under dotted names, but for those of `_WHOLE`."""
    out: dict[str, Any] = {}
    for name, value in facts.items():
        full = prefix + name
        out |= _flat(value, f"{full}.") if isinstance(value, dict) and full not in _WHOLE else {full: value}
    return out


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else text[:45] + "..."
