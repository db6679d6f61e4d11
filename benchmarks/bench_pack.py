"""Effect of packing photographs (dataset.pack_px) on the pixels of views and on a teacher's features.

    python -m benchmarks.bench_pack FOLDER models/teacher.safetensors      FOLDER: train/CLASS/*.jpg and val/CLASS/*.jpg

Printed for each --pack-px: kB per image; the difference of views from those of the originals in levels of 255, mean and 99th percentile
over all pixels, for centre views and for random views (whose boxes are also rounded to other whole pixels); the cosine between features of
centre views and those of the originals; how many of the 10 nearest train images of other classes stay the same, for each test image; and
k-NN accuracy (k = 1, 5). For comparison, the last line gives the originals with bicubic instead of bilinear resizing. Crops: 4 of 8 small
crops of each train image must be matched to their image by their nearest feature among the other 4 of all images; in percent, with the same
crops from the originals and from the pack, repeated with other crops: mean and standard deviation, also of the difference between pack and
originals.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_extract import CASES
from benchmarks.bench_loader import packed_images
from benchmarks.parser import Parser
from bingo.bags.neighbors import top_k
from bingo.datasets.finding import find
from bingo.evals.features import backbone_features
from bingo.evals.knn import knn_accuracies
from bingo.images.augment import to_unit
from bingo.images.colours import normalize
from bingo.images.decoding import DecodePlan, FileDecoder
from bingo.images.draws import draw_views
from bingo.images.images import FileImages
from bingo.params import BicubicImageParams, ImageParams
from bingo.teachers.teacher import Teacher, load_teacher

VIEWS = 3
NEIGHBOURS = 10
CROPS, CROP_SCALE, TURNS = 8, [0.05, 0.2], 4  # crops per image; share of the image's area; repeats


def views_of(images: FileImages, image: ImageParams, views: int, scale: list[float] | None = None, turn: int = 0) -> np.ndarray:
    """Random views of all images, without colours, or centre views if `views` is 0: int16 (N * max(1, V), P, P, 3). `scale`: shares of the
    image's area."""
    rows_T = np.repeat(np.arange(len(images)), max(1, views))
    view_T = np.tile(np.arange(max(1, views)), len(images))
    augment = CASES["large"].augment.model_copy(update={"crop_scale": scale} if scale else {})
    crops = draw_views(augment, 0, "anchor", turn, rows_T, view_T)[0] if views else None
    ((_, tasks, (places_T,)),) = FileDecoder(images, 0, pin=False).batches([DecodePlan(rows_T, crops, [image])])
    return torch.cat([task.on(torch.device("cpu"))[0] for task in tasks])[torch.from_numpy(places_T)].numpy().astype(np.int16)


def levels(found: np.ndarray, original: np.ndarray) -> str:
    """Mean and 99th percentile of the absolute difference."""
    difference = np.abs(found - original)
    return f"{difference.mean():.2f} / {np.percentile(difference, 99):.0f}"


def crops_found(teacher: Teacher, images: FileImages, image: ImageParams) -> np.ndarray:
    """Percentage of crops whose nearest crop is from the same image, for each repeat."""
    accuracies = []
    for turn in range(TURNS):
        crops_TPP3 = torch.from_numpy(views_of(images, image, CROPS, CROP_SCALE, turn).astype(np.uint8))
        x_TD = torch.cat([teacher.features(normalize(to_unit(crops_BPP3), image)) for crops_BPP3 in crops_TPP3.split(32)])
        x_NCD = x_TD.numpy().reshape(len(images), CROPS, -1)
        known, asked = (x_ND.reshape(-1, x_ND.shape[2]) for x_ND in np.split(x_NCD, 2, axis=1))
        labels_T = np.repeat(np.arange(len(images)), CROPS // 2)
        accuracies.append(knn_accuracies(known, labels_T, asked, labels_T, [1], 0.07)["knn_1"])
    return np.array(accuracies)


def mean(values: np.ndarray) -> str:
    """Mean and standard deviation."""
    return f"{values.mean():+.2f} ({values.std(ddof=1):.2f})"


class Judge:
    """Features of the teacher on one set of images, compared with features of the originals."""

    def __init__(self, teacher: Teacher, train_rows: int, labels_N: np.ndarray):
        self.teacher, self.train_rows, self.labels_N = teacher, train_rows, labels_N
        self.original_ND: np.ndarray | None = None

    def line(self, images: FileImages, image: ImageParams) -> str:
        """Cosine, kept neighbours and k-NN accuracy as one line; the first call is for the originals."""
        x_ND = backbone_features(self.teacher.backbone, images, np.arange(len(images)), image, torch.device("cpu"), "fp32", 32)
        x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
        self.original_ND = x_ND if self.original_ND is None else self.original_ND
        kept = np.mean([len(found & before) for found, before in zip(self.others(x_ND), self.others(self.original_ND), strict=True)])
        train, test = slice(self.train_rows), slice(self.train_rows, None)
        found = knn_accuracies(x_ND[train], self.labels_N[train], x_ND[test], self.labels_N[test], [1, 5], 0.07)
        cosines_N = (x_ND * self.original_ND).sum(axis=1)
        accuracies = f"{found['knn_1']:.1f}, {found['knn_5']:.1f} %"
        return f"cosine {cosines_N.mean():.4f} (least {cosines_N.min():.4f}), {kept:.2f} of {NEIGHBOURS} neighbours, k-NN {accuracies}"

    def others(self, x_ND: np.ndarray) -> list[set[int]]:
        """For each test image, the nearest train images of other classes."""
        train_labels_T, test_labels_Q = self.labels_N[: self.train_rows], self.labels_N[self.train_rows :]
        k = min(self.train_rows, NEIGHBOURS + int(np.bincount(train_labels_T).max()))
        rows_QK = top_k(x_ND[self.train_rows :], x_ND[: self.train_rows], k)[0]
        return [
            set(rows_K[train_labels_T[rows_K] != label][:NEIGHBOURS].tolist()) for rows_K, label in zip(rows_QK, test_labels_Q, strict=True)
        ]


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.set_num_threads(1)
    found, teacher = find("folder", options.folder, True, (None, None), print), load_teacher(options.teacher)
    names = [split.classes[label] for split in (found.train, found.test) for label in split.labels_N]
    labels_N = np.unique(names, return_inverse=True)[1]
    images, judge = found.files([*found.train.paths, *found.test.paths]), Judge(teacher, len(found.train.paths), labels_N)
    image = ImageParams(**{key: getattr(teacher.image, key) for key in ImageParams.model_fields})
    centre, random = views_of(images, image, 0), views_of(images, image, VIEWS)
    train_rows = range(len(found.train.paths))
    crops = crops_found(teacher, images.part(train_rows), image)
    print(f"{len(found.train.paths)} train and {len(found.test.paths)} test images, views of {image.crop_px} of {image.resize_px} px")
    print(f"    originals: {kilobytes(images):.0f} kB; {judge.line(images, image)}; crops {mean(crops)} %", flush=True)
    for pack_px in options.pack_px:
        with tempfile.TemporaryDirectory() as folder:
            packed = packed_images(images, pack_px, Path(folder))
            pixels = f"centre {levels(views_of(packed, image, 0), centre)}, random {levels(views_of(packed, image, VIEWS), random)}"
            now = crops_found(teacher, packed.part(train_rows), image)
            found_again = f"crops {mean(now)} %, difference {mean(now - crops)}"
            print(f"    pack, {pack_px} px: {kilobytes(packed):.0f} kB; {pixels}; {judge.line(packed, image)}; {found_again}", flush=True)
    bicubic = BicubicImageParams(**image.model_dump())
    print(f"    originals, bicubic: centre {levels(views_of(images, bicubic, 0), centre)}; {judge.line(images, bicubic)}")


def kilobytes(images: FileImages) -> float:
    """Mean size of a file in kB."""
    return sum(len(images.read(row)) for row in range(len(images))) / len(images) / 1e3


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("teacher")
    parser.add_argument("--pack-px", nargs="+", type=int, default=[256, 320, 384])
    return parser.parse_args()


if __name__ == "__main__":
    main()
