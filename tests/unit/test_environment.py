"""The declared dependencies, their pins, and the one package that must stay away."""

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PINS_FILE = REPOSITORY / "constraints.txt"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

# What a CUDA build of torch adds; which of them, and at what version, is decided by torch's own exact requirements.
CUDA_ONLY = ("nvidia-", "cuda-", "triton")


def pin_lines() -> list[str]:
    lines = (line.strip() for line in PINS_FILE.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in pin_lines())}


def declared() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in requirements if requirement.name != PROJECT["name"]]


def test_torchvision_is_absent_beside_a_cpu_build_of_torch():
    if torch.version.cuda or torch.version.hip:
        pytest.skip("torch is not a CPU build")
    assert importlib.util.find_spec("torchvision") is None, (
        "torchvision fails to import beside a CPU build of torch and then breaks diffusers' models: uninstall it"
    )


def test_every_line_of_the_constraints_is_one_exact_public_version():
    exact = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*")  # no `+local`, `@ url`, path or option
    assert pin_lines()
    assert [line for line in pin_lines() if not exact.fullmatch(line)] == []
    assert len(pins()) == len(pin_lines()), "a package is pinned twice"


def test_the_constraints_name_no_host():
    assert "://" not in PINS_FILE.read_text()


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_a_declared_dependency_is_pinned_within_its_bounds(requirement):
    version = pins().get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} is missing from constraints.txt"
    assert requirement.specifier.contains(version, prereleases=True)


def test_what_the_dependencies_need_is_pinned_too():
    waiting = [(requirement.name, frozenset(requirement.extras)) for requirement in declared()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        for requirement in map(Requirement, lines):
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
            )
            if wanted and not requirement.name.startswith(CUDA_ONLY):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert sorted({canonicalize_name(name) for name, _ in seen} - pins().keys()) == []
