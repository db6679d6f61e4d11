"""bingo bags show | stats | diff | find | gallery | export: look into the bags of the workspace, or of any revision or DVC experiment.

bingo bags show 5            one bag as a table and a picture: one row group and one chunk are read, not the index
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bingo import paths
from bingo.pipeline.commands import as_seen_from_here, check_output, check_place, from_here

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from bingo.browse.diff import BagDiff
    from bingo.browse.sheets import Tile
    from bingo.cli.browse_source import BagSource

app = typer.Typer(no_args_is_help=True, add_completion=False)
_SHEETS, _GALLERY, _THUMBNAILS = Path(".bingo/sheets"), Path(".bingo/gallery"), Path(".bingo/thumbnails")
Rev = Annotated[str | None, typer.Option(help="A Git revision or DVC experiment; by default the workspace.")]
Out = Annotated[Path | None, typer.Option(help="The PNG to write; by default a file in .bingo/sheets.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
# -1 is a row that does not exist, and no option
_NEGATIVE_ROWS = {"ignore_unknown_options": True}


@app.command(context_settings=_NEGATIVE_ROWS)
def show(
    target: Annotated[str, typer.Argument(metavar="ROW|PATH", help="A row number or a path in the listing.")],
    rev: Rev = None,
    out: Out = None,
    force: Force = False,
) -> None:
    """Print one bag and draw it."""
    from bingo.cli.browse_source import BagSource
    from bingo.cli.browse_tables import members_table
    from bingo.runtime.errors import printable

    out = _checked(out, force)
    source = BagSource(rev)
    row = source.row_of(target)
    bag, (_, (label,)) = source[row], source.listing.rows([row])
    of_class = f"label {printable(bag.label)}  " if source.listing.classes else ""
    typer.echo(f"row {row}  {printable(bag.path)}  {of_class}({source.describe(row)})")
    typer.echo(members_table(source, bag.members, bag.similarity, label))
    _deliver(bag.picture(), out, _SHEETS / _file_name(f"bag-{row}", source))


@app.command()
def stats(rev: Rev = None) -> None:
    """Print purity, hubs, orphans, mutual neighbours, overlap of two views, near-duplicates and cluster sizes of all bags."""
    from bingo.cli.browse_source import BagSource
    from bingo.cli.browse_tables import stats_text

    source = BagSource(rev)
    typer.echo(stats_text(source, source.metrics))


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="REV1", help="A Git revision, a DVC experiment, or: workspace.")],
    after: Annotated[str, typer.Argument(metavar="REV2", help="The same.")],
    anchors: Annotated[int, typer.Option(min=1, max=200, help="Number of anchors to list and draw.")] = 8,
    out: Out = None,
    force: Force = False,
) -> None:
    """Compare the bags of two revisions: overlap, purity gained and lost, and the anchors that changed most."""
    from bingo.browse.diff import compare_bags
    from bingo.browse.sheets import side_by_side
    from bingo.cli.browse_source import BagSource
    from bingo.cli.browse_tables import diff_text
    from bingo.runtime.errors import UserError

    out = _checked(out, force)
    sources = BagSource(before), BagSource(after)
    listing, other = (source.listing for source in sources)
    if listing.fingerprint != other.fingerprint:  # their row numbers mean different images
        sizes = f"listing {listing.fingerprint[:8]} ({len(listing)} rows) and listing {other.fingerprint[:8]} ({len(other)} rows)"
        raise UserError(f"{before} and {after}: their bags are of {sizes}; only bags of one listing can be compared")
    found = compare_bags(sources[0].index.table, sources[1].index.table, listing.labels_N[: listing.train_rows])
    rows_R = found.most_changed(anchors)
    typer.echo(diff_text(sources, found, rows_R))
    sheet = side_by_side((sources[0].title, sources[1].title), [_band(sources, found, row) for row in rows_R.tolist()])
    _deliver(sheet, out, _SHEETS / _file_name("diff", *sources))


@app.command()
def find(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file, from the dataset or not.")],
    k: Annotated[int | None, typer.Option(min=1, help="Number of neighbours; by default as many as the bags list.")] = None,
    rev: Rev = None,
    out: Out = None,
    force: Force = False,
) -> None:
    """Print and draw the bag that an image outside the dataset would have, using the teacher."""
    from bingo.browse.pictures import file_picture
    from bingo.browse.sheets import Tile, contact_sheet
    from bingo.cli.browse_source import BagSource
    from bingo.cli.browse_tables import members_table
    from bingo.runtime.errors import printable

    out = _checked(out, force)
    picture = file_picture(file := from_here("IMAGE", image))
    source = BagSource(rev)
    members, cosines = _nearest(source, file, k or source.index.k)
    title = f"{image}: the {len(members)} nearest train rows of {source.listing.dataset}"
    typer.echo(printable(title))
    typer.echo(members_table(source, members, cosines, None))
    tiles = source.member_tiles(members, cosines, None)
    sheet = contact_sheet(f"{title}   ({source.name})", Tile(picture, image.name, "the image"), tiles)
    _deliver(sheet, out, _SHEETS / _file_name(f"find-{image.stem}", source))


@app.command()
def gallery(
    rev: Rev = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the page; by default .bingo/gallery.")] = None,
) -> None:
    """Write an offline page for searching, sorting and browsing all bags. It needs neither a server nor a network."""
    from bingo.browse.gallery.build import build_gallery, is_current
    from bingo.cli.browse_source import BagSource

    source = BagSource(rev)
    default = _GALLERY if source.artefacts.is_workspace else _GALLERY.with_name(f"gallery@{_tag(source)}")
    folder = from_here("--out", out) if out else default
    if out:
        check_place("--out", folder)
    index, listing = source.index, source.listing
    meta = {
        "title": f"{listing.dataset}: bags of {source.title}",
        "figures": f"{index.train_rows:,} anchors" + (f", {len(listing.classes)} classes" if listing.classes else ""),
        "method": index.method,
        "fingerprint": index.fingerprint,
        "listing": listing.fingerprint,
        "files": source.root.resolve().as_uri() if source.artefacts.dataset.get("source") == "folder" else None,
    }
    if not is_current(folder, meta):
        unreadable = build_gallery(folder, _THUMBNAILS, index.table, listing, source.pictures, meta)
        if unreadable:
            typer.echo(f"warning: {unreadable} images could not be read and are shown in grey; check dataset.root", err=True)
    typer.echo(f"gallery: {as_seen_from_here(folder / 'index.html')}")


@app.command()
def export(
    to: Annotated[Literal["parquet", "csv"], typer.Option(help="The format.")] = "parquet",
    features: Annotated[bool, typer.Option("--features", help="Add the teacher's features of each anchor (parquet only).")] = False,
    rev: Rev = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; by default bags.parquet or bags.csv.")] = None,
    force: Force = False,
) -> None:
    """Write all bags as a table for other programs, one row for each pair of an anchor and a member, nearest first."""
    from bingo.bags.index import read_bags
    from bingo.browse.pairs import write_pairs
    from bingo.cli.browse_source import BagSource
    from bingo.runtime.errors import UserError
    from bingo.runtime.progress import progress_bar

    if features and to == "csv":
        raise UserError("--features: CSV cannot hold lists of numbers; give --to parquet, or leave --features out")
    path = from_here("--out", out or Path(f"bags.{to}"))
    check_output("--out", path, [f".{to}"], force)
    source = BagSource(rev)
    stored = source.embeddings.features if features else None
    if features:
        of_features = source.embeddings.fingerprint
        read_bags(source.artefacts.store(paths.BAGS), source.listing, of_features, source.artefacts.title(paths.BAGS))
    with progress_bar("writing the bags", source.index.train_rows, "anchors") as bar:
        lines = write_pairs(path, source.index, source.listing, stored, bar.advance_to)
    typer.echo(f"written {as_seen_from_here(path)}: {lines:,} pairs of {source.index.train_rows:,} anchors, bags of {source.title}")


def _band(sources: "tuple[BagSource, BagSource]", found: "BagDiff", row: int) -> "tuple[Tile, list[Tile], list[Tile]]":
    """An anchor and its two bags; a member is marked as kept if it is in the other bag too."""
    from dataclasses import replace

    _, (label,) = sources[0].listing.rows([row])
    bags = [source.index.members(row) for source in sources]
    bands = []
    for source, members, other in zip(sources, bags, reversed(sources), strict=True):
        kept = set(other.index.bag(row).tolist())
        tiles = source.member_tiles(members, source.index.similarity(row), label)
        bands.append([replace(tile, kept=member in kept) for tile, member in zip(tiles, members.tolist(), strict=True)])
    caption = f"{sources[0].class_name(label)}  J {found.jaccard_T[row]:.2f}"
    return sources[0].tile(row, caption), bands[0], bands[1]


def _nearest(source: "BagSource", image: Path, k: int) -> "tuple[np.ndarray, np.ndarray]":
    """Train rows and cosines nearest to an image file, which is processed as in extraction: packed to the stored size if the dataset is,
    then cropped to the centre view. Raises UserError if the features are not this teacher's, or if the image's are all zeros."""
    import tempfile

    import numpy as np
    import torch

    from bingo.bags.neighbors import top_k
    from bingo.images.decode import decode_square
    from bingo.images.images import FileImages, Images, MemoryImages
    from bingo.images.loader import center_views
    from bingo.nets.precision import autocast
    from bingo.params import seen_image
    from bingo.pipeline.run import pick_device
    from bingo.runtime.artefacts import file_fingerprint
    from bingo.runtime.errors import UserError
    from bingo.teachers.teacher import load_teacher

    files, stored, device = source.artefacts, source.embeddings, pick_device()
    recipe, stored_px, gray_bits = stored.attrs["recipe"], source.pictures.stored_px, source.listing.gray_bits
    with tempfile.TemporaryDirectory() as folder:
        file = files.local(paths.TEACHER, Path(folder))
        if (fingerprint := file_fingerprint(file)) != stored.attrs["teacher"]:
            problem = f"was made by teacher {stored.attrs['teacher']}, {files.title(paths.TEACHER)} is {fingerprint}"
            raise UserError(f"{stored.name}: {problem}; run: dvc repro extract")
        teacher = load_teacher(file).to(device).to(memory_format=torch.channels_last)
    image = image.resolve()  # the user's own links may lead anywhere
    images: Images = FileImages(str(image.parent), [image.name], gray_bits=gray_bits)
    if stored_px:
        images = MemoryImages(np.stack([decode_square(image.read_bytes(), stored_px, stored_px, gray_bits=gray_bits)]))
    view_13PP = next(iter(center_views(images, [0], seen_image(recipe["image"]), device, 1, workers=0)))
    with torch.inference_mode(), autocast(recipe["extract"]["precision"], device):
        feature_1D = teacher.features(view_13PP)
    if not feature_1D.any():
        raise UserError(f"{image.name}: its features are all zeros, so no image is similar to it; give another image")
    (rows_K,), (cosines_K,) = top_k(feature_1D.cpu().numpy(), stored.train_features, k)
    return rows_K[rows_K >= 0], cosines_K[rows_K >= 0]


def _tag(source: "BagSource") -> str:
    """The revision's name, made safe for use in a file name."""
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in source.name)


def _file_name(stem: str, *sources: "BagSource") -> str:
    """`stem.png`, with the names of revisions after it."""
    tags = [_tag(source) for source in sources if len(sources) > 1 or not source.artefacts.is_workspace]
    return f"{'@'.join([stem, '..'.join(tags)]) if tags else stem}.png"


def _checked(out: Path | None, force: bool) -> Path | None:
    """The path of the picture. Raises UserError if it cannot be written there."""
    if out is not None:
        check_output("--out", out := from_here("--out", out), [".png"], force)
    return out


def _deliver(sheet: "Image", out: Path | None, default: Path) -> None:
    """Write the PNG to --out or the default path, and print the path."""
    import io

    from bingo.runtime.artefacts import write_bytes

    content = io.BytesIO()
    sheet.save(content, "png")
    write_bytes(out or default, content.getvalue())
    typer.echo(f"picture: {as_seen_from_here(out or default)}")
