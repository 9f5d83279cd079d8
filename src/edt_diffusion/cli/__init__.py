"""The `edt` command. One file per subcommand; a subcommand imports its machinery only when it is called."""

import errno
import os
import sys
from typing import Any

# What a stopped command returns, as shells do for SIGINT.
STOPPED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    import typer

    from ..util.errors import UserError

    # typer has come to carry a copy of click: its exceptions are reached through the one that typer exports.
    usage_error: Any = typer.BadParameter.__base__
    try:
        from .app import app

        code = app(args=arguments, prog_name="edt", standalone_mode=False)
        if code == STOPPED:  # how typer reports a Ctrl-C
            _fail("stopped", STOPPED)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", STOPPED)
    except usage_error as error:
        _fail(f"error: {_explain(error)}", 2)
    except UserError as error:
        _fail(f"error: {error}", 2)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        remedy = "; make room and run the same command again" if error.errno == errno.ENOSPC else ""
        _fail(f"error: {error.strerror or error}{where}{remedy}", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Any) -> str:
    """One line about arguments that cannot be read: what typer says, the value, and where to read more."""
    message = error.format_message().removesuffix(".")
    problems = getattr(error.__cause__, "errors", list)()  # pydantic's; typer's own message leaves the value out
    given = f", not {problems[0]['input']!r}" if problems else ""
    where = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
    return f"{message}{given}{where}"


def _fail(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")  # of a job's processes, any may fail alone
    whose = "" if rank == "0" else f"process {rank}: "
    print(whose + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
