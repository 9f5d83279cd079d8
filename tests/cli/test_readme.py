"""What the README shows must exist: every command line parses, every name imported in its Python code is there."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer.main

import edt_diffusion
from edt_diffusion.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^    (edt .+)$", README, flags=re.MULTILINE)))


def test_the_readme_shows_the_main_commands():
    assert {line.split()[1] for line in COMMANDS} >= {"demo", "train", "sample", "info", "convert"}


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line):
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)  # raises on an unknown option or a value of the wrong type


def test_python_code_imports_what_exists():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    imported = [
        alias.name
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module == "edt_diffusion"
        for alias in node.names
    ]
    assert imported
    for name in imported:
        assert getattr(edt_diffusion, name)


def test_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
