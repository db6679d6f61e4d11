"""The pixels of a listing: small images in memory, large ones as files that are decoded on every access.

No torch at the top: scans import this file. Shape letters: N rows of the listing, S side of a stored image, B rows asked for.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from bingo.images.listing import Listing
from bingo.images.positions import Positions, create_positions, read_positions
from bingo.params.places import images_folder
from bingo.runtime.artefacts import link_or_copy, new_directory
from bingo.runtime.chunks import chunk_is_written, forget_other_reads, open_array, open_group, seal
from bingo.runtime.errors import UserError
from bingo.runtime.inside import path_inside

if TYPE_CHECKING:
    import torch

    from bingo.params import DatasetParams

CHUNK_ROWS = 8192
PIXELS_PX = 16  # side to which the centre square of an image file is resized when raw pixels are compared with networks
_WAY_OUT = "dvc repro scan"


class MemoryImages:
    """All images as one uint8 array (N, S, S, 3)."""

    def __init__(self, images_NSS3: np.ndarray):
        self.images_NSS3 = images_NSS3
        self._on_device: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.images_NSS3)

    @property
    def side_px(self) -> int:
        """Height and width of every image."""
        return self.images_NSS3.shape[1]

    def on_device(self, device: "torch.device") -> "torch.Tensor":
        """The images as a uint8 tensor (N, S, S, 3) on `device`, to which they are copied once; on the CPU it shares their memory.

        Raises UserError if they do not fit on a GPU.
        """
        import torch

        if device not in self._on_device:
            try:
                self._on_device[device] = torch.from_numpy(self.images_NSS3).to(device)
            except torch.cuda.OutOfMemoryError:
                need = f"{len(self)} images need {self.images_NSS3.nbytes / 2**30:.1f} GiB of GPU memory, more than is free"
                way_out = "lower dataset.store_px, or set it to null: files are then decoded on access"
                raise UserError(f"dataset.store_px = {self.side_px}: {need}; {way_out}") from None
        return self._on_device[device]


class FileImages:
    """N image files, decoded on every access by the loader's workers: `paths` in the folder `root`, or, with `positions`, parts of large
    files in it; `follow_links`: links may lead out of it.

    `gray_bits` is as in a Listing; `jpeg_decoder` (cpu or gpu) decodes JPEG files for random views.
    """

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        follow_links: bool = False,
        gray_bits: int | None = None,
        jpeg_decoder: str = "cpu",
        positions: Positions | None = None,
    ):
        self.root = root
        self.positions = positions
        self.paths = paths
        self.follow_links = follow_links
        self.gray_bits = gray_bits
        self.jpeg_decoder = jpeg_decoder

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, rows_n: Sequence[int]) -> "FileImages":
        """Some of the images; small when it is pickled."""
        positions = self.positions and self.positions.part(rows_n)
        paths = [self.paths[row] for row in rows_n]
        return FileImages(self.root, paths, self.follow_links, self.gray_bits, self.jpeg_decoder, positions)

    def read(self, row: int) -> bytes:
        """The bytes of a row's file. Raises OSError, whose strerror is the reason in one line."""
        if self.positions is not None:
            return self.positions.read(self.root, row, self.follow_links)
        return path_inside(self.root, self.paths[row], self.follow_links).read_bytes()

    def read_start(self, row: int, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a row's file, and its length in bytes. Raises OSError as `read` does."""
        if self.positions is not None:
            return self.positions.read(self.root, row, self.follow_links, count), int(self.positions.positions_N3[row, 2])
        with path_inside(self.root, self.paths[row], self.follow_links).open("rb") as file:
            return file.read(count), os.fstat(file.fileno()).st_size


Images = MemoryImages | FileImages


def write_images(path: Path | str, listing: Listing, images: np.ndarray | Positions | None, pack: Path | None = None) -> None:
    """Write the zarr group of a listing's images: their pixels, uint8 (N, S, S, 3), or the positions of files that are decoded on access;
    None for the files of a folder, for which the group is empty. The files of positions `in_store`, which are in the folder `pack`, are
    linked into it, or copied if it is on another disk."""
    images_NSS3 = images if isinstance(images, np.ndarray) else np.zeros((0, 0, 0, 3), np.uint8)
    chunk_rows = min(CHUNK_ROWS, max(1, len(images_NSS3)))  # a chunk is stored in full size
    with new_directory(path) as folder:
        group = zarr.create_group(folder, zarr_format=3, attributes={"listing": listing.fingerprint})
        array = group.create_array(
            "images",
            shape=images_NSS3.shape,
            chunks=(chunk_rows, *(max(1, side) for side in images_NSS3.shape[1:])),
            dtype="uint8",
            filters=None,
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},  # including black images, so that a missing chunk is an error and not black
        )
        positions = create_positions(group, images) if isinstance(images, Positions) else None
        seal(folder, group)
        if positions is not None and isinstance(images, Positions):
            positions[:] = images.positions_N3
            for file in images.files if pack is not None else []:
                (folder / file).parent.mkdir(exist_ok=True)
                link_or_copy(f"{pack}/{file}", f"{folder}/{file}")
        if len(images_NSS3):
            array[:] = images_NSS3


def open_images(listing: Listing, images_zarr: Path | str, dataset: "DatasetParams | None") -> Images:
    """Open the images of `listing`: in memory if `images_zarr` contains them, otherwise as the files in `dataset.root`, or at the positions
    stored in `images_zarr`. `dataset` is that section of the parameters.

    Raises UserError if the store is absent, damaged or another listing's, and if files are needed but there is no `root`.

    >>> from bingo import load_params, open_images, read_listing
    >>> images = open_images(read_listing("data/listing.parquet"), "data/images.zarr", load_params().dataset)
    >>> images.images_NSS3.shape, images.images_NSS3.dtype.name
    ((500, 16, 16, 3), 'uint8')
    """
    name = str(images_zarr)
    group = open_group(images_zarr, name, _WAY_OUT)
    if (owner := group.attrs.get("listing")) != listing.fingerprint:
        raise UserError(f"{name}: was made from listing {owner}, this run reads listing {listing.fingerprint}; run: {_WAY_OUT}")
    array = open_array(group, "images", name, np.uint8, 4, _WAY_OUT)
    if array.shape[0] == len(listing):
        return MemoryImages(_read_whole(Path(images_zarr), array))
    if array.shape[0]:
        raise UserError(f"{name}: holds {array.shape[0]} images for {len(listing)} rows; delete it and run: {_WAY_OUT}")
    positions = read_positions(group, name, _WAY_OUT)
    if positions is not None and len(positions) != len(listing):
        raise UserError(f"{name}: holds positions of {len(positions)} images for {len(listing)} rows; delete it and run: {_WAY_OUT}")
    jpeg_decoder = dataset.jpeg_decoder if dataset is not None else "cpu"
    if positions is not None and positions.in_store:
        for file, file_bytes in zip(positions.files, positions.file_bytes, strict=True):
            if not (place := Path(images_zarr, file)).is_file() or place.stat().st_size != file_bytes:
                raise UserError(f"{name}: {file} is missing or cut off; delete {name} and run: {_WAY_OUT}")
        # DVC may have made links of its files
        return FileImages(str(Path(name).absolute()), listing.paths, True, listing.gray_bits, jpeg_decoder, positions)
    if dataset is None or dataset.root is None:
        raise UserError("dataset.root = null: the images are files to be decoded; set dataset.root to their folder")
    root = dataset.root if positions is None else images_folder(dataset.root)
    return FileImages(str(Path(root).absolute()), listing.paths, dataset.follow_links, listing.gray_bits, jpeg_decoder, positions)


def _read_whole(path: Path, array: zarr.Array) -> np.ndarray:
    chunks = -(-array.shape[0] // array.chunks[0])
    if absent := [chunk for chunk in range(chunks) if not chunk_is_written(path, array, chunk)]:
        raise UserError(f"{path}: chunk {absent[0]} is missing or cut off; delete it and run: {_WAY_OUT}")
    try:
        return np.asarray(array[:])
    except (ValueError, OSError) as error:
        forget_other_reads()
        raise UserError(f"{path}: is damaged ({' '.join(str(error).split())}); delete it and run: {_WAY_OUT}") from None
