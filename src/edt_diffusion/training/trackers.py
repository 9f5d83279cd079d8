"""Experiment trackers (wandb, trackio, mlflow, ...) through accelerate's own classes.

None is asked for unless the user names it, and nothing of theirs is imported before. A run keeps one identity with each
tracker, whichever process continues it: `trackers.json` in its folder.
"""

import importlib.util
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..util.errors import UserError
from ..util.files import atomic_write_json
from ..util.lookup import lookup

PROJECT = "edt-diffusion"
_FILE = "trackers.json"


@dataclass(frozen=True)
class _Kind:
    """How a tracker is told which run it follows.

    Attributes:
        package: what to install.
        arguments: for its class, from (identity, run name, run folder); the identity is None if the tracker gives its
            own and has not done so yet.
        given: reads the identity that the tracker has given, from the object behind it; None if it takes ours.
    """

    package: str
    arguments: Callable[[str | None, str, Path], dict[str, Any]]
    given: Callable[[Any], str] | None = None


_KINDS: dict[str, _Kind] = {
    "wandb": _Kind("wandb", lambda own, name, folder: {"id": own, "name": name, "resume": "allow", "dir": str(folder)}),
    # Runs are continued by name; the identity keeps apart runs of equal name.
    "trackio": _Kind("trackio", lambda own, name, _: {"name": f"{name}-{str(own)[:6]}", "resume": "allow"}),
    "mlflow": _Kind("mlflow", lambda own, name, _: {"run_id": own, "run_name": name}, lambda run: run.info.run_id),
    "comet_ml": _Kind("comet_ml", lambda own, *_: {"experiment_key": own, "mode": "get_or_create"}),
    "swanlab": _Kind(
        "swanlab",
        lambda own, name, folder: {
            "id": str(own)[:21],  # their length
            "experiment_name": name,
            "resume": "allow",
            "logdir": str(folder / "swanlab"),
        },
    ),
    "aim": _Kind("aim", lambda own, *_: {"run_hash": own}, lambda run: run.hash),
    "clearml": _Kind(
        "clearml", lambda own, name, _: {"task_name": name, "continue_last_task": own or False}, lambda task: task.id
    ),
    "dvclive": _Kind("dvclive", lambda _, __, folder: {"dir": str(folder / "dvclive"), "resume": True}),
}


def build_trackers(
    names: Sequence[str],
    folder: Path,
    run_name: str,
    config: Mapping[str, Any],
    resume_id: str | None = None,
    project: str = PROJECT,
) -> list[Any]:
    """Start the trackers of a run; the main process alone does so.

    Args:
        names: accelerate's names ("wandb", "trackio", "mlflow", "comet_ml", "swanlab", "aim", "clearml", "dvclive"),
            or those of classes that were given to `accelerate.tracking.register_tracker_class`. A class of the user's
            is called with the project, its folder if it requires one, and `run_name` and `run_id` where it takes them.
        folder: the run folder, which exists; `trackers.json` in it keeps the identities.
        run_name: how the run is to be called there.
        config: settings of the run, nested; shown there under dotted names.
        resume_id: identity to use where `trackers.json` has none yet, for instance of a run begun elsewhere.
        project: what the runs are collected under.

    Returns:
        Objects with accelerate's interface (`log`, `finish`, some `log_images`), in the order of `names`.

    Raises:
        UserError: a name is unknown, a package is not installed, or a tracker does not start.
    """
    identities = _identities(folder)
    trackers = []
    for name in dict.fromkeys(names):
        kind, tracker_class = _find(name)
        own = identities.get(name) or resume_id
        if own is None and (kind is None or kind.given is None):
            own = secrets.token_hex(16)
        positional = [project, str(folder)] if tracker_class.requires_logging_directory else [project]
        arguments = _custom(tracker_class, own, run_name) if kind is None else kind.arguments(own, run_name, folder)
        if kind is not None and own is None:
            arguments = {key: value for key, value in arguments.items() if value is not None}
        try:
            tracker = tracker_class(*positional, **arguments)
            tracker.start()
            if kind is not None and kind.given is not None:
                own = kind.given(tracker.tracker)
            if identities.get(name) != own:
                identities[name] = str(own)
                atomic_write_json(folder / _FILE, identities)
            tracker.store_init_configuration(flat(config))
        except Exception as error:  # of any third party
            for started in trackers:
                started.finish()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the tracker {name!r} does not start ({reason}): mend that, or leave it out of train.trackers"
            ) from error
        trackers.append(tracker)
    return trackers


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before any work is done, trackers that `build_trackers` could not make.

    Raises:
        UserError: a name is unknown, or a package is not installed.
    """
    for name in names:
        _find(name)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings under dotted names, with values that every tracker takes: lists as text, null as "null"."""
    out: dict[str, bool | int | float | str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return out


def _find(name: str) -> tuple[_Kind | None, Any]:
    """What is known of a tracker (None of one registered by the user), and its class."""
    from accelerate import tracking

    if name == "tensorboard":
        raise UserError("train.trackers: tensorboard is written to the run folder anyway; leave it out")
    table = {key: kind for key, kind in tracking.LOGGER_TYPE_TO_CLASS.items() if key != "tensorboard"}
    tracker_class = lookup(table, name, "tracker")
    if tracker_class.__module__ != tracking.__name__ or name not in _KINDS:
        return None, tracker_class
    kind = _KINDS[name]
    if importlib.util.find_spec(kind.package) is None:
        package = kind.package.replace("_", "-")
        raise UserError(
            f"train.trackers: {name} is not installed: run pip install {package}, or leave it out (the run "
            "folder has log.jsonl and tensorboard/ all the same)"
        )
    return kind, tracker_class


def _custom(tracker_class: Any, own: str | None, run_name: str) -> dict[str, Any]:
    import inspect

    taken = inspect.signature(tracker_class).parameters
    return {key: value for key, value in (("run_name", run_name), ("run_id", own)) if key in list(taken)[1:]}


def _identities(folder: Path) -> dict[str, str]:
    try:
        identities = json.loads((folder / _FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return identities if isinstance(identities, dict) else {}
