"""One thread: the tests' networks are so small that handing work to a second one costs more than it gains, on a busy machine far more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses too
