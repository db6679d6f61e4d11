"""Train a classifier on labels: a linear layer on a backbone that is trained with it (fine-tuning) or frozen (linear evaluation).

Every train image is seen once an epoch, as a random crop; test images as centre views, after every epoch. SGD with momentum 0.9
or another optimizer, cross-entropy in float32, separate learning rates for the backbone and the layer, with drops or a cosine. Random
choices depend only on (seed, purpose, epoch, row): a run resumed from its checkpoint gives the same result as an uninterrupted run, on
the CPU bit by bit. Several processes share each batch and give the result of one process up to rounding: gradients are averaged over all
images, and if BatchNorm is trained (GPUs only) its statistics are those of the whole batch. Shape letters: B rows of a batch, N rows, C
classes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from bingo import seeds
from bingo.evals.features import backbone_features
from bingo.evals.scores import check_labels, last_and_best, linear_layer, percent, right_of, to_labels
from bingo.images.images import Images
from bingo.images.listing import Listing
from bingo.images.loader import Request, ViewLoader, center_views
from bingo.nets.backbones import Backbone
from bingo.nets.precision import autocast
from bingo.params import AugmentParams, CropsParams, ImageParams, Range, TuneParams
from bingo.runtime import distributed
from bingo.runtime.checkpoints import Checkpoints, Resumable
from bingo.runtime.errors import UserError
from bingo.runtime.finite import LossWatch
from bingo.runtime.progress import progress_bar
from bingo.schedules import make_optimizer, set_rates, update

FROZEN, WHOLE = "linear-crops", "finetune"  # purposes of bingo.seeds
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Task:
    """A classification task: images, their labels `labels_N`, the augmentation of the crops, and the size of views."""

    images: Images
    labels_N: np.ndarray
    train_rows_N: np.ndarray
    test_rows_N: np.ndarray
    classes: int
    image: ImageParams
    crops: AugmentParams


@dataclass(frozen=True)
class Protocol:
    """One evaluation protocol: the task and how it is trained; `trunk_lr` None means a linear layer on the frozen network."""

    task: Task
    tune: TuneParams
    head_lr: float
    trunk_lr: float | None


def random_crops(crop_scale: Range, flip_p: float) -> AugmentParams:
    """A weak augmentation: only a random crop with this share of the area, and a flip."""
    return AugmentParams(
        crop_scale=crop_scale,
        crop_ratio=[3 / 4, 4 / 3],
        rotate_degrees=0.0,
        jitter=[0.0, 0.0, 0.0, 0.0],
        jitter_p=0.0,
        gray_p=0.0,
        blur_p=0.0,
        blur_sigma_px=[0.1, 2.0],
        flip_p=flip_p,
    )


def task_of(listing: Listing, images: Images, image: ImageParams, crops: CropsParams, train_rows_N: np.ndarray | None = None) -> Task:
    """The task of a listing's labelled images: its train rows, or the given ones, with crops of this family, and its test rows."""
    learned = np.arange(listing.train_rows) if train_rows_N is None else train_rows_N
    return Task(
        images, listing.labels_N, learned, listing.test_rows_N, len(listing.classes), image, random_crops(crops.crop_scale, crops.flip_p)
    )


class Classifier(nn.Module):
    """A backbone and a linear layer: float (B, 3, P, P) to outputs (B, C). If frozen, the backbone is in evaluation mode, without
    gradient."""

    def __init__(self, backbone: nn.Module, layer: nn.Linear, frozen: bool, precision: str):
        super().__init__()
        self.backbone, self.layer, self.frozen, self.precision = backbone, layer, frozen, precision
        backbone.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, views_B3PP: Tensor) -> Tensor:
        grad = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(grad), autocast(self.precision, views_B3PP.device):
            features_BD = self.backbone(views_B3PP)
        return self.layer(features_BD.float())


class ClassifierTrainer(Resumable):
    """Trains a copy of `backbone` with a new layer by a protocol; `backbone` does not change.

    The global batch has at most `tune.batch_images` images. The last batch of an epoch is smaller or, if the backbone is trained,
    left out, because a few images would determine BatchNorm's statistics. `label` names the run in the progress bar and in errors.
    """

    def __init__(
        self,
        backbone: Backbone,
        protocol: Protocol,
        precision: str,
        seed: int,
        device: torch.device,
        checkpoints: Checkpoints,
        label: str,
    ):
        task, tune, trunk_lr = protocol.task, protocol.tune, protocol.trunk_lr
        check_labels(label, task.labels_N[task.train_rows_N], task.labels_N[task.test_rows_N], task.classes)
        self.task, self.tune, self.precision, self.seed, self.device, self.label = task, tune, precision, seed, device, label
        self.checkpoints, self.frozen = checkpoints, trunk_lr is None
        self.purpose = FROZEN if self.frozen else WHOLE
        layer = linear_layer(backbone.feature_width, task.classes, tune.init_std, seed, self.purpose, device)
        classifier = Classifier(copy.deepcopy(backbone), layer, self.frozen, precision)
        self.classifier = self._with_shared_statistics(classifier).to(device).to(memory_format=torch.channels_last)
        self.network = distributed.data_parallel(self.classifier, device)
        rates: dict[nn.Module, float] = {layer: protocol.head_lr} | ({} if trunk_lr is None else {self.classifier.backbone: trunk_lr})
        self.optimizer = make_optimizer(tune, rates, 0.9, nesterov=tune.nesterov)
        self.batch_images = min(tune.batch_images, len(task.train_rows_N))
        whole, tail = divmod(len(task.train_rows_N), self.batch_images)
        self.steps_per_epoch = whole + (self.frozen and tail > 0)
        self.step, self.watch = 0, LossWatch(device)
        self.scores: list[tuple[float, float]] = []
        self.parts = {"trained": layer if self.frozen else self.classifier, "optimizer": self.optimizer}
        self.values = ("step", "scores")
        self.loader = ViewLoader(task.images, task.image, task.crops, seed, device)
        self.own_test_rows_N = task.test_rows_N[distributed.rank() :: distributed.world()]
        self._test_features_ND: Tensor | None = None

    def run(self) -> dict[str, float | int]:
        """Train to the end, from the last checkpoint if there is one; return `last_and_best` of top-1 and top-5, percent.

        Raises UserError if the loss or an output is not finite. On SIGTERM or SIGINT, saves a checkpoint and raises Interrupted.
        """
        self._resume()
        total = self.tune.epochs * self.steps_per_epoch
        self.log.begin(self.step, total, self.batch_images, "images", lambda: self.loader.wait_seconds)
        with self.checkpoints.stop_requests(), progress_bar(self.label, total * self.batch_images, "images") as bar:
            bar.resume_at(self.step * self.batch_images)
            while self.step < total:
                for request, batch_rows, views_B3PP in self._rest_of_epoch():
                    self._train_step(request, batch_rows, views_B3PP)
                    self.step += 1
                    bar.advance_to(self.step * self.batch_images)
                    if self.step % self.steps_per_epoch == 0:
                        self.scores.append(self._test())
                        self.log.summary(self.step, "epoch", dict(zip(("top1", "top5"), self.scores[-1], strict=True)))
                    self._checkpoint_if_due()
        self.checkpoints.save(self._state(), self.step)
        return last_and_best(self.scores)

    def _rest_of_epoch(self) -> Iterator[tuple[Request, int, Tensor]]:
        """This process's share of each batch from the current step on: the request, the number of rows of all processes, the views."""
        epoch, first = divmod(self.step, self.steps_per_epoch)
        train_rows_N = self.task.train_rows_N
        order_N = train_rows_N[seeds.permutation(self.seed, self.purpose, epoch, len(train_rows_N))]
        batches = [order_N[start : start + self.batch_images] for start in range(0, len(order_N), self.batch_images)]
        batches = batches[first : self.steps_per_epoch]
        # A process without rows in the last batch uses the first row, with weight 0 (_train_step).
        shares = [np.array_split(rows_B, distributed.world())[distributed.rank()] for rows_B in batches]
        rows = [share_B if len(share_B) else rows_B[:1] for share_B, rows_B in zip(shares, batches, strict=True)]
        requests = [Request(rows_B, rows_B, self.purpose, epoch, 0) for rows_B in rows]
        views = self.loader.views([request] for request in requests)
        for request, rows_B, (views_B3PP,) in zip(requests, batches, views, strict=True):
            yield request, len(rows_B), views_B3PP

    def _train_step(self, request: Request, batch_rows: int, views_B3PP: Tensor) -> None:
        set_rates(self.optimizer, self.step, self.steps_per_epoch, self.tune)
        self.classifier.train()
        labels_B = to_labels(self.task.labels_N[request.image_rows_B], self.device)
        counts = distributed.rank() < batch_rows
        # Gradients are averaged over processes: the sum over own rows, divided by all rows, times the number of processes.
        share = distributed.world() / batch_rows if counts else 0.0
        loss = F.cross_entropy(self.network(views_B3PP), labels_B, reduction="sum") * share
        self._watch_loss(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._log_step({"loss": loss})
        update(self.optimizer, self.tune)

    def way_out(self, step: int) -> str:
        return "lower its lr, or train the network again"

    @torch.inference_mode()
    def _test(self) -> tuple[float, float]:
        """Top-1 and top-5 accuracy on the test rows in percent; each process tests its share."""
        counts_3 = torch.zeros(3, dtype=torch.int64, device=self.device)
        start = 0
        self._refuse_what_is_not_finite()
        self.classifier.eval()
        for logits_BC in self._test_logits():
            rows_B = self.own_test_rows_N[start : start + len(logits_BC)]
            counts_3 += right_of(logits_BC, to_labels(self.task.labels_N[rows_B], self.device))
            start += len(logits_BC)
        right, right_among_5, broken = distributed.total(counts_3).tolist()
        if broken:
            problem = f"{self.label}: outputs are nan or inf after {self.step} steps"
            raise UserError(f"{problem}, allowed are finite numbers; lower its lr, or train the network again if its features are not")
        rows = len(self.task.test_rows_N)
        return percent(right, rows), percent(right_among_5, rows)

    def _test_logits(self) -> Iterator[Tensor]:
        """Outputs of this process's test rows in batches (B, C); a frozen backbone sees them only once."""
        task, batch_images = self.task, self.batch_images
        if not self.frozen:
            for views_B3PP in center_views(task.images, self.own_test_rows_N, task.image, self.device, batch_images):
                yield self.classifier(views_B3PP)
            return
        if self._test_features_ND is None and len(self.own_test_rows_N):
            rows = (task.images, self.own_test_rows_N, task.image, self.device, self.precision, batch_images)
            self._test_features_ND = torch.from_numpy(backbone_features(self.classifier.backbone, *rows)).to(self.device)
        if self._test_features_ND is not None:
            for features_BD in self._test_features_ND.split(batch_images):
                yield self.classifier.layer(features_BD)

    def _with_shared_statistics(self, classifier: Classifier) -> Classifier:
        """With several processes: BatchNorm over the whole batch if it is trained. Raises UserError if that is impossible."""
        world = distributed.world()
        learns = not self.frozen and any(isinstance(module, _BATCH_NORMS) for module in classifier.modules())
        batch_images = min(self.tune.batch_images, len(self.task.train_rows_N))
        if learns and batch_images < max(2, world):
            least = f"BatchNorm on {world} processes needs {max(2, world)}"
            raise UserError(f"{self.label}: a batch of {batch_images} images, {least}; raise batch_images, or give more labels")
        if learns and world > 1 and self.device.type == "cpu":
            problem = f"{self.label}: {world} processes on the CPU would each have their own BatchNorm statistics"
            raise UserError(f"{problem}; set BINGO_PROCESSES=1, or use GPUs")
        return convert_sync_batchnorm(classifier) if learns and world > 1 else classifier
