"""One thread: the tests' networks are so small that handing work to a second one costs more than it gains, on a busy machine far more.

And one server of stages for all tests: to start it takes as long as to run five stages.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses too

from workspace import Stages, stage_server


@pytest.fixture(scope="session")
def stages(tmp_path_factory) -> Iterator[Stages]:
    """Starts the stages of a workspace as processes."""
    with stage_server(tmp_path_factory.mktemp("server")) as server:
        yield server
