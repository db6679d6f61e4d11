"""Write files atomically, with equal bytes for equal content, and identify artefacts by fingerprints."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, indented by two spaces, with a newline at the end: equal values give equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def fingerprint(value: Any) -> str:
    """32 hex digits that identify a JSON-serialisable value (sha256, shortened)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def file_fingerprint(path: Path | str) -> str:
    """32 hex digits that identify the bytes of a file (sha256, shortened). Raises UserError if the file does not exist."""
    try:
        with open(path, "rb") as file, progress_bar(f"hashing {path}"):
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the stage that writes it: dvc repro") from None


class NotWritten(OSError):
    """A file or folder that could not be written, by its name."""


@contextmanager
def errors_named(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Context manager that raises an OSError as NotWritten if it names `partial`, `path` or a parent folder, or no file, since most writers
    do not report which file failed."""
    try:
        yield
    except OSError as error:
        named = Path(str(error.filename)) if error.filename is not None else None
        above = named is not None and path.is_relative_to(named)
        if error.errno is None or not (named is None or above or (partial and str(named).startswith(str(partial)))):
            raise
        raise NotWritten(error.errno, os.strerror(error.errno), str(named if above else path)) from error


@contextmanager
def new_file(path: Path | str, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`; on success the file replaces `path`, on an error it is removed.

    `flush`: it is synced to the disk before it is renamed. Raises NotWritten naming `path` if the disk is full or writing is not permitted.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with errors_named(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if flush:
                with open(partial, "rb") as written:
                    os.fsync(written.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write under a temporary name, sync to the disk, and rename to `path`; raises what `new_file` does."""
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path | str, value: Any) -> None:
    """Write `canonical_json` of `value` atomically."""
    write_bytes(path, canonical_json(value).encode())


def write_arrays(path: Path | str, arrays: Mapping[str, Any]) -> None:
    """Write NumPy arrays by name as .npz, compressed, atomically; equal arrays give equal bytes."""
    import numpy as np

    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(path, content.getvalue())


def write_csv(path: Path | str, records: Sequence[Mapping[str, Any]], first_columns: Sequence[str]) -> None:
    """Write a CSV file with a row for each record atomically. `first_columns` come first; missing values are empty fields."""
    columns = list(dict.fromkeys([*first_columns, *(name for record in records for name in record)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_bytes(path, text.getvalue().encode())


def read_json(path: Path | str) -> Any:
    """The value in a JSON file. Raises UserError if the file is absent or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the stage that writes it: dvc repro") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and run: dvc repro") from None


@contextmanager
def new_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder next to `path`; on success it replaces `path`, on an error it is removed.

    Raises NotWritten naming `path` if the disk is full or writing is not permitted.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with errors_named(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            if path.exists():
                shutil.rmtree(path)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def taken_first(mark: Path) -> bool:
    """Make an empty file, and return whether no process of a group has made it before: the one that does the work which it stands for."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def link_or_copy(source: str, target: str) -> None:
    """Make `target` a hard link to a file, or a copy if that is not possible: on another disk, or on one without hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
