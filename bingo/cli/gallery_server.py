"""The gallery over HTTP, for this machine alone: for browsers that open no files, and for a tunnel to a remote machine."""

import errno
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bingo.runtime.errors import UserError

HOST = "127.0.0.1"
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'"


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder; scripts and images from nowhere else."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server that is bound, not running yet; port 0 takes any free one. Raises UserError where the port is taken."""
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise UserError(f"--port = {port}: {reason}; give another, or 0 for any free one") from None


def serve_folder(folder: Path, port: int) -> None:
    """Serve until Ctrl-C."""
    with make_server(folder, port) as server:
        print(f"http://{HOST}:{server.server_address[1]}/   (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
