"""Compute a detector's detections on COCO's images, and the average precision of boxes and masks with faster-coco-eval.

Its results equal those of pycocotools (to 2e-16, on real instances), which causes warnings with NumPy 2 and is no longer maintained.
Each image is a separate batch in eval mode, so the detections do not depend on the number of processes.
"""

from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from bingo.detection.coco import Instances, has_box
from bingo.detection.loader import CocoLoader, Example, View
from bingo.detection.loop import compiled_roi_align
from bingo.nets.precision import autocast
from bingo.params import CocoParams
from bingo.runtime import distributed
from bingo.runtime.progress import progress_bar

MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # the first six of the evaluator's stats, in its order
MASK_THRESHOLD = 0.5
Scores = dict[str, dict[str, float | None]]


def detect(
    detector: GeneralizedRCNN, found: Instances, params: CocoParams, device: torch.device, label: str, workers: int | None = None
) -> list[dict[str, Any]]:
    """The detections in all images of `found`, in the order of the images, on every process; each process computes its share.

    A detection has image_id, category_id, score, bbox (x, y, width, height in pixels of the file) and segmentation (run lengths).
    """
    rows = range(distributed.rank(), len(found.images), distributed.world())
    views = (View(row, params.test_min_side_px, params.max_side_px) for row in rows)
    by_row = []
    detector.eval()
    with progress_bar(label + distributed.share(), len(rows), "images") as bar, compiled_roi_align(device), torch.inference_mode():
        for example in CocoLoader(found.images, None, device, workers).examples(views):
            with autocast(params.precision, device):
                (seen,) = detector([example.image_3HW.float() / 255])
            by_row.append((example.row, _detections(seen, example, found)))
            bar.advance()
    gathered = sorted(distributed.gather_objects(by_row), key=lambda item: item[0])
    return [detection for _, of_image in gathered for detection in of_image]


def _detections(seen: dict[str, Tensor], example: Example, found: Instances) -> list[dict[str, Any]]:
    """One image's detections in the frame of its file. They come to the host first, because pasting reads each box."""
    seen = {name: value.cpu() for name, value in seen.items()}
    height, width = found.images.sides_px(example.row)
    boxes_I4 = resize_boxes(seen["boxes"], list(example.image_3HW.shape[-2:]), [height, width])
    masks_IHW = paste_masks_in_image(seen["masks"], boxes_I4, (height, width))[:, 0] >= MASK_THRESHOLD
    lengths = rle.encode(np.asfortranarray(masks_IHW.numpy().transpose(1, 2, 0).astype(np.uint8)))
    boxes_I4[:, 2:] -= boxes_I4[:, :2].clone()
    shared = {"image_id": found.images.entries[example.row]["id"]}
    rows = zip(seen["labels"].tolist(), seen["scores"].tolist(), boxes_I4.tolist(), lengths, strict=True)
    return [
        {**shared, "category_id": found.category_ids[label - 1], "score": score, "bbox": box, "segmentation": segmentation}
        for label, score, box, segmentation in rows
    ]


@progress_bar("average precision")
def coco_scores(found: Instances, detections: list[dict[str, Any]]) -> Scores:
    """{"box": .., "mask": ..}, each with the MEASURES in percent; None if no instance is of that size (small, medium, large).

    Crowds are marked as such: detections in them count neither for nor against. An instance without a box inside the image does not
    count for boxes, and an instance whose segmentation covers no pixel does not count for masks.
    """
    # Renumbered: an instance whose id is 0 would count as not matched.
    truth = [annotation | {"id": number} for number, annotation in enumerate(found.annotations, 1)]
    sides = {image["id"]: (image["height"], image["width"]) for image in found.images.entries}
    truths = {
        "box": [one for one in truth if has_box(one, *sides[one["image_id"]])],
        "mask": [one for one in truth if one["segmentation"] is not None],
    }
    kinds = {"box": ("bbox", "segmentation"), "mask": ("segm", "bbox")}  # the size of a mask is its own area, so its box is left out
    scores = {}
    for name, (kind, left_out) in kinds.items():
        results = [{key: value for key, value in one.items() if key != left_out} for one in detections]
        reference = _index(found, truths[name])
        evaluation = COCOeval_faster(reference, reference.loadRes(results) if results else _index(found, []), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        figures = [float(figure) for figure in evaluation.stats[: len(MEASURES)]]
        scores[name] = {measure: None if figure < 0 else round(100 * figure, 4) for measure, figure in zip(MEASURES, figures, strict=True)}
    return scores


def _index(found: Instances, annotations: list[dict[str, Any]]) -> COCO:
    """The evaluator's index of annotations on the images of `found`; it modifies copies."""
    categories = [{"id": category} for category in found.category_ids]
    return COCO({"images": found.images.entries, "categories": categories, "annotations": [dict(one) for one in annotations]})
