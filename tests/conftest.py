"""Settings of the whole test run."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure():
    # The tests' tensors are tiny: on a busy machine, a second thread makes every operation wait for the other.
    torch.set_num_threads(1)


@pytest.fixture
def all_cores():
    """For the few tests with a real network."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)
