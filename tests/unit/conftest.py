"""Fixtures of the unit tests."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Bitwise claims hold at an equal thread count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
