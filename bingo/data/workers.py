"""Worker processes end with the process that they work for, even where that one is killed."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_owner(*_: object) -> None:
    """To be called in a new worker: a thread waits for the death of the process that asked for it, and then ends the worker.

    A worker is a child of the fork server, not of its owner, and each keeps the other alive: on their own they would stay for ever.
    """
    if (owner := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_watch, args=(owner.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
