"""`edt reproduce`."""

from pathlib import Path

import typer

from .output import finish, quiet_libraries


def reproduce(
    table: str = typer.Argument(None, metavar="[TABLE]", help="table1 ... table14, figure6, 9, 10; none lists them."),
    overrides: list[str] = typer.Argument(None, metavar="key.path=value", help="Settings of the trainings to change."),
    data: str = typer.Option(None, "--data", metavar="PATH", help="Pictures or a latent store to train on."),
    budget: str = typer.Option(None, "--budget", metavar="TIME", help="Each training: 60s, 2h, 10m-cpu, 500steps."),
    seeds: int = typer.Option(3, "--seeds", min=1, metavar="N", help="Trainings of each arm."),
    size: str = typer.Option(None, "--size", metavar="NAME", help="S, B, XL, small or tiny (by data and budget)."),
    image_size: int = typer.Option(None, "--image-size", min=1, metavar="N", help="Side of the pictures in pixels."),
    config: str = typer.Option(None, "--config", metavar="NAME", help="Preset or YAML to start from instead."),
    images: int = typer.Option(None, "--images", min=2, metavar="N", help="Samples of each score (by budget)."),
    extractor: str = typer.Option(None, "--extractor", metavar="NAME", help="As edt evaluate has it; or a .ts file."),
    reference: str = typer.Option(None, "--reference", metavar="PATH", help="Real pictures to score against."),
    processes: int = typer.Option(1, "--processes", min=1, metavar="N", help="Trainings at once."),
    threads: int = typer.Option(None, "--threads", min=1, metavar="N", help="Of each training (shares the cores)."),
    amm_blocks: str = typer.Option(None, "--amm-blocks", metavar="A+B", help="Where AMM acts in EDT."),
    measure: bool = typer.Option(False, "--measure", help="Table 7: time training steps on this machine."),
    device: str = typer.Option(None, "--device", metavar="NAME", help="Of what is timed (a GPU, else cpu)."),
    out: Path = typer.Option(None, "--out", metavar="FOLDER", help="Default: reproduced/TABLE."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    as_json: bool = typer.Option(False, "--json", help="Print the page as JSON."),
) -> None:
    """Reproduce a table or figure of the paper on your pictures, at your budget. Run it again to go on.

    Example: edt reproduce table4 --data pictures/ --budget 60s
    """
    from ..util.errors import UserError

    quiet_libraries()
    from ..studies.reproduce import TABLES, Request, default_folder, find_table, listing
    from ..studies.reproduce import reproduce as run

    if table is None:
        facts = {name: {"title": entry.title, "trains": entry.trains} for name, entry in TABLES.items()}
        lines = [*listing(), "budget, seeds and pictures are given by --budget, --seeds and --data"]
        finish("\n".join(lines), {"tables": facts}, as_json)
        return
    find_table(table)
    folder = out or default_folder(table)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: expected a folder")
    request = Request(
        table=table, out=folder, command=_command(), data=data, budget=budget, seeds=seeds, size=size,
        image_size=image_size, config=config, overrides=tuple(overrides or ()), images=images, extractor=extractor,
        reference=reference, processes=processes, threads=threads, amm_blocks=amm_blocks, measure=measure,
        device=device, quiet=quiet,
    )  # fmt: skip
    page = run(request)
    if not as_json and not quiet:
        print(page.markdown())
    stopped = page.more.get("stopped", False)
    again = "stopped and saved; the same command again goes on; " if stopped else ""
    figure = f" and {folder / page.figure}" if page.figure else ""
    finish(f"{again}wrote {folder / 'table.md'}, {folder / 'table.json'}{figure}", page.facts(), as_json)


def _command() -> str:
    import shlex
    import sys

    return shlex.join(["edt", *sys.argv[1:]]) if sys.argv[1:2] == ["reproduce"] else "edt reproduce"
