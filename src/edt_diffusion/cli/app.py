"""The table of subcommands."""

import inspect

import typer

from .amm import amm
from .compare import compare
from .convert import convert
from .data import data
from .demo import demo
from .edit import edit
from .ema import ema
from .encode import encode
from .evaluate import evaluate
from .info import info
from .interpolate import interpolate
from .plot import plot
from .profile import profile
from .reproduce import reproduce
from .runs import runs
from .sample import sample
from .train import train

INTRODUCTION = """\
edt: train, run and judge an image generator (EDT, the Efficient Diffusion Transformer) on your own labelled pictures.

  edt demo                                   train on real digits and look at the result, in minutes
  edt data inspect pictures/                 classes, sizes, duplicates, problems, contact sheets; also verify, convert
  edt encode pictures/ --codec VAE --out lat/  pictures to a latent store, for training at 256 or 512 pixels
  edt train small-32 --data pictures/        train on pictures, one sub-folder per class; run it again to resume
  edt runs                                   the runs there are, how far they are, how they do
  edt plot runs/a runs/b                     their curves as a picture
  edt ema runs/a --sigma-rel 0.1             averaged weights of any length, after the training
  edt sample runs/small-32 --classes a,b     pictures of the classes you name
  edt interpolate runs/a --classes a,b       the pictures between classes and seeds, as frames and a film
  edt edit runs/a photo.png --class a        a picture changed: the part under a mask, or all of it
  edt evaluate runs/a --reference pictures/  FID and others with intervals, for pictures too; class fidelity, copies
  edt amm search runs/a --reference pictures/  where attention modulation helps, if anywhere; edt amm show draws it
  edt compare results/*.json                 results side by side, or why they cannot be compared
  edt info EDT-S/2                           size, cost, token grids and attention modulation of a model
  edt profile runs/a                         where time and memory go on this machine, by stage and block
  edt reproduce table4 --data pictures/      a table or figure of the paper on your pictures; alone it lists them
  edt convert official.pt folder/            the authors' checkpoints as a diffusers folder

Every command explains itself: edt COMMAND --help"""

app = typer.Typer(
    name="edt",
    help="Train, run and judge an image generator (EDT, the Efficient Diffusion Transformer) on your own pictures.",
    epilog="Example: edt demo",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def root(context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    """Print what this is when called without a subcommand."""
    if version:
        from .. import __version__

        print(__version__, flush=True)
    elif context.invoked_subcommand is None:
        print(INTRODUCTION, flush=True)


for _command in (
    demo, encode, train, runs, plot, ema, sample, interpolate, edit, evaluate, compare, info, profile, reproduce,
    convert,
):  # fmt: skip
    # The last paragraph of a docstring is the example with which the help ends; \b keeps it on its lines.
    _text, _, _example = inspect.getdoc(_command).rpartition("\n\n")  # pyright: ignore[reportOptionalMemberAccess]
    app.command(help=_text, epilog=f"\b\n{_example}")(_command)
app.add_typer(data)
app.add_typer(amm)
