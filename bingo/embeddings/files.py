"""Embeddings of a folder as a file for other programs: NumPy or Parquet, float32, one row for each image.

Rows come in batches and are written in blocks, so that memory holds one block. Files are written atomically.
Shape letters: N images, D feature width, B rows of a block.

    .npy       float32 (N, D), which NumPy can memory-map; the paths are in a .txt file of the same name, one per line
    .parquet   columns path (string) and embedding (D float32 in a fixed-size list); attributes in the schema's metadata
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bingo.runtime.artefacts import canonical_json, new_file, write_bytes
from bingo.runtime.errors import UserError

BLOCK_ROWS = 8192


def write_embeddings(path: Path, paths: Sequence[str], width: int, batches: Iterable[np.ndarray], attributes: Mapping[str, Any]) -> None:
    """Write float32 (N, D) in the format of `path`'s suffix; `batches` are its rows in the order of the N `paths`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _FORMATS[path.suffix](path, paths, width, _blocks(batches), attributes)


def check_names(path: Path, paths: Sequence[str]) -> None:
    """Raises UserError if the format of `path` cannot hold one of these names."""
    if path.suffix == ".npy" and (broken := [name for name in paths if len(name.splitlines()) > 1]):
        raise UserError(f"--out = {path}: {broken[0]!a} has a line break in its name, and .npy stores one name per line; write .parquet")


def files_of(path: Path) -> list[Path]:
    """The files that writing `path` creates: `path` itself, and for .npy the .txt file of paths."""
    return [path, path.with_suffix(".txt")] if path.suffix == ".npy" else [path]


def _blocks(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same rows in blocks of BLOCK_ROWS, the last one shorter."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch)
        while sum(len(part) for part in waiting) >= BLOCK_ROWS:
            rows = np.concatenate(waiting)
            yield rows[:BLOCK_ROWS]
            waiting = [rows[BLOCK_ROWS:]]
    if sum(len(part) for part in waiting):
        yield np.concatenate(waiting)


def _npy(path: Path, paths: Sequence[str], width: int, blocks: Iterator[np.ndarray], attributes: Mapping[str, Any]) -> None:
    with new_file(path) as partial:
        with open(partial, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": (len(paths), width)}
            np.lib.format.write_array_header_1_0(file, header)
            for block_BD in blocks:
                file.write(np.ascontiguousarray(block_BD, np.float32).data)
        write_bytes(files_of(path)[1], "".join(f"{name}\n" for name in paths).encode())


def _parquet(path: Path, paths: Sequence[str], width: int, blocks: Iterator[np.ndarray], attributes: Mapping[str, Any]) -> None:
    fields = [pa.field("path", pa.string()), pa.field("embedding", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata={"bingo": canonical_json(dict(attributes))})
    with new_file(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for number, block_BD in enumerate(blocks):
            values = pa.FixedSizeListArray.from_arrays(pa.array(block_BD.ravel()), width)
            names = paths[number * BLOCK_ROWS : number * BLOCK_ROWS + len(block_BD)]
            writer.write_table(pa.table([pa.array(names), values], schema=schema))


_FORMATS = {".npy": _npy, ".parquet": _parquet}
SUFFIXES = tuple(_FORMATS)
