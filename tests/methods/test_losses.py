"""The losses against loops written from the papers, one logit at a time in Python floats."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bingo import seeds
from bingo.bags.index import Bags
from bingo.methods import bingo, moco
from bingo.methods.bingo import cutmix
from bingo.methods.contract import Batch, Context, Progress
from bingo.methods.negatives import hidden_negatives
from bingo.methods.parts.losses import info_nce
from bingo.methods.parts.momentum import Queue
from bingo.nets.batchnorm.groups import grouped_batchnorm
from bingo.params import BingoParams, MocoParams
from bingo.runtime import distributed
from bingo.runtime.errors import UserError
from bingo.training.bag_means import bag_means

CPU = torch.device("cpu")
WIDTH, KEY, ROWS, VIEWS, BATCH, PX = 5, 4, 30, 3, 6, 6


class Student(nn.Module):
    """Pooled pixels and one layer, without BatchNorm, so that each output depends only on its own image."""

    feature_width = WIDTH

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, WIDTH)

    def forward(self, images):
        return torch.relu(self.layer(images.mean(dim=(2, 3))))


class FrozenTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, KEY)
        self.batch = None

    def batch_statistics(self, on):
        self.batch = on

    @torch.no_grad()
    def keys(self, images):
        return nn.functional.normalize(self.layer(images.mean(dim=(2, 3))), dim=1)


def loop_info_nce(query, key, negatives, temperature):
    """-log of the positive's probability."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    positive = math.exp(dot(query, key) / temperature)
    return -math.log(positive / (positive + sum(math.exp(dot(query, row) / temperature) for row in negatives)))


def bingo_params(**changes) -> BingoParams:
    values = {
        "terms": "symmetric_mix", "relation": "bags", "pair_weights": [0.7, 0.3], "inter_warmup_epochs": 1,
        "view_coupling": "independent", "anchor_views": 1, "temperature": 0.2, "negatives": "bank", "negative_rows": 1000, "mask_bag": True,
        "queue_push": "anchor", "teacher_batchnorm": "eval", "key_momentum": 0.9, "cutmix_alpha": 2.0, "head_hidden": 8, "key_width": KEY,
    }  # fmt: skip
    return BingoParams.model_validate(values | changes)


@pytest.fixture
def context():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    keys = nn.functional.normalize(torch.randn(ROWS, VIEWS, KEY), dim=2).half()
    members = np.stack([rng.permutation([r for r in range(ROWS) if r != row])[:3] for row in range(ROWS)]).astype(np.int32)
    members[4, 1:] = -1
    bags = SimpleNamespace(members_TK=members, cluster_T=None, bag_sizes_T=(members >= 0).sum(1))
    return Context(Student(), WIDTH, 0, "stored", "fp32", CPU, FrozenTeacher(), keys, None, bags)


def batch_of(context, rows=(3, 4, 9, 11, 20, 29), views=2):
    torch.manual_seed(1)
    member_rows = [int(context.bags.members_TK[row, 0]) for row in rows]
    images = [torch.randn(BATCH, 3, PX, PX) for _ in range(2 * views)]
    view = torch.arange(BATCH) % VIEWS
    return Batch(
        torch.tensor(rows), images[:views], torch.tensor(member_rows), images[views:],
        [context.keys_TVP[list(rows), view].float()], context.keys_TVP[member_rows, view].float(),
    )  # fmt: skip


def queries(method, images):
    return nn.functional.normalize(method.head(method.student(images)), dim=1).tolist()


def bank_negatives(context, method, batch, index, step, mask_bag=True):
    """The bank row by row: each row in the view drawn for it, without the anchor, its member and (if masked) its bag."""
    anchor, member = int(batch.anchor_rows_B[index]), int(batch.member_rows_B[index])
    left_out = {anchor, member} | (set(context.bags.members_TK[anchor].tolist()) if mask_bag else set())
    negatives = []
    for row in range(ROWS):
        view = int(seeds.uniforms(0, "negative view", step, [row])[0, 0] * VIEWS)
        if row not in left_out:
            negatives.append(context.keys_TVP[row, view].float().tolist())
    return negatives


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("terms", ["paper", "symmetric", "symmetric_mix"])
@pytest.mark.parametrize("mask_bag", [True, False])
def test_bingo_is_the_sum_of_its_terms(context, terms, epoch, mask_bag):
    method = bingo.build(bingo_params(terms=terms, mask_bag=mask_bag), context)
    batch, progress = batch_of(context, views=1), Progress(epoch, 7)
    w0, w1 = (1.0, 0.0) if epoch == 0 else (0.7, 0.3)
    uniform = seeds.uniforms(0, "cutmix", 7, [0], draws=3)  # one box for the process, which has one group
    mixed, share = cutmix(batch.anchor_views[0], batch.member_views[0], uniform.repeat(BATCH, axis=0), 2.0)
    s_a, s_p, s_m = (queries(method, images) for images in (batch.anchor_views[0], batch.member_views[0], mixed))
    k_a, k_p = batch.anchor_keys[0].tolist(), batch.member_keys_BP.tolist()
    total = 0.0
    for i in range(BATCH):
        n = bank_negatives(context, method, batch, i, 7, mask_bag)
        ell = lambda q, k: loop_info_nce(q, k, n, 0.2)  # noqa: E731, B023
        if terms == "paper":
            total += w0 * ell(s_a[i], k_a[i]) + w1 * ell(s_p[i], k_a[i])
            continue
        four = w0 * ell(s_a[i], k_a[i]) + w1 * ell(s_a[i], k_p[i]) + w0 * ell(s_p[i], k_p[i]) + w1 * ell(s_p[i], k_a[i])
        if terms == "symmetric":
            total += four / 2
        else:
            m = float(share[i])
            total += (four + m * ell(s_m[i], k_a[i]) + (1 - m) * ell(s_m[i], k_p[i])) / 3
    assert method(batch, progress)["loss"].item() == pytest.approx(total / BATCH, rel=2e-5)


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_expected_terms_pull_towards_the_mean_key_of_the_bag(context, epoch):
    method = bingo.build(bingo_params(terms="expected"), context)
    assert (method.needs.member_views, method.needs.bag_means, method.needs.members, method.needs.bags) == (0, True, False, True)
    batch, (w0, w1) = batch_of(context, views=1), (1.0, 0.0) if epoch == 0 else (0.7, 0.3)
    batch.bag_means_BP = bag_means(context.keys_TVP, Bags({}, context.bags.members_TK, None))[batch.anchor_rows_B].float()
    s_a, total = queries(method, batch.anchor_views[0]), 0.0
    member_rows_B, batch.member_rows_B = batch.member_rows_B, None  # no member is drawn
    for i, row in enumerate(batch.anchor_rows_B.tolist()):
        batch.member_rows_B = member_rows_B
        n = bank_negatives(context, method, batch, i, 7)
        batch.member_rows_B = None
        bag = [context.keys_TVP[member].float().mean(dim=0) for member in context.bags.members_TK[row] if member >= 0]
        m_a = torch.stack(bag).mean(dim=0).tolist()
        total += w0 * loop_info_nce(s_a[i], batch.anchor_keys[0][i].tolist(), n, 0.2) + w1 * loop_info_nce(s_a[i], m_a, n, 0.2)
    assert method(batch, Progress(epoch, 7))["loss"].item() == pytest.approx(total / BATCH, rel=2e-4)


@pytest.mark.parametrize("coupling", ["independent", "same"])
def test_two_views_of_the_anchor_have_the_mean_of_their_losses(context, coupling):
    one, two = (bingo.build(bingo_params(terms="expected", view_coupling=coupling, anchor_views=n), context) for n in (1, 2))
    assert (two.needs.anchor_views, two.needs.same_views) == (2, 2 if coupling == "same" else 0)
    batch = batch_of(context, views=2)
    batch.bag_means_BP, batch.member_rows_B = batch.member_keys_BP, None
    if coupling == "same":
        batch.anchor_keys.append(context.keys_TVP[batch.anchor_rows_B, (torch.arange(BATCH) + 1) % VIEWS].float())
    each = [
        one(replace(batch, anchor_views=[view], anchor_keys=[key]), Progress(1, 7))["loss"].item()
        for view, key in zip(batch.anchor_views, [batch.anchor_keys[0], batch.anchor_keys[-1]], strict=True)
    ]
    assert each[0] != pytest.approx(each[1], rel=1e-3)
    assert two(batch, Progress(1, 7))["loss"].item() == pytest.approx(sum(each) / 2, rel=1e-5)


def test_two_views_of_the_anchor_need_expected_terms_and_stored_keys(context):
    for params, keys in (
        ({"terms": "symmetric"}, "stored"),
        ({"terms": "expected"}, "live"),
        ({"terms": "expected", "relation": "none"}, "stored"),
    ):
        with pytest.raises(UserError, match=r"anchor_views"):
            bingo.build(bingo_params(anchor_views=2, **params), replace(context, keys=keys))


def test_without_relation_only_the_intra_term_is_left(context):
    method = bingo.build(bingo_params(relation="none", mask_bag=False, negatives="queue", negative_rows=12), context)
    assert not method.needs.members
    batch = batch_of(context, views=1)
    batch.member_rows_B, batch.member_views, batch.member_keys_BP = None, [], None
    s_a, negatives = queries(method, batch.anchor_views[0]), method.negatives.queue.keys_QP.tolist()
    expected = sum(loop_info_nce(q, k, negatives, 0.2) for q, k in zip(s_a, batch.anchor_keys[0].tolist(), strict=True)) / BATCH
    assert method(batch, Progress(3, 0))["loss"].item() == pytest.approx(expected, rel=2e-5)


def test_live_keys_are_the_teachers_of_other_views(context):
    live = Context(**{**context.__dict__, "keys": "live"})
    method = bingo.build(
        bingo_params(terms="symmetric", negatives="queue", negative_rows=10, mask_bag=False, teacher_batchnorm="batch"), live
    )
    assert live.teacher.batch is True
    assert (method.needs.anchor_views, method.needs.member_views, method.needs.stored_keys) == (2, 2, False)
    batch = batch_of(context)
    k_a, k_p = (live.teacher.keys(images).tolist() for images in (batch.anchor_views[1], batch.member_views[1]))
    s_a, s_p = (queries(method, images) for images in (batch.anchor_views[0], batch.member_views[0]))
    n, total = method.negatives.queue.keys_QP.tolist(), 0.0
    for i in range(BATCH):
        total += (
            sum(w * loop_info_nce(q[i], k[i], n, 0.2) for w, q, k in [(0.7, s_a, k_a), (0.3, s_a, k_p), (0.7, s_p, k_p), (0.3, s_p, k_a)])
            / 2
        )
    assert method(batch, Progress(1, 0))["loss"].item() == pytest.approx(total / BATCH, rel=2e-5)
    assert method(batch, Progress(1, 0))["loss"].item() == pytest.approx(total / BATCH, rel=2e-5), "forward must not change the queue"
    method.after_step()
    assert torch.allclose(method.negatives.queue.keys_QP[:BATCH], torch.tensor(k_a), atol=1e-6)
    assert method.negatives.queue.rows_Q[:BATCH].tolist() == batch.anchor_rows_B.tolist()


def test_a_momentum_copy_moves_by_its_momentum(context):
    own = Context(**{**context.__dict__, "keys": "momentum", "keys_TVP": None})
    method = bingo.build(bingo_params(negatives="queue", negative_rows=16), own)
    before = [p.clone() for p in method.key_encoder.parameters()]
    with torch.no_grad():
        for p in method.student.parameters():
            p += 1.0
    method(batch_of(context), Progress(0, 0))
    method.after_step()
    moved = list(zip(before, method.key_encoder.parameters(), [*method.student.parameters(), *method.head.parameters()], strict=True))
    assert all(torch.allclose(after, 0.9 * old + 0.1 * now, atol=1e-6) for old, after, now in moved)


def test_moco_follows_its_definition_and_then_updates_its_queue(context):
    params = MocoParams(temperature=0.1, queue_rows=10, key_momentum=0.9, head_hidden=8, key_width=KEY)
    method = moco.build(params, context)
    batch = batch_of(context)
    query = queries(method, batch.anchor_views[0])
    key = nn.functional.normalize(method.key_encoder(batch.anchor_views[1]), dim=1).tolist()
    negatives = method.queue.keys_QP.tolist()
    expected = sum(loop_info_nce(q, k, negatives, 0.1) for q, k in zip(query, key, strict=True)) / BATCH
    assert method(batch, Progress(0, 0))["loss"].item() == pytest.approx(expected, rel=2e-5)
    method.after_step()
    assert torch.allclose(method.queue.keys_QP[:BATCH], torch.tensor(key), atol=1e-6)


def test_the_loss_of_a_query_equal_to_all_keys_is_the_log_of_their_number():
    query = nn.functional.normalize(torch.randn(3, KEY), dim=1)
    bank = query[:1].expand(7, KEY)
    assert info_nce(query[:1], [(1.0, query[:1])], bank, 0.2).item() == pytest.approx(math.log(8), rel=1e-5)


def test_the_gradient_equals_that_of_the_plain_softmax():
    torch.manual_seed(0)
    query, key, bank = (nn.functional.normalize(torch.randn(n, 16), dim=1).double() for n in (5, 5, 40))
    query.requires_grad_(True)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ bank.T], dim=1) / 0.2
    (plain,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long)), query)
    ours = info_nce(query, [(1.0, key)], bank, 0.2)
    (gradient,) = torch.autograd.grad(ours, query)
    assert torch.allclose(gradient, plain, atol=1e-7)


def test_hidden_negatives_are_found_one_by_one():
    bank, excluded = torch.tensor([4, -1, 2, 4, 9]), torch.tensor([[4, 2], [-1, 9], [7, -1]])
    expected = [[int(row) in set(map(int, out)) - {-1} for row in bank] for out in excluded]
    assert hidden_negatives(bank, excluded).tolist() == expected


def test_a_queue_is_a_ring_that_wraps_anywhere():
    queue, ring, pointer = Queue(7, 2, 0), {}, 0
    for step in range(5):
        keys = torch.full((3, 2), float(step))
        queue.push(keys, torch.tensor([3 * step, 3 * step + 1, 3 * step + 2]))
        for i in range(3):
            ring[pointer] = 3 * step + i
            pointer = (pointer + 1) % 7
    assert queue.rows_Q.tolist() == [ring[slot] for slot in range(7)]
    assert queue.keys_QP[:, 0].tolist() == [ring[slot] // 3 for slot in range(7)]


def test_empty_places_are_not_negatives_after_the_first_push(context):
    params = MocoParams(temperature=0.1, queue_rows=10, key_momentum=0.9, head_hidden=8, key_width=KEY)
    method, batch = moco.build(params, context), batch_of(context)
    method(batch, Progress(0, 0))
    method.after_step()
    query, filled = queries(method, batch.anchor_views[0]), method.queue.keys_QP[:BATCH].tolist()
    key = nn.functional.normalize(method.key_encoder(batch.anchor_views[1]), dim=1).tolist()
    expected = sum(loop_info_nce(q, k, filled, 0.1) for q, k in zip(query, key, strict=True)) / BATCH
    assert method(batch, Progress(0, 1))["loss"].item() == pytest.approx(expected, rel=2e-5)


def test_cutmix_pastes_one_box_whose_area_is_the_share():
    """Share ~ Beta(2, 2), with distribution function 3 x^2 - 2 x^3; the side of the box is sqrt(1 - share) of the image, clipped."""
    anchor, member = torch.zeros(100, 3, 32, 32), torch.ones(100, 3, 32, 32)
    uniform = np.random.default_rng(0).random((100, 3))
    mixed, share = cutmix(anchor, member, uniform, 2.0)
    for image, part, (u, row, column) in zip(mixed, share, uniform, strict=True):
        drawn = min(np.linspace(0, 1, 20001), key=lambda x: abs(3 * x**2 - 2 * x**3 - u))
        expected = torch.zeros(32, 32)
        half = int(32 * math.sqrt(1 - drawn) + 1e-6) // 2
        top, left = int(row * 32) - half, int(column * 32) - half
        expected[max(0, top) : max(0, top + 2 * half), max(0, left) : max(0, left + 2 * half)] = 1
        assert torch.equal(image[0], expected)
        assert float(part) == pytest.approx(1 - float(expected.mean()))


def test_a_step_has_one_cutmix_box_per_group_with_any_number_of_processes(context, monkeypatch):
    """The student's input for black anchors and white members: 3 groups of 2 images, or 3 processes with one group each."""
    batch = batch_of(context, views=1)
    batch.anchor_views, batch.member_views = [torch.zeros(BATCH, 3, 32, 32)], [torch.ones(BATCH, 3, 32, 32)]

    def boxes(groups, step) -> list[list[list[float]]]:
        method, seen = bingo.build(bingo_params(), context), []
        monkeypatch.setattr(method, "_query", lambda images: seen.append(images) or torch.ones(BATCH, KEY, requires_grad=True))
        with grouped_batchnorm(groups, BATCH):
            method(batch, Progress(1, step))
        return seen[2][:, 0].tolist()

    whole = boxes(3, step=5)
    assert [whole[i] == whole[i + 1] for i in range(BATCH - 1)] == [True, False, True, False, True]
    assert boxes(3, step=6) != whole
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert boxes(1, step=5) == [whole[2 * rank]] * BATCH


def test_contradicting_switches_are_refused(context):
    momentum = Context(**{**context.__dict__, "keys": "momentum"})
    with pytest.raises(UserError, match="negatives = queue"):
        bingo.build(bingo_params(), momentum)
    with pytest.raises(UserError, match=r"^methods\.bingo\.terms = expected: "):
        bingo.build(bingo_params(terms="expected", negatives="queue"), momentum)
    live = Context(**{**context.__dict__, "keys": "live", "keys_TVP": context.keys_TVP[:, :0]})
    with pytest.raises(UserError, match=r"^extract\.views = 0: bingo with distill\.keys = live reads 1"):
        bingo.build(bingo_params(terms="expected", negatives="queue"), live)


def test_bags_of_all_images_leave_no_negatives_and_are_refused(context):
    context.bags.bag_sizes_T[7] = ROWS - 1
    with pytest.raises(UserError, match=r"a bag holds all 30 train images, so no negative is left; lower bagging\.k"):
        bingo.build(bingo_params(), context)
    bingo.build(bingo_params(mask_bag=False), context)
