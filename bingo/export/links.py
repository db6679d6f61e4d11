"""reports/exports.js lists the exports of this workspace, to which reports/index.html links. Like run.js, it is not an output of a
stage."""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bingo import paths
from bingo.export.measured import ExportFigures
from bingo.runtime.artefacts import file_fingerprint, write_bytes

_BEFORE, _AFTER = "window.bingoExports = ", ";\n"


def add_link(out: Path, card: Path, target: str, student: Path, measured: ExportFigures) -> None:
    """Add an export and its model card to the list, replacing an entry for the same file; files that no longer exist are removed."""
    made = {
        "file": _address(out), "card": _address(card), "name": out.name, "target": target, "student": student.as_posix(),
        "network": file_fingerprint(student), "figures": [[name, after] for name, _, after in measured.rows],
    }  # fmt: skip
    kept = [link for link in _links() if link["file"] != made["file"] and (paths.REPORTS / link["path"]).exists()]
    made["path"] = os.path.relpath(out, paths.REPORTS)
    write_bytes(paths.EXPORTS, f"{_BEFORE}{json.dumps([*kept, made], indent=1)}{_AFTER}".encode())


def _address(file: Path) -> str:
    return quote(Path(os.path.relpath(file, paths.REPORTS)).as_posix())


def _links() -> list[dict[str, Any]]:
    """The entries of the file; empty if it is absent or was changed."""
    try:
        found = json.loads(paths.EXPORTS.read_text().removeprefix(_BEFORE).removesuffix(_AFTER))
        return [link for link in found if isinstance(link, dict) and {"file", "path"} <= link.keys()]
    except (OSError, ValueError, TypeError):
        return []
