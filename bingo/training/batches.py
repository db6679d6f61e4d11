"""The batches of a training: rows, drawn bag members and companions, their views, stored keys and features.

They are functions of (seed, purpose, epoch, row), so they depend neither on restarts nor on the number of processes. Shape
letters: B rows of a batch, M companions of an anchor, S stored views of a row, T train rows, V stored views, P key width, D feature
width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from bingo import seeds
from bingo.images.loader import Request, ViewLoader
from bingo.images.uploads import upload_together
from bingo.methods.contract import Batch, Needs, SmallCrops
from bingo.params import AugmentParams
from bingo.runtime import distributed
from bingo.schedules import steps_in_epoch
from bingo.training.bag_means import bag_means

if TYPE_CHECKING:  # a method without bags does not depend on them
    from bingo.bags.index import Bags

STORED_VIEWS = "extract"  # the purpose under which the teacher's pass draws its views (bingo/embeddings/extract.py)


@dataclass(frozen=True)
class Stored:
    """The teacher's stored outputs on the device: keys (T, V, P) and features (T, D) in float16, and the augmentation of the
    views from which the keys were computed."""

    keys_TVP: Tensor
    augment: AugmentParams
    features_TD: Tensor | None = None


@dataclass
class BatchPlan:
    """One step of this process: rows, drawn members, and the stored views whose keys are used for each row."""

    rows_B: np.ndarray
    member_rows_B: np.ndarray | None
    view_SB: np.ndarray
    requests: list[Request]


def weak_family(augment: AugmentParams) -> AugmentParams:
    """The augmentation without colour jitter, greyscale and blur."""
    return augment.model_copy(update={"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0})


class Batches:
    """The batches for a method with these needs; each batch is divided into `parts`."""

    def __init__(
        self,
        needs: Needs,
        loader: ViewLoader,
        seed: int,
        train_rows: int,
        batch_anchors: int,
        bags: "Bags | None",
        stored: Stored | None,
        parts: int = 1,
    ):
        self.needs, self.loader, self.seed, self.train_rows, self.batch_anchors = needs, loader, seed, train_rows, batch_anchors
        self.bags, self.stored, self.parts = bags, stored, parts
        self.bag_means_TP = bag_means(stored.keys_TVP, bags) if needs.bag_means and stored is not None and bags is not None else None
        self.steps_per_epoch = steps_in_epoch(train_rows, batch_anchors)

    def epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        """The parts of this process's share of each global batch of an epoch, starting at step `first`."""
        for plan, views in self.loader.items_with_views((plan, plan.requests) for plan in self._plans(epoch, first)):
            yield self.make(plan, views)

    def _plans(self, epoch: int, first: int) -> Iterator[BatchPlan]:
        order_N = seeds.permutation(self.seed, "order", epoch, self.train_rows)
        for step in range(first, self.steps_per_epoch):
            rows_B = order_N[step * self.batch_anchors : (step + 1) * self.batch_anchors]
            for part_B in np.split(distributed.own_share(rows_B), self.parts):
                yield self.plan(epoch, part_B)

    def plan(self, epoch: int, rows_B: np.ndarray) -> BatchPlan:
        """The plan of one step. A companion's draws depend on its anchor's row and its position among the companions, so that a row that
        occurs twice is seen in two views."""
        needs, seed_rows_B, place_B = self.needs, rows_B, np.zeros(len(rows_B), np.int64)
        if needs.companions:
            place_B = np.repeat(np.arange(1 + needs.companions), len(rows_B))
            seed_rows_B, rows_B = np.tile(rows_B, 1 + needs.companions), np.concatenate([rows_B, self._companions(epoch, rows_B)])
        view_SB = self._stored_views(epoch, seed_rows_B, place_B)
        requests = [
            Request(rows_B, seed_rows_B, "anchor", epoch, view + needs.anchor_views * place_B) for view in range(needs.anchor_views)
        ]
        for view in range(needs.same_views):
            assert self.stored is not None, "a method that needs stored views is given them"
            requests[view] = Request(rows_B, rows_B, STORED_VIEWS, 0, view_SB[view], self.stored.augment)
        for view in range(needs.anchor_views - needs.weak_views, needs.anchor_views):
            requests[view] = replace(requests[view], augment=weak_family(self.loader.augment))
        member_rows_B = None
        if needs.members:
            assert self.bags is not None, "a method that needs members is given bags"
            member_rows_B = self.bags.draw(rows_B, seeds.uniforms(self.seed, "member", epoch, rows_B)[:, 0])
            requests += [Request(member_rows_B, rows_B, "member", epoch, view) for view in range(needs.member_views)]
        if self.loader.teacher_image is not None:
            live = [*needs.live_anchor_views, *(needs.anchor_views + view for view in needs.live_member_views)]
            requests += [replace(requests[number], for_teacher=True) for number in live]
        if needs.small_crops is not None:
            requests += self._small_crops(needs.small_crops, epoch, seed_rows_B, rows_B)
        return BatchPlan(rows_B, member_rows_B, view_SB, requests)

    def _small_crops(self, crops: SmallCrops, epoch: int, seed_rows_B: np.ndarray, rows_B: np.ndarray) -> list[Request]:
        """The small crops for the student and, if the teacher has another normalisation, for the teacher."""
        rows_CB, seed_rows_CB = np.tile(rows_B, crops.count), np.tile(seed_rows_B, crops.count)
        view_CB = np.repeat(np.arange(crops.count), len(rows_B))
        augment = self.loader.augment.model_copy(update={"crop_scale": crops.crop_scale})
        request = Request(rows_CB, seed_rows_CB, "small crop", epoch, view_CB, augment, crop_px=crops.crop_px)
        return [request] if self.loader.teacher_image is None else [request, replace(request, for_teacher=True)]

    def _companions(self, epoch: int, rows_B: np.ndarray) -> np.ndarray:
        """Distinct listed members of each anchor's bag, int64 (M * B,): the first of every anchor, then the second, and so on."""
        assert self.bags is not None, "a method that needs companions is given bags"
        u_BK = seeds.uniforms(self.seed, "companions", epoch, rows_B, draws=self.bags.members_TK.shape[1])
        return self.bags.draw_listed(rows_B, u_BK, self.needs.companions).T.ravel()

    def _stored_views(self, epoch: int, seed_rows_B: np.ndarray, place_B: np.ndarray) -> np.ndarray:
        """Indices of stored views, int64 (S, B): one drawn for each row and, if two same views are needed, a second, different one."""
        views = self.stored.keys_TVP.shape[1] if self.stored is not None else 1
        u_B2 = seeds.uniforms(self.seed, "stored view", epoch, seed_rows_B, place_B, draws=2)
        first_B = (u_B2[:, 0] * views).astype(np.int64)
        if self.needs.same_views < 2:
            return first_B[None]
        return np.stack([first_B, (first_B + 1 + (u_B2[:, 1] * (views - 1)).astype(np.int64)) % views])

    def _places_of_keys(self, plan: BatchPlan) -> np.ndarray:
        """The positions of the keys of anchors, then of members, among all stored keys, int64."""
        if not self.needs.stored_keys:
            return np.empty(0, np.int64)
        assert self.stored is not None, "a method that needs stored keys is given them"
        first_B = plan.rows_B * (views := self.stored.keys_TVP.shape[1])
        places = [first_B + view_B for view_B in plan.view_SB]
        members = [] if plan.member_rows_B is None else [plan.member_rows_B * views + plan.view_SB[0]]
        return np.concatenate(places + members)

    def make(self, plan: BatchPlan, views: list[Tensor]) -> Batch:
        """A plan with its views, and the stored keys and features of its rows."""
        device, needs, anchors = views[0].device, self.needs, self.needs.anchor_views
        members, none = views[anchors : anchors + needs.member_views], np.empty(0, np.int64)
        host = [plan.rows_B, none if plan.member_rows_B is None else plan.member_rows_B, self._places_of_keys(plan)]
        rows_B, member_rows_B, places = upload_together(host, device)
        batch = Batch(rows_B, views[:anchors], member_views=members, host_rows_B=plan.rows_B)
        if needs.small_crops is not None:
            last = views.pop()
            batch.small_crops, batch.live_small_crops = (last, None) if self.loader.teacher_image is None else (views.pop(), last)
        if live := views[anchors + needs.member_views :]:
            batch.live_anchor_views = dict(zip(needs.live_anchor_views, live, strict=False))
            batch.live_member_views = dict(zip(needs.live_member_views, live[len(needs.live_anchor_views) :], strict=True))
        if plan.member_rows_B is not None:
            batch.member_rows_B = member_rows_B
        if self.stored is not None and len(places):
            keys = list(self.stored.keys_TVP.flatten(0, 1).index_select(0, places).float().split(len(rows_B)))
            batch.member_keys_BP = keys.pop() if plan.member_rows_B is not None else None
            batch.anchor_keys = keys
        if self.bag_means_TP is not None:
            batch.bag_means_BP = self.bag_means_TP[batch.anchor_rows_B].float()
        if self.needs.stored_features:
            features_TD = self.stored.features_TD if self.stored is not None else None
            assert features_TD is not None, "a method that needs stored features is given them"
            batch.anchor_features_BD = features_TD[batch.anchor_rows_B].float()
        return batch
