"""`edt train`."""

import json
from pathlib import Path
from typing import Any

import typer

from .output import finish, leave_at_once, quiet_libraries


def train(
    source: str | None = typer.Argument(None, metavar="CONFIG", help="YAML file, preset or run folder."),
    overrides: list[str] = typer.Argument(None, metavar="key.path=value", help="Settings to change."),
    data: str = typer.Option(
        None, "--data", help="Pictures (a folder per class, a flat folder, tables, archives, ...) or a latent store."
    ),
    codec: str = typer.Option(None, "--codec", help="Autoencoder (folder or hub id) to encode the pictures with."),
    origin: str = typer.Option(None, "--from", help="Trained model (run, diffusers folder, hub) to fine-tune."),
    out: Path = typer.Option(None, "--out", help="Run folder (default: runs/ and the name of the configuration)."),
    batch: str = typer.Option(None, "--batch", help="Global batch, or auto: cut it to the memory that is free."),
    max_time: str = typer.Option(None, "--max-time", help="Save and stop after so long, such as 90m or 1h30m."),
    resume: bool = typer.Option(False, "--resume", help="Insist on continuing: fail if there is no checkpoint."),
    allow_changes: bool = typer.Option(False, "--allow-changes", help="Continue though settings have changed."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Train a model on labelled pictures. To resume, run the same command again.

    The run folder gets config.yaml, log.jsonl, tensorboard/, samples/, checkpoints/ and model/ (newest EMA weights as a
    diffusers folder). Ctrl-C saves and stops.

    Example: edt train small-32 --data pictures/ --out runs/a train.steps=9000
    """
    from ..assemble import build_trainer
    from ..config import load_config, presets, run_source
    from ..training.state import CheckpointStore
    from ..util.durations import parse_duration
    from ..util.errors import UserError

    given, other_pictures = list(overrides or []), False
    if source is not None and "=" in source:
        source, given = None, [source, *given]
    if stray := [argument for argument in given if "=" not in argument]:
        raise UserError(f"unexpected argument {stray[0]!r}: after the configuration come settings, as key.path=value")
    if source is None and origin is not None and (Path(origin) / "config.yaml").is_file():
        # The settings of the run that is fine-tuned, but not its folder.
        if out is None:
            raise UserError("--from without a configuration takes the settings of that run: name a folder with --out")
        other_pictures = not (out / "config.yaml").is_file()
        source = str(Path(origin) / "config.yaml") if other_pictures else str(out)
    if source is None:
        if out is None or not (out / "config.yaml").is_file():
            if origin is not None:
                raise UserError(f"--from {origin}: that is no run folder, whose settings could be taken: name a preset "
                                f"or a YAML file too ({', '.join(sorted(presets()))})")  # fmt: skip
            raise UserError(f"no configuration given: name a YAML file or a preset ({', '.join(sorted(presets()))})")
        source = str(out)
    if (Path(source) / "config.yaml").is_file():
        out = out or Path(source)
        source = str(Path(source) / "config.yaml")
    # As a JSON string: YAML would take a folder called 2024 for a number.
    given += [f"data.path={json.dumps(data)}"] if data else []
    given += [f"data.codec={json.dumps(codec)}"] if codec else []
    given += [f"finetune.model={json.dumps(origin)}"] if origin else []
    given += [f"train.batch_size={_batch_size(batch)}"] if batch and batch != "auto" else []
    seconds = None if max_time is None else parse_duration(max_time)
    folder = out or Path("runs") / Path(source).stem
    config = load_config(run_source(source, folder), given, other_pictures)
    if resume and not CheckpointStore(folder / "checkpoints").steps():
        raise UserError(f"--resume: {folder} holds no checkpoint; leave the option out to start there")
    quiet_libraries()
    preset = None if Path(source).is_file() else source
    trainer = build_trainer(
        config,
        folder,
        quiet=quiet,
        allow_changes=allow_changes,
        preset=preset,
        batch_auto=batch == "auto",
        max_seconds=seconds,
    )
    first = trainer.step
    finished = trainer.fit()
    accelerator = trainer.accelerator
    main_process, processes = accelerator.is_main_process, accelerator.num_processes
    accelerator.end_training()
    if main_process:
        _tell(trainer, folder, first, config.train.steps, finished, as_json)
    if processes > 1:
        leave_at_once()


def _tell(trainer: Any, folder: Path, first: int, wanted: int, finished: bool, as_json: bool) -> None:
    """The outcome, as the command's last line."""
    facts = {
        "folder": str(folder),
        "step": trainer.saving.saved_at,
        "seconds": round(trainer.seconds, 1),
        "finished": finished,
    }
    if not finished:
        why = f" ({trainer.stop.reason})" if trainer.stop.reason else ""
        # After bad steps the last good state is an earlier one.
        at = trainer.saving.saved_at
        saved = f"and saved at step {at}" if at else "before anything was saved"
        message = f"stopped{why} {saved}; run the same command again to go on"
    elif first > wanted:
        message = f"the run has {first} steps already, train.steps={wanted} adds none; it stays as it is in {folder}"
    else:
        steps = f"{trainer.step} step" + ("" if trainer.step == 1 else "s")
        done = f"trained {steps}" if first < wanted else f"the run has its {steps} already"
        there = "samples and model are" if any((folder / "samples").glob("*.png")) else "the model is"
        message = f"{done}; {there} in {folder}"
    finish(message, facts, as_json)


def _batch_size(text: str) -> int:
    from ..util.errors import UserError

    try:
        return int(text)
    except ValueError:
        raise UserError(f"--batch {text}: expected a number of pictures, or auto") from None
