"""The `edt` command. One file per subcommand; a subcommand imports its machinery only when it is called."""

import sys

from .app import app


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 2, never a traceback."""
    import click

    from ..util.errors import UserError

    try:
        code = app(args=arguments, standalone_mode=False)
    except click.exceptions.Abort:
        _fail("stopped", 130)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except click.ClickException as error:
        where = f" (see '{error.ctx.command_path} --help')" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(f"error: {error.format_message()}{where}", 2)
    except UserError as error:
        _fail(f"error: {error}", 2)
    except OSError as error:
        _fail(f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
