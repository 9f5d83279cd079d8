"""`python -m edt_diffusion`, for launchers that start a module: the `edt` command."""

from .cli import main

if __name__ == "__main__":
    main()
