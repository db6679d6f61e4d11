"""The gallery's data as scripts that call one function of the page, because a page opened from a file may load scripts but not fetch data.

Numbers are little-endian bytes in base64, names are JSON in ASCII, so no name can end a string or a script.

    data/meta.js             the whole index: title, classes, sizes of the blocks, layout of the thumbnails
    data/columns.js          one number for each row: label, purity, similarity, in-degree, cluster; and for a sample, its anchors and the
                             rows with thumbnails, both ascending
    data/bags-NNNNNN.js      members int32 (n, K), then similarities int16 (n, K), of one block of rows
    data/paths-NNNNNN.js     paths of one block of rows
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bingo.bags.index import Bags
from bingo.bags.metrics import in_degrees, purities, ratio
from bingo.browse.listing_rows import ListingRows

BAG_ROWS, PATH_ROWS = 1024, 4096
SCALE = 10_000  # shares and cosines are integers in units of 1/10,000
UNKNOWN = -32768


def write_sidecars(folder: Path, meta: dict[str, Any], bags: Bags, listing: ListingRows, sample: Mapping[str, np.ndarray]) -> None:
    """Write all scripts to `folder`. `meta` is added to the metadata of the index, `sample` (row numbers) to the columns."""
    rows, k = bags.members_TK.shape
    labels_T = listing.labels_N[:rows]
    numbers = {"rows": rows, "k": k, "bag_rows": BAG_ROWS, "path_rows": PATH_ROWS, "scale": SCALE, "unknown": UNKNOWN}
    _call(folder / "meta.js", "meta", numbers | {"classes": listing.classes} | meta)
    columns = _columns(bags, labels_T) | {name: rows.astype("<i4") for name, rows in sample.items()}
    _call(folder / "columns.js", "columns", {name: [x.dtype.name, base64.b64encode(x.tobytes()).decode()] for name, x in columns.items()})
    for block, start in enumerate(range(0, rows, BAG_ROWS)):
        part = slice(start, start + BAG_ROWS)
        listed = bags.members_TK[part] >= 0
        members = bags.members_TK[part].astype("<i4").tobytes()
        cosines = np.where(listed, bags.similarity_TK[part], np.nan)
        content = base64.b64encode(members + _scaled(cosines).tobytes()).decode()
        _call(folder / f"bags-{block:06d}.js", "put", "bags", block, content)
    for start, paths in listing.paths(PATH_ROWS):
        if start < rows:
            _call(folder / f"paths-{start // PATH_ROWS:06d}.js", "put", "paths", start // PATH_ROWS, paths[: rows - start])


def _columns(bags: Bags, labels_T: np.ndarray) -> dict[str, np.ndarray]:
    """Of each anchor's listed members the purity and the mean cosine (unknown for an empty bag), and the number of bags that list it."""
    columns = {
        "label": labels_T.astype("<i4"),
        "purity": _scaled(purities(bags.members_TK, labels_T)),
        "similarity": np.concatenate([_mean_cosines(bags, start) for start in range(0, len(labels_T), BAG_ROWS)]),
        "in_bags": in_degrees(bags.members_TK).astype("<i4"),
    }
    return columns if bags.cluster_T is None else columns | {"cluster": bags.cluster_T.astype("<i4")}


def _mean_cosines(bags: Bags, start: int) -> np.ndarray:
    """The scaled mean cosine of each of `BAG_ROWS` anchors to its listed members."""
    listed_nK = bags.members_TK[start : start + BAG_ROWS] >= 0
    cosines_nK = np.where(listed_nK, bags.similarity_TK[start : start + BAG_ROWS], 0).astype(np.float32)
    return _scaled(ratio(cosines_nK.sum(axis=1), listed_nK.sum(axis=1)))


def _scaled(x: np.ndarray) -> np.ndarray:
    """Numbers within -1..1 as int16, `UNKNOWN` for NaN."""
    return np.where(np.isnan(x), UNKNOWN, np.rint(np.nan_to_num(x).astype(np.float64) * SCALE)).astype("<i2")


def _call(path: Path, function: str, *arguments: Any) -> None:
    path.write_text(f"bingo.{function}({', '.join(json.dumps(argument) for argument in arguments)});\n", encoding="ascii")
