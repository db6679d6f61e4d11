"""A synthetic COCO dataset: rectangles and triangles in the colour of their category, category ids with gaps, a crowd, an empty image."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = [3, 7, 90]
COLORS = {3: (220, 40, 40), 7: (40, 220, 40), 90: (60, 60, 230)}


def make_split(root: Path, name: str, images: int, seed: int, empty: tuple[int, ...] = ()) -> dict:
    """Write ROOT/NAME/*.png and ROOT/annotations/instances_NAME.json with two instances in each image, or none in images listed in
    `empty`."""
    random = np.random.default_rng(seed)
    content: dict = {"info": {}, "images": [], "annotations": [], "categories": [{"id": c, "name": f"c{c}"} for c in CATEGORIES]}
    (root / name).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for number in range(images):
        height, width = (72, 96) if number % 2 else (108, 81)
        picture = Image.fromarray(random.integers(0, 60, (height, width, 3), dtype=np.uint8))
        image_id = 1000 - 7 * number  # ids that neither start at 0 nor increase
        for half in range(0 if number in empty else 2):
            category = int(random.choice(CATEGORIES))
            add_instance(content, picture, image_id, category, half, random)
        picture.save(root / name / f"{number}.png")
        content["images"].append({"id": image_id, "file_name": f"{number}.png", "height": height, "width": width, "license": 1})
    write(root, name, content)
    return content


def add_instance(content: dict, picture: Image.Image, image_id: int, category: int, half: int, random: np.random.Generator) -> None:
    """Draw one instance into the upper or lower half: a rectangle, or for category 7 a triangle."""
    width, height = picture.width, picture.height // 2
    x0, x1 = int(random.integers(1, width // 3)), int(random.integers(width // 2, width - 1))
    y0, y1 = half * height + int(random.integers(1, height // 3)), half * height + int(random.integers(2 * height // 3, height - 1))
    corners = [(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)] if category == 7 else [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    ImageDraw.Draw(picture).polygon(corners, fill=COLORS[category])
    area = (x1 - x0) * (y1 - y0) / (2 if category == 7 else 1)
    content["annotations"].append(
        {
            "id": len(content["annotations"]),  # starts at 0, which some evaluators misread
            "image_id": image_id,
            "category_id": category,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": area,
            "iscrowd": 0,
            "segmentation": [[float(x) for corner in corners for x in corner]],
        }
    )


def crowd(image: dict, category: int, left_px: int) -> dict:
    """An annotation of a crowd that fills an image's left columns, as run lengths down the columns."""
    height, width = image["height"], image["width"]
    counts = [0, left_px * height, (width - left_px) * height]
    box = [0, 0, left_px, height]
    segmentation = {"counts": counts, "size": [height, width]}
    return {"id": 99999, "image_id": image["id"], "category_id": category, "bbox": box, "area": left_px * height, "iscrowd": 1} | {
        "segmentation": segmentation
    }


def write(root: Path, name: str, content: object) -> None:
    """Write a split's annotations."""
    (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
