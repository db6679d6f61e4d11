"""The content of a batch, compared with brute force: companions, redrawn stored views, weak views, weighted draws, mutual bags."""

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

from bingo.bags.builders import build_knn
from bingo.bags.index import Bags
from bingo.images.images import FileImages, Images, MemoryImages
from bingo.images.loader import Request, ViewLoader
from bingo.methods.contract import Batch, Needs, SmallCrops
from bingo.params import AugmentParams, BicubicImageParams, ImageParams
from bingo.training.batches import Batches, Stored

CPU = torch.device("cpu")
ROWS, VIEWS, KEY, FEATURE, BATCH = 24, 3, 4, 5, 6
IMAGE = ImageParams(crop_px=12, resize_px=12, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
STRONG = AugmentParams(
    crop_scale=[0.3, 0.9], crop_ratio=[0.75, 4 / 3], rotate_degrees=20, jitter=[0.4, 0.4, 0.4, 0.1], jitter_p=0.8, gray_p=0.3,
    blur_p=0.5, blur_sigma_px=[0.1, 2.0], flip_p=0.5,
)  # fmt: skip
EXTRACT = STRONG.model_copy(update={"crop_scale": [0.6, 1.0], "rotate_degrees": 5.0, "jitter": [0.2, 0.0, 0.0, 0.0], "blur_p": 0.0})
NO_COLOURS = STRONG.model_copy(update={"jitter": [0.0] * 4, "gray_p": 0.0, "blur_p": 0.0})


@pytest.fixture(scope="module")
def memory() -> MemoryImages:
    return MemoryImages(np.random.default_rng(0).integers(0, 256, (ROWS, 16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> FileImages:
    """PNG and JPEG files with several dimensions, too small to be decoded at a reduced scale."""
    root, rng, paths = tmp_path_factory.mktemp("images"), np.random.default_rng(1), []
    for row in range(ROWS):
        noise = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        paths.append(f"{row:02d}.{'png' if row % 2 else 'jpg'}")
        noise.resize((int(rng.integers(14, 22)), int(rng.integers(14, 22))), Image.Resampling.BICUBIC).save(root / paths[-1])
    return FileImages(str(root), paths)


def stored() -> Stored:
    """Keys and features that encode their row and view."""
    keys = torch.arange(ROWS * VIEWS).reshape(ROWS, VIEWS, 1).expand(-1, -1, KEY).half().clone()
    return Stored(keys, EXTRACT, torch.arange(ROWS).half()[:, None].expand(-1, FEATURE).clone())


def knn_bags() -> Bags:
    """Three listed members per row, except that row 2 has one and row 5 none."""
    rng = np.random.default_rng(3)
    members = np.stack([rng.permutation([r for r in range(ROWS) if r != row])[:3] for row in range(ROWS)]).astype(np.int32)
    members[2, 1:], members[5] = -1, -1
    return Bags({"method": "knn"}, members, np.where(members >= 0, 0.5, -np.inf).astype(np.float16))


def batches(needs: Needs, images: Images, bags: Bags | None = None) -> Batches:
    loader = ViewLoader(images, IMAGE, STRONG, 0, CPU, workers=0)
    return Batches(needs, loader, 0, ROWS, BATCH, bags, stored())


def drawn(images: Images, row: int, purpose: str, epoch: int, view: int, augment: AugmentParams, seed_row: int | None = None):
    """One view of one image, computed alone."""
    request = Request(np.array([row]), np.array([row if seed_row is None else seed_row]), purpose, epoch, view)
    return next(ViewLoader(images, IMAGE, augment, 0, CPU, workers=0).views([[request]]))[0][0]


def teacher_views(images: Images, row: int) -> list[torch.Tensor]:
    """The views of one row as requested by the teacher's pass: all in one plan, from a loader with the augmentation of extract."""
    rows = np.full(VIEWS, row)
    (views,) = next(ViewLoader(images, IMAGE, EXTRACT, 0, CPU, workers=0).views([[Request(rows, rows, "extract", 0, np.arange(VIEWS))]]))
    return list(views)


def every_batch(made: Batches, epoch: int = 0) -> list[Batch]:
    return list(made.epoch(epoch, 0))


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_live_teacher_of_another_size_sees_the_views_named_by_the_method(kind, request):
    images, other = request.getfixturevalue(kind), BicubicImageParams(crop_px=18, resize_px=20, mean=[0.4] * 3, std=[0.3] * 3)
    needs = Needs(anchor_views=2, member_views=2, live_anchor_views=(1,), live_member_views=(0, 1))
    usual = every_batch(batches(needs, images, knn_bags()))
    as_teacher = Batches(needs, ViewLoader(images, other, STRONG, 0, CPU, workers=0), 0, ROWS, BATCH, knn_bags(), stored())
    loader = ViewLoader(images, IMAGE, STRONG, 0, CPU, workers=0, teacher_image=other)
    for batch, alone, seen in zip(
        Batches(needs, loader, 0, ROWS, BATCH, knn_bags(), stored()).epoch(0, 0), usual, every_batch(as_teacher), strict=True
    ):
        for mine, theirs in ((batch.anchor_views, alone.anchor_views), (batch.member_views, alone.member_views)):
            assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
        assert torch.equal(batch.anchor_for_teacher(1), seen.anchor_views[1])
        assert all(torch.equal(batch.member_for_teacher(view), seen.member_views[view]) for view in (0, 1))
        assert alone.anchor_for_teacher(1) is alone.anchor_views[1]


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("for_teacher", [False, True])
def test_small_crops_are_in_order_of_crops_and_do_not_change_the_views(kind, for_teacher, request):
    """Together with members, and a teacher with another size and normalisation: crop c of the i-th anchor is in row c * B + i."""
    images, other = request.getfixturevalue(kind), BicubicImageParams(crop_px=18, resize_px=20, mean=[0.4] * 3, std=[0.3] * 3)
    usual = Needs(anchor_views=1, member_views=1, live_anchor_views=(0,), live_member_views=(0,))
    crops_alone, made = STRONG.model_copy(update={"crop_scale": [0.1, 0.4]}), []
    for needs in (replace(usual, small_crops=SmallCrops(3, 7, [0.1, 0.4])), usual):
        loader = ViewLoader(images, IMAGE, STRONG, 0, CPU, workers=0, teacher_image=other if for_teacher else None)
        made.append(every_batch(Batches(needs, loader, 0, ROWS, BATCH, knn_bags(), stored()), 2))
    for batch, alone in zip(*made, strict=True):
        assert torch.equal(batch.anchor_views[0], alone.anchor_views[0])
        assert torch.equal(batch.anchor_for_teacher(0), alone.anchor_for_teacher(0))
        assert torch.equal(batch.member_for_teacher(0), alone.member_for_teacher(0))
        shown = [(batch.small_crops, IMAGE), *([(batch.live_small_crops, other)] if for_teacher else [])]
        assert (batch.live_small_crops is None) != for_teacher
        for got, image in shown:
            small = ViewLoader(images, image.model_copy(update={"crop_px": 7}), crops_alone, 0, CPU, workers=0)
            wanted = (Request(batch.host_rows_B, batch.host_rows_B, "small crop", 2, crop) for crop in range(3))
            want = torch.cat([next(small.views([[one]]))[0] for one in wanted])
            assert want.shape == (3 * BATCH, 3, 7, 7)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_same_view_equals_the_teachers_view_and_has_its_key(kind, request: pytest.FixtureRequest):
    images = request.getfixturevalue(kind)
    seen = set()
    for epoch in (0, 1):
        for batch in every_batch(batches(Needs(anchor_views=2, same_views=2, stored_keys=True), images), epoch):
            assert len(batch.anchor_keys) == 2
            for i, row in enumerate(batch.anchor_rows_B.tolist()):
                numbers = [int(keys[i, 0]) - row * VIEWS for keys in batch.anchor_keys]
                assert numbers[0] != numbers[1], "the two views of an anchor differ"
                assert set(numbers) <= set(range(VIEWS))
                seen.add(tuple(numbers))
                passed = teacher_views(images, row)
                for view, number in zip(batch.anchor_views, numbers, strict=True):
                    torch.testing.assert_close(view[i], passed[number], rtol=0, atol=0 if kind == "files" else 1e-6)
                    assert not torch.allclose(view[i], drawn(images, row, "extract", 0, number, STRONG), atol=1e-2)
    assert seen == set(permutations(range(VIEWS), 2)), "every pair of views occurs"


def test_a_large_jpeg_may_be_decoded_smaller_for_one_view_but_looks_similar(tmp_path):
    """The only case in which a redrawn view has other bytes: a JPEG file is decoded at a scale that suits every view of a plan, and
    training requests fewer views at a time than the teacher's pass."""
    differences = []
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    paths = []
    for row in range(ROWS):
        paths.append(f"{row}.jpg")
        noise.rotate(15 * row).resize((144, 112), Image.Resampling.BICUBIC).save(tmp_path / paths[-1], quality=95)
    images = FileImages(str(tmp_path), paths)
    for batch in every_batch(batches(Needs(anchor_views=1, same_views=1, stored_keys=True), images)):
        for i, row in enumerate(batch.anchor_rows_B.tolist()):
            passed = teacher_views(images, row)[int(batch.anchor_keys[0][i, 0]) - row * VIEWS]
            differences.append(float((batch.anchor_views[0][i] - passed).abs().mean()))
    assert np.median(differences) < 1e-6
    assert 0 < max(differences) < 0.03, "the standard deviation of pixels is about 1"


def test_stored_features_and_member_keys_belong_to_their_rows(memory):
    needs = Needs(anchor_views=1, member_views=1, stored_keys=True, stored_features=True)
    bags = knn_bags()
    for batch in every_batch(batches(needs, memory, bags)):
        rows, members = batch.anchor_rows_B.tolist(), batch.member_rows_B.tolist()
        assert batch.anchor_features_BD[:, 0].tolist() == rows
        assert [int(key) // VIEWS for key in batch.anchor_keys[0][:, 0]] == rows
        assert [int(key) // VIEWS for key in batch.member_keys_BP[:, 0]] == members
        for row, member in zip(rows, members, strict=True):
            assert member in (set(bags.members_TK[row].tolist()) - {-1} or {row})


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_weak_view_is_the_strong_one_without_changes_of_colour(kind, request: pytest.FixtureRequest):
    """The same crop, rotation and flip; the first view keeps its changes of colour."""
    images = request.getfixturevalue(kind)
    coloured = 0
    for batch in every_batch(batches(Needs(anchor_views=2, weak_views=1), images), epoch=1):
        for i, row in enumerate(batch.anchor_rows_B.tolist()):
            strong, weak = batch.anchor_views[0][i], batch.anchor_views[1][i]
            torch.testing.assert_close(strong, drawn(images, row, "anchor", 1, 0, STRONG), rtol=0, atol=1e-5)
            torch.testing.assert_close(weak, drawn(images, row, "anchor", 1, 1, NO_COLOURS), rtol=0, atol=1e-5)
            coloured += not torch.allclose(weak, drawn(images, row, "anchor", 1, 1, STRONG), atol=1e-2)
    assert coloured > ROWS / 2


@pytest.mark.parametrize("needs", [Needs(anchor_views=1, companions=2), Needs(1, stored_keys=True, same_views=1, companions=2)])
def test_companions_are_distinct_listed_members_after_their_anchors(memory, needs):
    bags, made = knn_bags(), None
    made = batches(needs, memory, bags)
    anchors_seen = []
    for batch in every_batch(made):
        rows = batch.anchor_rows_B.tolist()
        assert len(rows) == 3 * BATCH == len(batch.anchor_views[0])
        anchors_seen += rows[:BATCH]
        for i, anchor in enumerate(rows[:BATCH]):
            own, listed = [rows[BATCH + i], rows[2 * BATCH + i]], [m for m in bags.members_TK[anchor].tolist() if m >= 0]
            assert own == [anchor] * 2 if not listed else set(own) <= set(listed)
            assert len(set(own)) == min(2, max(1, len(listed)))
        for i, row in enumerate(rows):
            if needs.stored_keys:
                number = int(batch.anchor_keys[0][i, 0]) - row * VIEWS
                torch.testing.assert_close(batch.anchor_views[0][i], teacher_views(memory, row)[number], rtol=0, atol=1e-6)
            else:  # the key contains the anchor and the place, so that a row occurring twice has two views
                view = drawn(memory, row, "anchor", 0, i // BATCH, STRONG, seed_row=rows[i % BATCH])
                torch.testing.assert_close(batch.anchor_views[0][i], view, rtol=0, atol=1e-5)
    assert sorted(anchors_seen) == list(range(ROWS))


def test_a_row_that_occurs_twice_has_different_views(memory):
    """An anchor with an empty bag is its own companion, with three different views."""
    for batch in every_batch(batches(Needs(anchor_views=1, companions=2), memory, knn_bags())):
        rows = batch.anchor_rows_B.tolist()
        if 5 in rows[:BATCH]:
            first, second, third = (batch.anchor_views[0][rows[:BATCH].index(5) + place * BATCH] for place in range(3))
            assert not any(torch.allclose(a, b, atol=1e-2) for a, b in ((first, second), (first, third), (second, third)))
            return
    raise AssertionError("row 5 never occurred")


def test_draw_listed_equals_brute_force():
    """Members in the order of their numbers u, repeated if the bag is shorter than the count."""
    bags, rng = knn_bags(), np.random.default_rng(7)
    rows = rng.integers(0, ROWS, 500)
    rows[:100] = np.resize([2, 5, 6], 100)
    for count in (1, 2, 3, 5):
        u = rng.random((500, 3))
        got = bags.draw_listed(rows, u, count)
        for row, numbers, drawn_M in zip(rows, u, got, strict=True):
            listed = [(number, member) for number, member in zip(numbers, bags.members_TK[row], strict=True) if member >= 0]
            order = [int(member) for _, member in sorted(listed)] or [int(row)]
            assert drawn_M.tolist() == (order * count)[:count]
    orders = {tuple(x) for x in bags.draw_listed(np.full(400, 6), rng.random((400, 3)), 3).tolist()}
    assert orders == set(permutations(bags.members_TK[6].tolist())), "every order occurs"


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1e-5])
def test_weighted_draws_follow_the_exponential_of_the_cosine(temperature):
    """Frequencies over a uniform grid of u, exact to one point of the grid."""
    members = np.array([[1, 2, 3, 4], [3, 0, -1, -1], [-1] * 4, [0, 1, 2, 4], [0, 1, 2, 3]], np.int32)
    cosines = np.array([[0.9, 0.8, 0.75, 0.2], [0.5, 0.4, 0, 0], [0] * 4, [-0.1, -0.2, -0.3, -0.9], [0.3] * 4])
    similarity = np.where(members >= 0, cosines, -np.inf).astype(np.float16)
    bags = Bags({"method": "knn", "draw_temperature": temperature}, members, similarity)
    grid = (np.arange(4000) + 0.5) / 4000
    for row in range(5):
        got = bags.draw(np.full(4000, row), grid)
        listed = [(int(m), float(c)) for m, c in zip(members[row], similarity[row], strict=True) if m >= 0]
        if not listed:
            assert (got == row).all()
            continue
        highest = max(c for _, c in listed)
        weights = [np.exp((c - highest) / temperature) for _, c in listed]
        for (member, _), weight in zip(listed, weights, strict=True):
            assert (got == member).mean() == pytest.approx(weight / sum(weights), abs=1.01 / 4000)
        assert set(got.tolist()) <= {member for member, _ in listed}
    edges = bags.draw(np.arange(5), np.full(5, 1 - 2.0**-53))
    assert all(edges[row] in members[row] for row in (0, 1, 3, 4)), "u just below 1 draws a member"


def test_mutual_bags_against_a_double_loop():
    features = np.random.default_rng(9).standard_normal((40, 5)).astype(np.float32)
    plain, mutual = build_knn(features, 4), build_knn(features, 4, mutual=True)
    sizes = []
    for row in range(40):
        kept = [
            (int(other), float(cosine))
            for other, cosine in zip(plain.members_TK[row], plain.similarity_TK[row], strict=True)
            if row in plain.members_TK[other].tolist()
        ]
        sizes.append(len(kept))
        assert mutual.members_TK[row].tolist() == [other for other, _ in kept] + [-1] * (4 - len(kept))
        assert mutual.similarity_TK[row].tolist() == [cosine for _, cosine in kept] + [-np.inf] * (4 - len(kept))
    assert min(sizes) < 3 < max(sizes), "without bags of several lengths, nothing would be tested"
    assert mutual.bag_sizes_T.tolist() == sizes
    assert (mutual.members_TK.dtype, mutual.similarity_TK.dtype) == (np.int32, np.float16)


NEEDS: dict[str, Needs] = {
    "members": Needs(anchor_views=2, member_views=1),
    "companions": Needs(anchor_views=1, companions=2),
    "same views": Needs(anchor_views=2, same_views=2, stored_keys=True),
    "weak views": Needs(anchor_views=2, weak_views=1),
}


@pytest.mark.parametrize("name", list(NEEDS))
def test_two_epochs_differ_and_the_same_epoch_does_not(memory, name):
    made: Callable[[], Batches] = lambda: batches(NEEDS[name], memory, knn_bags())  # noqa: E731
    (first, again, other) = (every_batch(made(), epoch) for epoch in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.anchor_rows_B, b.anchor_rows_B)
        assert all(torch.equal(x, y) for x, y in zip(a.anchor_views + a.member_views, b.anchor_views + b.member_views, strict=True))
    by_row = [{row: what_row_saw(batch, i) for batch in epoch for i, row in enumerate(batch.anchor_rows_B.tolist()[:BATCH])}
              for epoch in (first, other)]  # fmt: skip
    assert set(by_row[0]) == set(by_row[1]) == set(range(ROWS))
    assert list(by_row[0]) != list(by_row[1]), "another order"
    same = sum(torch.equal(by_row[0][row], by_row[1][row]) for row in range(ROWS))
    most = ROWS // 2 if name == "same views" else 0  # there are six pairs of stored views, so one in six occurs again
    assert same <= most


def what_row_saw(batch: Batch, i: int) -> torch.Tensor:
    return torch.stack([views[i] for views in batch.anchor_views])


def test_a_resumed_epoch_continues_with_the_same_steps(memory):
    made = batches(Needs(anchor_views=1, same_views=1, stored_keys=True, companions=2), memory, knn_bags())
    whole, rest = every_batch(made), list(made.epoch(0, 2))
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.anchor_rows_B, b.anchor_rows_B)
        assert torch.equal(a.anchor_keys[0], b.anchor_keys[0])
        assert torch.equal(a.anchor_views[0], b.anchor_views[0])
