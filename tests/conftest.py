"""Settings of the whole test run."""

from __future__ import annotations

import os

# Workers side by side share the cores, and so do the programs that tests start; to be said before torch is imported.
_CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ.setdefault("OMP_NUM_THREADS", str(_CORES))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Without a GPU, Triton's interpreter runs the kernels on the CPU. It has to be said before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    # Here and not in pyproject.toml: there it would import hgprompt, and Triton with it, before the line above.
    config.addinivalue_line("filterwarnings", "error::hgprompt.HGPromptWarning")
    # The tests' tensors are tiny: on a busy machine, a second thread makes every operation wait for the other.
    torch.set_num_threads(1)
    # On a GPU a convolution takes TF32 by default: beside an error that large, twice it, any kernel's float32 would do.
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def all_cores():
    """For the few tests with a real network."""
    torch.set_num_threads(_CORES)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def unwritten_is_nan():
    """Memory that a kernel allocates and does not write holds NaN, and is seen."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def pytest_runtest_logreport(report):
    """Failures as they come into the file that TEST_FAILURES names: a run that is ended from outside says nothing more.
    With pytest-xdist, in the process that hears of all."""
    path = os.environ.get("TEST_FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
