"""One photograph as JPEG files of every kind that decoders treat differently."""

from pathlib import Path

import numpy as np
from PIL import Image

BASELINE = 6  # the first files are baseline JPEGs, upright, in YCbCr or grey


def photographs(folder: Path) -> list[str]:
    """Write the files, and return their names."""
    photo = Image.fromarray(np.random.default_rng(3).integers(0, 256, (12, 15, 3), np.uint8)).resize((75, 60))
    exif, turned = Image.Exif(), Image.Exif()
    exif[0x0112], turned[0x0112] = 1, 6
    files = {
        "420.jpg": (photo, {"subsampling": "4:2:0"}),
        "422.jpg": (photo, {"subsampling": "4:2:2"}),
        "444.jpg": (photo, {"subsampling": "4:4:4"}),
        "grey.jpg": (photo.convert("L"), {}),
        "exif.jpg": (photo, {"exif": exif}),
        "restarts.jpg": (photo, {"restart_marker_blocks": 2}),
        "progressive.jpg": (photo, {"progressive": True}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "turned.jpg": (photo, {"exif": turned}),
        "stored-as-rgb.jpg": (photo, {"keep_rgb": True}),
        "large.jpg": (photo.resize((600, 600)), {"quality": 95}),
        "photo.png": (photo, {}),
        "png-in-disguise.jpg": (photo, {"format": "PNG"}),
    }
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
    (folder / "bytes-behind.jpg").write_bytes((folder / "420.jpg").read_bytes() + b"behind")
    return [*files, "bytes-behind.jpg"]
