"""All pairs of an anchor and a member of its bag as a table, written to a file block by block: only paths and labels are held in memory.

One line per pair, in the order of the anchors' rows, then of rank. Shape letters: K members listed, L lines, D feature width.

    row, member                 int32           rows of the listing: the anchor's and the member's
    path, member_path           string          their paths in the listing
    label, member_label         string          names of their classes, null where unknown
    rank                        int32           1 for the nearest member
    similarity                  float32         cosine of the two, to float16 precision
    features                    D float32       on request, in Parquet only: the teacher's features of the anchor, not normalised
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from bingo.bags.index import BagIndex
from bingo.browse.listing_rows import ListingRows
from bingo.runtime.artefacts import new_file
from bingo.runtime.chunks import StoredRows

_LINES, _VALUES = 1 << 16, 1 << 22  # the most lines of a block, and values of features: 16 MiB
_COLUMNS = {
    "row": pa.int32(), "path": pa.string(), "label": pa.string(), "member": pa.int32(), "member_path": pa.string(),
    "member_label": pa.string(), "rank": pa.int32(), "similarity": pa.float32(),
}  # fmt: skip


def write_pairs(
    path: Path,
    index: BagIndex,
    listing: ListingRows,
    features: StoredRows | None = None,
    advance_to: Callable[[int], None] = lambda _: None,
) -> int:
    """Write all pairs of an index in the format of `path`'s suffix, atomically, and return their number. `advance_to` is called with the
    number of anchors that are done. Raises UserError if an artefact is damaged."""
    columns = _COLUMNS if features is None else _COLUMNS | {"features": pa.list_(pa.float32(), features.shape[1])}
    schema, lines = pa.schema(columns), 0
    with new_file(path) as partial, _WRITERS[path.suffix](partial, schema) as writer:
        for anchors_done, block in _blocks(index, listing, features, schema):
            writer.write_table(block)
            lines += len(block)
            advance_to(anchors_done)
    return lines


def _blocks(index: BagIndex, listing: ListingRows, features: StoredRows | None, schema: pa.Schema) -> Iterator[tuple[int, pa.Table]]:
    """(anchors that are done, lines) of every block, the last one shorter."""
    paths, labels = listing.columns()
    lines = _LINES if features is None else min(_LINES, max(1, _VALUES // features.shape[1]))
    for first, members_nK, similarity_nK in index.blocks(_LINES):
        features_nD = None if features is None else features[first : first + len(members_nK)]
        anchor_L, rank_L = np.nonzero(members_nK >= 0)
        for start in range(0, len(anchor_L), lines):
            anchor_l, rank_l = anchor_L[start : start + lines], rank_L[start : start + lines]
            rows_l, members_l = (first + anchor_l).astype(np.int32), members_nK[anchor_l, rank_l]
            columns = [
                rows_l, paths.take(pa.array(rows_l)), labels.take(pa.array(rows_l)), members_l, paths.take(pa.array(members_l)),
                labels.take(pa.array(members_l)), (rank_l + 1).astype(np.int32), similarity_nK[anchor_l, rank_l].astype(np.float32),
            ]  # fmt: skip
            if features_nD is not None:
                values = pa.array(features_nD[anchor_l].astype(np.float32).ravel())
                columns.append(pa.FixedSizeListArray.from_arrays(values, features_nD.shape[1]))
            yield first + int(anchor_l[-1]), pa.table(columns, schema=schema)


_WRITERS: dict[str, Callable[[Path, pa.Schema], AbstractContextManager[Any]]] = {
    ".parquet": lambda path, schema: pq.ParquetWriter(path, schema, compression="zstd"),
    ".csv": lambda path, schema: pyarrow.csv.CSVWriter(path, schema),
}
