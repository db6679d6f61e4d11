"""Mask R-CNN on a trained ResNet, built from torchvision's parts with detectron2's settings.

Heads (`SETTINGS`): `fpn`, a feature pyramid over the four stages (detectron2's mask_rcnn_R_50_FPN configs with RESNETS.NORM and
FPN.NORM SyncBN; ROI_BOX_HEAD.NORM concerns convolutions, and this box head has none), and `c4`, which passes regions of the third stage's
map through the network's own fourth stage and an additional BatchNorm (MoCo's coco_R_50_C4_2x, Res5ROIHeadsExtraNorm; basic blocks remain
basic blocks). Nothing is frozen, gradients are not clipped, and boxes are trained with plain L1 (SMOOTH_L1_BETA 0; torchvision's heads use
smooth L1 with 1/9).

Remaining differences from detectron2: RoIAlign does not shift by half a pixel (`aligned`; detectron2's Detectron1-Comparisons finds no
difference in AP); anchors are rounded to whole pixels; masks are learned from bitmaps at the resized image's resolution and not from
polygons; new layers have torchvision's initial weights; BatchNorm's statistics are not recomputed before the test (PRECISE_BN).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import ResNet as TorchvisionResNet
from torchvision.models.detection import roi_heads
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from bingo.images.uploads import channels
from bingo.runtime.errors import UserError

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_LEVELS = ["0", "1", "2", "3"]
_RATIOS = (0.5, 1.0, 2.0)
_BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class DetectorSettings:
    """Settings that differ between the two heads, and those that tests and benchmarks reduce. Top-k are numbers of proposals per image
    (before non-maximum suppression, per level), in training and test; `sampled_anchors` and `sampled_regions` are per image in training.
    """

    anchor_px: tuple[tuple[int, ...], ...]
    pre_nms_top: tuple[int, int]
    post_nms_top: tuple[int, int]
    sampled_anchors: int = 256
    sampled_regions: int = 512
    channels: int = 256
    hidden: int = 1024


SETTINGS = {
    "fpn": DetectorSettings(((32,), (64,), (128,), (256,), (512,)), (2000, 1000), (1000, 1000)),
    "c4": DetectorSettings(((32, 64, 128, 256, 512),), (12000, 6000), (2000, 1000)),
}


def build_detector(
    student: nn.Module,
    head: str,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed_value: int,
    settings: DetectorSettings | None = None,
) -> GeneralizedRCNN:
    """A detector for `classes` classes on `student` (on the CPU), whose stages it contains; new layers are seeded.

    In training it maps images (a list of float (3, H, W) in 0 to 1, already resized) and targets (`boxes`, `labels` from
    1, `masks`) to five losses, in eval mode images to `boxes`, `labels`, `scores` and `masks` float (I, 1, 28, 28 or 14, 14) relative to
    the box. `keep_sampling` must be called before each training step. `head` is a key of `SETTINGS`.
    Raises UserError as `check_student` does.
    """
    check_student(student)
    chosen = settings or SETTINGS[head]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_value)
        parts = _fpn(student, classes, chosen) if head == "fpn" else _c4(student, classes, chosen)
    backbone, rpn, regions = parts
    outlets: tuple[Any, ...] = (backbone, rpn.head, regions.box_predictor, regions.mask_predictor)
    for module in outlets:
        module.register_forward_hook(_in_float32)  # boxes need more than bf16's 8 bits; losses too
    return _Detector(backbone, rpn, regions, _AsTheyCome(0, 0, list(mean), list(std)))


def keep_sampling(detector: GeneralizedRCNN, seeds_B: Sequence[int]) -> None:
    """Set the seeds by which the next training step samples anchors and regions: one number for each image of the batch."""
    for part in (detector.rpn, detector.roi_heads):
        cast(Any, part).fg_bg_sampler.seeds_B = list(seeds_B)


def student_inside(detector: nn.Module) -> dict[str, Tensor]:
    """The student's weights and statistics in a detector of `build_detector`, with the student's parameter names."""
    state = detector.state_dict()
    body = "backbone.body." if any(name.startswith("backbone.body.") for name in state) else "backbone."
    places = {body: body, "roi_heads.box_head.layer4.": "roi_heads.box_head."}
    return {name.removeprefix(prefix): state[name] for start, prefix in places.items() for name in state if name.startswith(start)}


def check_student(student: nn.Module) -> None:
    """Raise UserError for a network that is not a ResNet of timm or torchvision, or has a stem for small images."""
    if not isinstance(student, TimmResNet | TorchvisionResNet):
        kind = type(student).__name__
        way_out = "set student.arch: resnet18, student.stem: imagenet, or another ResNet"
        raise UserError(f"student.arch: {kind} has no four stages that the detector knows; {way_out}")
    if isinstance(student.maxpool, nn.Identity):
        raise UserError("student.stem = small: its feature maps are too large for the images of COCO; set student.stem: imagenet")


def _stage_widths(student: nn.Module) -> list[int]:
    """The channels of the four stages' maps."""
    was_training, widths = student.training, []
    with torch.no_grad():
        x = torch.zeros(1, 3, 64, 64)
        for name, child in student.eval().named_children():
            x = child(x)
            if name in _STAGES:
                widths.append(x.shape[1])
            if name == _STAGES[-1]:
                break
    student.train(was_training)
    return widths


def _fpn(student: nn.Module, classes: int, chosen: DetectorSettings) -> tuple[nn.Module, RegionProposalNetwork, nn.Module]:
    levels = dict(zip(_STAGES, _LEVELS, strict=True))
    backbone = BackboneWithFPN(student, levels, _stage_widths(student), chosen.channels, norm_layer=nn.BatchNorm2d)
    box_pool, mask_pool = MultiScaleRoIAlign(_LEVELS, 7, 0), MultiScaleRoIAlign(_LEVELS, 14, 0)
    regions = Regions(
        box_pool, TwoMLPHead(chosen.channels * 7 * 7, chosen.hidden), FastRCNNPredictor(chosen.hidden, classes + 1),
        **_region_settings(chosen), mask_roi_pool=mask_pool, mask_head=MaskRCNNHeads(chosen.channels, (chosen.channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(chosen.channels, chosen.channels, classes + 1),
    )  # fmt: skip
    regions.fg_bg_sampler = _SeededSampler(chosen.sampled_regions, 0.25)
    return backbone, _proposals(chosen.channels, chosen), regions


def _c4(student: nn.Module, classes: int, chosen: DetectorSettings) -> tuple[nn.Module, RegionProposalNetwork, nn.Module]:
    *_, width_c4, width_c5 = _stage_widths(student)
    names = [name for name, _ in student.named_children()]
    backbone = nn.Sequential(OrderedDict((name, student.get_submodule(name)) for name in names[: names.index("layer4")]))
    res5 = nn.Sequential(OrderedDict(layer4=student.get_submodule("layer4"), norm=nn.BatchNorm2d(width_c5)))
    regions = Regions(
        MultiScaleRoIAlign(["0"], 14, 0), res5, _MapPredictor(width_c5, classes + 1), **_region_settings(chosen),
        mask_predictor=MaskRCNNPredictor(width_c5, chosen.channels, classes + 1),
    )  # fmt: skip
    regions.fg_bg_sampler = _SeededSampler(chosen.sampled_regions, 0.25)
    return backbone, _proposals(width_c4, chosen), regions


def _proposals(channels: int, chosen: DetectorSettings) -> RegionProposalNetwork:
    anchors = AnchorGenerator(chosen.anchor_px, (_RATIOS,) * len(chosen.anchor_px))
    before, after = ({"training": top[0], "testing": top[1]} for top in (chosen.pre_nms_top, chosen.post_nms_top))
    head = RPNHead(channels, anchors.num_anchors_per_location()[0])
    rpn = _Proposals(anchors, head, 0.7, 0.3, chosen.sampled_anchors, 0.5, before, after, 0.7)
    rpn.fg_bg_sampler = _SeededSampler(chosen.sampled_anchors, 0.5)
    return rpn


def _region_settings(chosen: DetectorSettings) -> dict[str, Any]:
    return {
        "fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "batch_size_per_image": chosen.sampled_regions, "positive_fraction": 0.25,
        "bbox_reg_weights": _BOX_WEIGHTS, "score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 100,
    }  # fmt: skip


def box_loss(deltas_R4: Tensor, wanted_R4: Tensor, regions: int) -> Tensor:
    """L1 of the foreground's box offsets, divided by the number of all sampled regions (detectron2, modeling/box_regression.py)."""
    return F.l1_loss(deltas_R4, wanted_R4, reduction="sum") / regions


class NumbersOnDevice(TorchFunctionMode):
    """Numbers of which torchvision makes a tensor at every call are filled in on the device, and lists of them are uploaded once: the
    upload of each would wait for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and isinstance(args[0], int | float):
            return torch.full((), *args, **kwargs)
        if func is torch.as_tensor and isinstance(args[0], list | tuple):
            return channels(tuple(args[0]), kwargs["device"])[:, 0, 0].to(kwargs["dtype"])
        if func is Tensor.to and args[0].dim() == 0 and args[0].device.type == "cpu" and isinstance(args[-1], Tensor) and len(args) == 2:
            return args[1].new_full((), args[0].item())
        return func(*args, **kwargs)


class _Detector(GeneralizedRCNN):
    """torchvision's, which reads the boxes of each image back from the device to check that none is empty: `training_targets` has none."""

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        with NumbersOnDevice():
            batch, targets = self.transform(images, targets)
            features = self.backbone(batch.tensors)
            if isinstance(features, Tensor):
                features = OrderedDict({"0": features})
            proposals, proposal_losses = self.rpn(batch, features, targets)
            detections, region_losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        return {**region_losses, **proposal_losses} if self.training else detections


class _Proposals(RegionProposalNetwork):
    """torchvision's region proposals with detectron2's losses: plain L1, divided by the number of anchors to be sampled."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and boxes; all anchors of all images concatenated, with labels 1, 0 and -1 (neither)."""
        positive, negative = map(torch.cat, self.fg_bg_sampler(labels))
        sampled, positive = torch.where(positive | negative)[0], torch.where(positive)[0]
        number = self.fg_bg_sampler.batch_size_per_image * len(labels)
        scores, truth = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        score_loss = F.binary_cross_entropy_with_logits(scores, truth, reduction="sum") / number
        return score_loss, box_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], number)


class _MapPredictor(FastRCNNPredictor):
    """Classes and boxes from the mean of a region's map (R, C, 7, 7)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.mean(dim=(2, 3)))


class Regions(roi_heads.RoIHeads):
    """Region heads of both kinds, with plain L1 for boxes. Without a mask head (C4) boxes and masks share the output of the fourth stage
    for a region: in training the mask branch uses the foreground rows of the same maps, as in detectron2's Res5ROIHeads, so
    BatchNorm sees each region once.
    """

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]], targets: Any = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in eval mode, losses in training, as in torchvision's RoIHeads."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        maps = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        boxes, scores, labels = self.postprocess_detections(*self.box_predictor(maps), proposals, image_shapes)
        masks = roi_heads.maskrcnn_inference(self.mask_predictor(self._mask_maps(features, boxes, image_shapes)), labels)
        found = zip(boxes, labels, scores, masks, strict=True)
        return [dict(zip(("boxes", "labels", "scores", "masks"), of_image, strict=True)) for of_image in found], {}

    def _losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]], targets: Any
    ) -> dict[str, Tensor]:
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        maps = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(maps)
        labels_R = torch.cat(labels)
        front = torch.where(labels_R > 0)[0]
        own_deltas_R4 = deltas.unflatten(1, (-1, 4))[front, labels_R[front]]
        kept = [torch.where(of_image > 0)[0] for of_image in labels]
        boxes = [of_image[keep] for of_image, keep in zip(proposals, kept, strict=True)]
        mask_maps = maps[front] if self.mask_head is None else self._mask_maps(features, boxes, image_shapes)
        mask_loss = roi_heads.maskrcnn_loss(
            self.mask_predictor(mask_maps), boxes, [target["masks"] for target in targets], [target["labels"] for target in targets],
            [of_image[keep] for of_image, keep in zip(matched, kept, strict=True)],
        )  # fmt: skip
        return {
            "loss_classifier": F.cross_entropy(logits, labels_R),
            "loss_box_reg": box_loss(own_deltas_R4, torch.cat(wanted)[front], len(labels_R)),
            "loss_mask": mask_loss,
        }

    def _mask_maps(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """The input of the mask predictor for boxes."""
        if self.mask_head is None:
            return self.box_head(self.box_roi_pool(features, boxes, image_shapes))
        return self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))


class _SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler with a separate seed for each image, so that a step does not depend on earlier draws.

    It also does not depend on which process an image is in; torchvision's sampler draws from the global generator.
    """

    seeds_B: list[int]

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = [], []
        for labels, seed in zip(matched_idxs, self.seeds_B, strict=True):
            with torch.random.fork_rng(devices=[labels.device] if labels.is_cuda else []):
                torch.manual_seed(seed)
                of_image = super().__call__([labels])
            positive += of_image[0]
            negative += of_image[1]
        return positive, negative


class _AsTheyCome(GeneralizedRCNNTransform):
    """Normalises and pads: images are already resized."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


def _in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: the output's tensors in float32, undoing autocast."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return OrderedDict((name, value.float()) for name, value in output.items())
    return type(output)(_in_float32(module, inputs, part) for part in output)
