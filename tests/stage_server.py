"""Runs `python -m MODULE ARGUMENTS` in forks of a process that has imported the large libraries: 0.5 s instead of 5 s each.

python stage_server.py SOCKET: each connection sends one JSON line, {module, arguments, folder, environment, out, err}, and receives the id
of the process and, when it has ended, its exit status as in subprocess. Nothing of the project itself is imported here.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

LIBRARIES = [
    "faiss",
    "jinja2",
    "matplotlib.pyplot",
    "PIL.Image",
    "pyarrow.parquet",
    "pydantic.main",
    "ruamel.yaml",
    "safetensors.torch",
    "scipy.special",
    "simplejpeg",
    "sklearn.datasets",
    "timm",
    "torch",
    "torchvision.models",
    "typer",
    "zarr",
]


def serve(address: str) -> None:
    """Serve until the process that started this one closes standard input (see Stages)."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the guardians
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                break
            connection.close()
    request = json.loads(connection.makefile().readline())
    stage = os.fork()
    if stage == 0:
        connection.close()
        end_with(become, request)
    connection.sendall(f"{stage}\n".encode())
    _, status = os.waitpid(stage, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def end_with(work: Callable[..., None], request: dict[str, Any]) -> NoReturn:
    """Do some work and exit as Python would, but without unloading the imported libraries, which would copy their memory and take long."""
    status: Any = 0
    try:
        work(**request)
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def become(module: str, arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """Behave as a new process `python -m module` in `folder`."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, stream.fileno())
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    sys.path.insert(0, folder)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in LIBRARIES:
            __import__(library)
    gc.freeze()  # otherwise each fork would copy all of it
    serve(sys.argv[1])
