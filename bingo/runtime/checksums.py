"""Checksums inside files (safetensors, or any bytes), so that a changed byte is detected when a file is read.

For stores of arrays see bingo/runtime/chunks.py, for listings bingo/images/listing.py. Does not import torch: a report reads only headers.
"""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from bingo.runtime.artefacts import canonical_json

_ENTRY, _METADATA = "sha256", "__metadata__"
_ALIGNMENT = 8
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit


class Damaged(Exception):
    """The bytes are not those that were written; the message is a short reason."""


def seal_safetensors(content: bytes) -> bytes:
    """A safetensors file with the sha256 of its header and tensors appended to its metadata."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
    digest = _header_hash(header)
    digest.update(data)
    header[_METADATA] = {**header.get(_METADATA, {}), _ENTRY: digest.hexdigest()}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([struct.pack("<Q", len(text)), text, data])


def check_safetensors(path: Path | str) -> None:
    """Raise Damaged if a file is not as `seal_safetensors` made it, OSError if it cannot be read."""
    with open(path, "rb") as file:
        header = _read_header(file)
        try:
            stored = header[_METADATA].pop(_ENTRY)
        except (KeyError, TypeError, AttributeError):
            raise Damaged("its metadata hold no checksum") from None
        digest = _header_hash(header)
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != stored:
        raise Damaged("its bytes do not fit their checksum")


def _read_header(file: BinaryIO) -> dict[str, Any]:
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= min(_MOST_HEADER_BYTES, os.fstat(file.fileno()).st_size - 8):
        raise Damaged("it has no header of safetensors")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise Damaged("its header is not JSON")
    return header


def _header_hash(header: dict[str, Any]) -> "hashlib._Hash":
    return hashlib.sha256(canonical_json(header).encode())


def seal(content: bytes) -> bytes:
    """The bytes, preceded by their sha256 (32 bytes)."""
    return hashlib.sha256(content).digest() + content


def unseal(sealed: bytes) -> memoryview:
    """The bytes passed to `seal`. Raises Damaged."""
    view = memoryview(sealed)
    if hashlib.sha256(view[32:]).digest() != view[:32]:
        raise Damaged("its bytes do not fit their checksum")
    return view[32:]
