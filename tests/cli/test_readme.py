"""What README and docs/ show must exist: every command line parses, every name imported in Python code is there."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from edt_diffusion.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES["README.md"]
# Lines of their own, and launched by torchrun or accelerate, where a backslash continues them.
_LINE = re.compile(r"^(?:    edt|[^`\n]* -m edt_diffusion) (.+)$", flags=re.MULTILINE)


def _lines(text):
    for line in _LINE.findall(text.replace("\\\n", " ")):
        command = re.sub(r"(' \|\| exit| &)$", "", line)
        if "..." not in command and "`" not in command:
            yield " ".join(command.split())


COMMANDS = sorted({(name, line) for name, text in PAGES.items() for line in _lines(text)})


def test_the_pages_show_the_main_commands():
    shown = {line.split()[0] for name, line in COMMANDS if name == "README.md"}
    assert shown >= {"demo", "train", "runs", "plot", "ema", "sample", "info", "convert", "encode", "data"}
    assert {name for name, _ in COMMANDS} == PAGES.keys()


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_lines_parse(page, line):
    name, *arguments = shlex.split(line, comments=True)
    group: Any = typer.main.get_command(app)
    command: Any = group.commands[name]
    if hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(name, arguments)  # raises on an unknown option or a value of the wrong type


def test_python_code_imports_what_exists():
    blocks = [block for text in PAGES.values() for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]
    imported = [
        (node.module, alias.name)
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("edt_diffusion")
        for alias in node.names
    ]
    assert {module for module, _ in imported} >= {"edt_diffusion", "edt_diffusion.assemble"}
    for module, name in imported:
        assert getattr(importlib.import_module(module), name)


def test_make_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
