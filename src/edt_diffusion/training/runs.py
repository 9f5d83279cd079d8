"""What runs there are and how far they have come, read from their folders alone. Needs no torch, changes nothing."""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from ..util.errors import UserError
from .lines import WITHOUT_END, log_path, read_log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

State = Literal["running", "finished", "stopped", "new"]

DEPTH = 3
_CHECKPOINT = re.compile(r"^step-(\d+)$")


class Best(NamedTuple):
    """The best value of the metric that the run is judged by, and the step that had it."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance; None is what the folder does not tell.

    Attributes:
        name: of the folder, relative to where it was looked for.
        path: the run folder.
        state: "running" (a process holds its lock), "finished" (its last step is saved), "new" (nothing logged or
            saved) or "stopped".
        step: the last step logged or saved.
        steps: that it is to make; None of a run that a budget of seconds ends.
        budget_share: the share of a budget that was spent at the newest line of the log; None without a budget.
        loss: newest training loss.
        val_loss: newest validation loss.
        best: of `train.best_metric`, or else of val_loss.
        images_per_second: newest.
        seconds: of training.
        checkpoints: steps saved, ascending, damaged ones included.
        size_bytes: of all files.
        updated: when it last logged or saved; seconds since 1970.
        model: as "EDT-S/2"; "EDT" if its layout is not a published one.
        objective: name.
        problem: why a part of it cannot be read, in one line.
    """

    name: str
    path: Path
    state: State
    step: int
    steps: int | None
    budget_share: float | None
    loss: float | None
    val_loss: float | None
    best: Best | None
    images_per_second: float | None
    seconds: float | None
    checkpoints: list[int]
    size_bytes: int
    updated: float
    model: str | None
    objective: str | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values: the path as text, `best` as a mapping."""
        best = None if self.best is None else self.best._asdict()
        return {**asdict(self), "path": str(self.path), "best": best}


def find_runs(root: Path) -> list[Path]:
    """Run folders at `root` or up to three levels below it, sorted by path; hidden folders are passed over.

    A run folder holds a `config.yaml` and a `log.jsonl` or `checkpoints/`; one that has lost its `config.yaml`, but
    holds both of the others, is one too.

    Raises:
        UserError: `root` is no folder.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {str(root)!r}: name the folder that holds your runs, as runs/")
    return sorted(_runs_below(root, DEPTH))


def describe_run(folder: Path, name: str | None = None) -> RunSummary:
    """Read what a run folder tells. What is damaged is named in the summary, never raised.

    Args:
        folder: the run folder.
        name: what to call it, by default the folder's name.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {str(folder)!r}")
    problems: list[str] = []
    config = _config(folder, problems)
    lines: list[dict[str, float]] = []
    try:
        lines = read_log(folder)
    except (UserError, OSError) as error:
        problems.append(str(error))
    checkpoints = _checkpoints(folder)
    train = _group(config, "train")
    steps = _number(train.get("steps"))
    steps = None if steps == WITHOUT_END else steps
    share = _last(lines, "budget_share")
    logged = int(lines[-1]["step"]) if lines else 0
    saved = checkpoints[-1] if checkpoints else 0
    if locked(folder):
        state: State = "running"
    elif (steps is not None and saved >= steps) or (share is not None and share >= 1 and saved >= logged):
        state = "finished"
    else:
        state = "stopped" if lines or checkpoints else "new"
    return RunSummary(
        name=name or folder.resolve().name,
        path=folder,
        state=state,
        step=max(logged, saved),
        steps=None if steps is None else int(steps),
        budget_share=share,
        loss=_last(lines, "loss"),
        val_loss=_last(lines, "val_loss"),
        best=_best(lines, train),
        images_per_second=_last(lines, "images_per_second"),
        seconds=_last(lines, "seconds"),
        checkpoints=checkpoints,
        size_bytes=_size(folder),
        updated=_updated(folder),
        model=_model(_group(config, "model")) if config else None,
        objective=str(_group(config, "objective").get("name", "learned_variance")) if config else None,
        problem="; ".join(" ".join(problem.split()) for problem in problems) or None,
    )


def locked(folder: Path) -> bool:
    """Whether a process trains in `folder`, by the lock that it holds (see `lock.RunLock`); no lock file is made.

    False where the system or the file system has no locks.
    """
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def run_config(folder: Path) -> dict[str, Any]:
    """`config.yaml` of a run as plain values, whichever version wrote it.

    Raises:
        UserError: it is missing or holds no settings.
    """
    path = folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is not valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings")
    return tree


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    try:
        names = {entry.name: entry.is_dir() for entry in os.scandir(folder)}
    except OSError:
        return
    parts = (names.get("config.yaml") is False, names.get("log.jsonl") is False, names.get("checkpoints") is True)
    if sum(parts) >= 2:
        yield folder
    elif levels:
        for name in sorted(name for name, is_folder in names.items() if is_folder and not name.startswith(".")):
            yield from _runs_below(folder / name, levels - 1)


def _config(folder: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return run_config(folder)
    except UserError as error:
        problems.append(str(error))
        return {}


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = config.get(name)
    return group if isinstance(group, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _checkpoints(folder: Path) -> list[int]:
    try:
        names = [path.name for path in (folder / "checkpoints").iterdir()]
    except OSError:
        return []
    return sorted(int(match.group(1)) for name in names if (match := _CHECKPOINT.match(name)))


def _last(lines: list[dict[str, float]], metric: str) -> float | None:
    """The newest value; None if there is none, or if it is not finite."""
    return next((_number(line[metric]) for line in reversed(lines) if metric in line), None)


def _best(lines: list[dict[str, float]], train: Mapping[str, Any]) -> Best | None:
    metric = str(train.get("best_metric") or "val_loss")
    values = [(value, int(line["step"])) for line in lines if (value := _number(line.get(metric))) is not None]
    if not values:
        return None
    sign = -1.0 if train.get("best_mode") == "max" else 1.0
    value, step = min(values, key=lambda pair: sign * pair[0])  # the first of equals
    return Best(metric, value, step)


def _model(model: Mapping[str, Any]) -> str:
    name = str(model.get("name") or "EDT")
    size = model.get("size")
    if not size and ("depths" in model or "depth" in model):
        return name
    size = str(size or "S").upper().removeprefix(f"{name.upper()}-").partition("/")[0]
    return f"{name}-{size}/{model.get('patch_size', 2)}"


def _size(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # a running process removes files too
                total += os.lstat(os.path.join(base, name)).st_size
    return total


def _updated(folder: Path) -> float:
    times = [0.0]
    for path in (log_path(folder), folder / "checkpoints", folder / "config.yaml"):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)
