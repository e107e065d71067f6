"""What all tests share: no network, few threads, and the fixtures of multi-process tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before transformers or torch is imported by anything, and inherited by every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import world


def pytest_configure(config: pytest.Config) -> None:
    """Draw the same examples at every run, and time none, so that what fails anywhere fails everywhere.

    New ones: `pytest --hypothesis-profile search`. The environments of single tools have no hypothesis.
    """
    if not config.pluginmanager.hasplugin("hypothesispytest"):
        return
    from hypothesis import HealthCheck, settings

    untimed: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("search", print_blob=True, **untimed)
    settings.register_profile("same", derandomize=True, print_blob=True, **untimed)
    settings.load_profile("same")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/mpi is for pytest under mpirun, which collectives/test_under_mpirun.py starts."""
    started = config.getoption("--with-mpi", False)
    return True if collection_path == Path(__file__).parent / "mpi" and not started else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End a process whose CUDA context is lost to a kernel's fault: in it no test could pass; xdist starts another."""
    import torch

    if "gpu" not in item.keywords or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        if hasattr(item.config, "workerinput"):
            print(
                f"{item.nodeid} has lost the CUDA context: {error}", file=sys.__stderr__, flush=True
            )
            os._exit(70)
        pytest.exit(f"{item.nodeid} has lost the CUDA context: {error}", returncode=3)


@pytest.fixture
def run_world() -> Callable[..., list[Any]]:
    """The harness as a fixture, for tests that prefer it to `from world import run_world`."""
    return world.run_world
