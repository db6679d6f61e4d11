"""Build a gallery: the page, its data, and the sheets of thumbnails, in one folder that can be copied anywhere."""

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bingo.bags.index import Bags
from bingo.browse.gallery.sidecars import write_sidecars
from bingo.browse.gallery.sprites import make_sprites, sampled_anchors, sprite_format
from bingo.browse.listing_rows import ListingRows
from bingo.browse.pictures import Pictures
from bingo.runtime.artefacts import fingerprint, link_or_copy, new_directory, read_json, write_json
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar

_STATIC = Path(__file__).parent / "static"
_OWN_FILE = "made_from.json"


def build_gallery(out: Path, cache: Path, bags: Bags, listing: ListingRows, pictures: Pictures, meta: dict[str, Any]) -> int:
    """Write the gallery to `out`, replacing an older one; return the number of thumbnails that could not be made.

    `cache` keeps thumbnails between galleries, a folder for each listing and sample.
    Raises UserError if `out` holds anything but a gallery.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / _OWN_FILE).is_file():
        raise UserError(f"--out = {out}: contains files that do not belong to a gallery; give a new or empty folder, or that of a gallery")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out = {out}: is a file; give a folder")
    anchors, form = sampled_anchors(bags.members_TK, pictures), sprite_format(pictures)
    rows_S, name = np.arange(len(bags.members_TK)), f"{listing.fingerprint}-{form.px}-{form.suffix}"
    if anchors is not None:
        rows_S = np.unique(np.append(anchors, bags.members_TK[anchors]).clip(0))
        name += f"-{hashlib.sha256(rows_S.tobytes()).hexdigest()[:8]}"
    sprites = cache / name
    unreadable = make_sprites(sprites, pictures, listing, rows_S, form)
    with progress_bar("writing the gallery"), new_directory(out) as partial:
        for file in sorted(_STATIC.iterdir()):
            shutil.copyfile(file, partial / file.name)
        (partial / "data").mkdir()
        (partial / "thumbnails").mkdir()
        sample = {} if anchors is None else {"sample": anchors, "thumbnails": rows_S}
        write_sidecars(partial / "data", meta | {"sprites": asdict(form)}, bags, listing, sample)
        for file in sorted(sprites.glob(f"s*.{form.suffix}")):
            link_or_copy(str(file), str(partial / "thumbnails" / file.name))
        # if images are missing, the next call tries again
        write_json(partial / _OWN_FILE, None if unreadable else made_from(meta))
    return unreadable


def made_from(meta: dict[str, Any]) -> str:
    """What a gallery is made from: the index as described in `meta`, and the files of the page."""
    page = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(_STATIC.iterdir())}
    return fingerprint({"meta": meta, "page": page})


def is_current(out: Path, meta: dict[str, Any]) -> bool:
    """Whether `out` already holds the complete gallery that `build_gallery` would write."""
    return (out / _OWN_FILE).is_file() and read_json(out / _OWN_FILE) == made_from(meta)
