"""The artefacts that the `bags` commands read from the workspace or a revision. Each is opened when it is first needed."""

import io
import operator
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
from PIL.Image import Image

from bingo import paths
from bingo.bags.index import BagIndex, read_bags
from bingo.browse.listing_rows import ListingRows
from bingo.browse.pictures import Pictures
from bingo.browse.sheets import Tile, contact_sheet
from bingo.cli.revisions import artefacts
from bingo.embeddings.store import Embeddings, read_embeddings
from bingo.params.places import images_folder
from bingo.runtime.artefacts import read_json
from bingo.runtime.errors import UserError, printable
from bingo.runtime.inside import path_inside

PICTURE_PX = 160
_BAGS_IN_NOTEBOOK, _MEMBERS_IN_NOTEBOOK = 3, 20


@dataclass(frozen=True)
class Bag:
    """The bag of an anchor: the anchor's row, path and class name (`-` where unknown), and the listed members, nearest first, int32 (K,),
    with their cosines to it, float32 (K,)."""

    source: "BagSource" = field(repr=False)
    row: int
    path: str
    label: str
    members: np.ndarray
    similarity: np.ndarray

    def picture(self, most: int | None = None) -> Image:
        """The anchor and at most `most` members, each with its similarity and class."""
        source, (_, (label,)) = self.source, self.source.listing.rows([self.row])
        heading = f"{source.listing.dataset}, row {self.row}: {self.path}   ({source.describe(self.row)}; {source.name})"
        tiles = source.member_tiles(self.members[:most], self.similarity[:most], label)
        return contact_sheet(heading, source.tile(self.row), tiles)

    def _repr_html_(self) -> str:
        """The picture, in 256 colours, inside the page."""
        content = io.BytesIO()
        self.picture(_MEMBERS_IN_NOTEBOOK).quantize(256).save(content, "png", optimize=True)
        words = escape(f"row {self.row}: {self.path}, and its {len(self.members)} members", quote=True)
        return f'<img alt="{words}" src="data:image/png;base64,{b64encode(content.getvalue()).decode()}">'


class BagSource:
    """Listing, bag index and pictures that belong together: readers compare their fingerprints."""

    def __init__(self, rev: str | None = None):
        self.artefacts = artefacts(rev)
        self.name = self.artefacts.name

    def __len__(self) -> int:
        return self.index.train_rows

    def __getitem__(self, row: int) -> Bag:
        """The bag of a train row. Raises UserError if the row does not exist, TypeError if it is not an integer."""
        row = operator.index(row)
        members, similarity = self.index.members(row), self.index.similarity(row)
        (path,), (label,) = self.listing.rows([row])
        return Bag(self, row, path, self.class_name(label), members, similarity)

    def __iter__(self) -> Iterator[Bag]:
        return map(self.__getitem__, range(len(self)))

    def _repr_html_(self) -> str:
        """The number of bags, and a few of them as pictures."""
        rows = np.linspace(0, len(self) - 1, min(len(self), _BAGS_IN_NOTEBOOK)).astype(int).tolist()
        return f"<p>{len(self):,} bags: {escape(self.title)}</p>" + "".join(self[row]._repr_html_() for row in rows)

    @cached_property
    def listing(self) -> ListingRows:
        """The listing, read row by row."""
        title = self.artefacts.title(paths.LISTING)
        if self.artefacts.is_workspace:
            return ListingRows(self.artefacts.store(paths.LISTING), title)
        with self.artefacts.open(paths.LISTING) as file:
            return ListingRows(io.BytesIO(file.read()), title)

    @cached_property
    def index(self) -> BagIndex:
        """The bag index, read row by row. Raises UserError if it is absent, damaged or another listing's."""
        listing = self.listing
        return read_bags(self.artefacts.store(paths.BAGS), listing, name=self.artefacts.title(paths.BAGS))

    @cached_property
    def embeddings(self) -> Embeddings:
        """The teacher's embeddings, read when they are accessed. Raises UserError as `index` does."""
        return read_embeddings(self.artefacts.store(paths.EMBEDDINGS), self.listing, self.artefacts.title(paths.EMBEDDINGS))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The statistics of the whole index, as computed by the stage `bag` (see `bingo.bags.metrics`). Raises UserError as `index` does,
        and if the file is absent or damaged."""
        self.index  # noqa: B018 (of this listing)
        with TemporaryDirectory() as folder:
            return read_json(self.artefacts.local(paths.REPORTS / "bags.json", Path(folder)))

    @property
    def root(self) -> Path:
        """The folder of the image files or shards."""
        return Path(images_folder(str(self.artefacts.folder / (self.artefacts.dataset.get("root") or "."))))

    @cached_property
    def pictures(self) -> Pictures:
        """The images, opened row by row."""
        root, follow_links = str(self.root), self.artefacts.dataset.get("follow_links") is True

        def open_image(path: str) -> BinaryIO:
            return self.artefacts.open_image(path_inside(root, path, follow_links))

        return Pictures(
            self.artefacts.store(paths.IMAGES), self.artefacts.title(paths.IMAGES), self.listing.fingerprint,
            lambda key: self.artefacts.open(paths.IMAGES / key), open_image, self.listing.gray_bits,
        )  # fmt: skip

    @property
    def title(self) -> str:
        """How the bags were made: name, method and its main parameter."""
        index = self.index
        clusters = f", {index.attrs['clusters']} clusters" if index.method == "kmeans" and "clusters" in index.attrs else ""
        lists = f", {index.attrs['probes']} of {index.attrs['lists']} lists" if "probes" in index.attrs else ""
        return f"{self.name} ({index.method}, k {index.k}{clusters}{lists})"

    def describe(self, row: int) -> str:
        """How the bag of a row was made; for clusters also how many rows can be drawn, including those that are not listed."""
        index = self.index
        cluster = index.cluster(row)
        if cluster is None:
            return f"{index.method}, k {index.k}"
        others = len(index.bag(row))
        word = "class" if index.method == "label" else "cluster"
        return f"{index.method}, {word} {cluster}: {others} other rows, the nearest {min(index.k, others)} listed"

    def row_of(self, target: str) -> int:
        """The train row given by a command's argument: a number is a row, anything else a path. Raises UserError for the path
        of a test image."""
        number = target.removeprefix("-")
        if number.isascii() and number.isdigit():
            return int(target)
        if (row := self.listing.row_of(target)) >= len(self):
            raise UserError(f"{printable(target)}: is a test image, which has no bag; find its neighbours with: bingo bags find FILE")
        return row

    def class_name(self, label: int) -> str:
        """The name of a class; `-` if the label is unknown."""
        return self.listing.classes[label] if 0 <= label < len(self.listing.classes) else "-"

    def tile(self, row: int, caption: str | None = None) -> Tile:
        """The picture of an anchor, with its class below it or another caption."""
        (path,), (label,) = self.listing.rows([row])
        name = self.class_name(int(label)) if self.listing.classes else ""
        return Tile(self.pictures.picture(row, path, PICTURE_PX), f"row {row}", caption or name)

    def member_tiles(self, members: np.ndarray, cosines: np.ndarray, anchor_label: int | None) -> list[Tile]:
        """Pictures of a bag, with similarity and class below, framed by whether the class is `anchor_label` (None: not framed)."""
        tiles, (listed_paths, labels) = [], self.listing.rows(members)
        for row, cosine, path, label in zip(members.tolist(), cosines.tolist(), listed_paths, labels.tolist(), strict=True):
            caption = f"{cosine:.3f}" + (f"  {self.class_name(label)}" if self.listing.classes else "")
            tiles.append(Tile(self.pictures.picture(row, path, PICTURE_PX), f"row {row}", caption, same_label(label, anchor_label)))
        return tiles


def same_label(label: int, anchor_label: int | None) -> bool | None:
    """Whether two labels are the same; None if one is unknown."""
    return None if anchor_label is None or anchor_label < 0 or label < 0 else label == anchor_label
