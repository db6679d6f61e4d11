"""Find the images of a dataset that consists of files: a folder, tar shards, or a saved dataset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bingo.datasets.layout import Say, Split, find_splits
from bingo.images.decode import SUFFIXES
from bingo.images.images import FileImages
from bingo.params.places import images_folder


@dataclass(frozen=True)
class Found:
    """The two splits, and the images of any of their paths."""

    train: Split
    test: Split
    files: Callable[[Sequence[str]], FileImages]


def find(source: str, root: str, follow_links: bool, columns: tuple[str | None, str | None], say: Say, name: str = "dataset.root") -> Found:
    """The images of a source that consists of files; `columns` are the image and label columns of a saved dataset. `say` is called with a
    line for everything that is assumed or skipped; messages call the root `name`.

    Raises UserError for all errors in the layout; no image is read.
    """
    if source == "folder":
        train, test = find_splits(Path(root), follow_links, say, name)
        return Found(train, test, lambda paths: FileImages(root, paths, follow_links=True))  # links were checked by `find_splits`
    if source == "webdataset":
        from bingo.datasets.shards import read_shards

        members = read_shards(root, follow_links, name)
    else:
        from bingo.datasets.saved import read_saved

        members = read_saved(root, follow_links, columns, name, say)
    train, test = find_splits(Path(root), follow_links, say, name, members)
    rows, positions = members.rows, members.positions  # and not the paths of all members

    def files(paths: Sequence[str]) -> FileImages:
        return FileImages(images_folder(root), paths, follow_links, positions=positions.part(rows.of(paths)))

    return Found(train, test, files)


def source_of(root: str) -> str:
    """The source of a folder or a pattern: shards or a saved dataset if it contains such files and no images, otherwise a folder."""
    if not Path(root).is_dir():
        return "webdataset" if root.endswith((".tar", "}")) or set(root) & set("{*?") else "folder"
    sources = {"webdataset": (".tar",), "huggingface": (".arrow", ".parquet")}
    found = {path.suffix for depth in ("*", "*/*") for path in Path(root).glob(depth)}
    source = next((source for source, suffixes in sources.items() if found.intersection(suffixes)), "folder")
    is_folder = source != "folder" and any(path.name.lower().endswith(SUFFIXES) for path in Path(root).rglob("*"))
    return "folder" if is_folder else source
