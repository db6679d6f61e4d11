"""Fixtures shared by all tests.

Tests use one thread, because their networks are so small that a second one costs more than it saves, especially on a busy machine. They
share one server of stages, because starting it takes as long as running five stages, and the finished short pipeline, which several files
copy.
"""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, also for subprocesses: the last bits depend on it

import shutil
from collections.abc import Iterator

import pytest
import torch
from workspace import SHORT, STAGES, Stages, Workspace, new_workspace, stage_server

from bingo.runtime import progress

if sys.platform == "linux" and not torch.cuda.is_available():
    from tests.pretended_gpu import engine

    engine.ready()  # before the first backward pass of any test

# Fixtures that run a pipeline, a sweep or stages as processes: every test that uses one is slow.
LONG_FIXTURES = {"stages", "reference", "made", "runs", "repository", "two_processes"}


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make test-fast` leaves out, in addition to those that are marked explicitly."""
    for item in items:
        if isinstance(item, pytest.Function) and not LONG_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch) -> None:
    """No progress is written by commands that run in the test's process, however busy the machine is."""
    monkeypatch.setattr(progress, "_SILENT_SECONDS", float("inf"))


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """No test may change the number of threads: with two, all later tests would be several times slower on a busy machine."""
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="session")
def stages(tmp_path_factory) -> Iterator[Stages]:
    """Starts the stages of a workspace as processes."""
    with stage_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def reference(tmp_path_factory, stages) -> Workspace:
    """The finished pipeline; no test may write to it."""
    workspace = new_workspace(tmp_path_factory.mktemp("reference") / "bingo", stages, SHORT)
    for stage in STAGES:
        workspace.done(stage)
    return workspace


@pytest.fixture
def workspace(tmp_path, stages, reference) -> Workspace:
    """A copy of the finished pipeline."""
    shutil.copytree(reference.root, tmp_path / "bingo", symlinks=True)
    return Workspace(tmp_path / "bingo", stages)
