"""What all tests share: quiet surroundings, the optional real data, and the table of parity errors."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may depend on the network

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-report",
        action="store_true",
        help="at the end, list the `largest_error` that each parity test recorded with record_property",
    )


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a pytest-xdist worker: the processes share the cores already
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of real data and reference arrays, kept outside the repository; the test is skipped without it."""
    folder = Path(os.environ.get("EDT_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip("real data folder absent: set EDT_SHARED")
    return folder


@pytest.fixture(autouse=True)
def attention_back_end() -> Iterator[None]:
    """`set_attention_backend` of one model chooses for the whole process: put back what was there."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--parity-report"):
        return
    rows = sorted(
        (report.nodeid, float(value))
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
        for name, value in report.user_properties
        if name == "largest_error"
    )
    terminalreporter.section("parity: largest error of each test")
    for nodeid, error in rows:
        terminalreporter.write_line(f"{error:10.3e}  {nodeid}")
    if not rows:
        terminalreporter.write_line("no test recorded a largest_error")
