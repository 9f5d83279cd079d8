"""`edt convert`."""

from pathlib import Path

import typer

from .output import finish, quiet_libraries


def convert(
    checkpoint: Path = typer.Argument(metavar="CHECKPOINT", help="The authors' .pt file."),
    out: Path = typer.Argument(metavar="OUT", help="Folder to write; must not exist."),
    family: str = typer.Option("edt", "--family", help="Whose file it is: edt, dit or mdtv2."),
    heads: int | None = typer.Option(None, "--heads", help="Attention heads of a DiT of no published width."),
    weights: str = typer.Option("ema", "--weights", help="ema (what the authors sample from) or model."),
    as_json: bool = typer.Option(False, "--json", help="Print the outcome as JSON."),
) -> None:
    """Turn a checkpoint of the authors into a diffusers folder. Code inside the file is never run.

    Example: edt convert edt_s_400k.pt models/edt-s --family edt
    """
    from ..assemble import build_pipeline
    from ..convert import from_official, read_official
    from ..util.errors import UserError
    from ..util.files import atomic_directory, make_folder

    quiet_libraries()
    if out.exists():
        raise UserError(f"{out} exists already: name a new folder")
    state = read_official(checkpoint, weights)
    try:
        model = from_official(state, family, **({} if heads is None else {"num_heads": heads}))
    except ValueError as error:
        raise UserError(f"{checkpoint} cannot be converted: {error}") from None
    make_folder(out.parent)
    with atomic_directory(out) as folder:
        build_pipeline(model, None, pixels=False).save_pretrained(folder)
    facts = {"folder": str(out), "parameters": sum(p.numel() for p in model.parameters())}
    finish(f"wrote {out}: {type(model).__name__}, depths {list(model.stage_depths)}", facts, as_json)
