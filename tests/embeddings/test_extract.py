"""The teacher pass: the values of a plain loop, the same bytes when resumed or shared, and refusal of useless features."""

import errno
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from published import lively
from torch import nn

from bingo.embeddings import extract
from bingo.embeddings import store as stores
from bingo.embeddings.extract import extract_embeddings
from bingo.embeddings.store import read_embeddings
from bingo.evals.teacher_check import teacher_quality
from bingo.images import loader
from bingo.images.augment import center_view
from bingo.images.images import FileImages, MemoryImages
from bingo.images.listing import Listing
from bingo.images.loader import Request, ViewLoader, center_views
from bingo.nets.backbones import build_backbone
from bingo.nets.heads import layered_head, mlp_head
from bingo.params import AugmentParams, ExtractParams, ImageParams
from bingo.runtime import task_loader
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import Teacher
from tests.processes import start_two

CPU = torch.device("cpu")
IMAGE = ImageParams(crop_px=10, resize_px=12, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
AUGMENT = AugmentParams(
    crop_scale=[0.3, 1.0], crop_ratio=[0.75, 1.3333], rotate_degrees=0, jitter=[0.4, 0.4, 0.4, 0.1], jitter_p=0.8, gray_p=0.2, blur_p=0.5,
    blur_sigma_px=[0.1, 2.0], flip_p=0.5,
)  # fmt: skip
EXTRACT = ExtractParams(views=3, batch_images=5, chunk_rows=8, precision="fp32", augment=AUGMENT)
MANY_CHUNKS = EXTRACT.model_copy(update={"chunk_rows": 1})
ROWS, TRAIN_ROWS, WIDTH, KEY_WIDTH = 29, 21, 64, 6  # chunks of 8, 8, 8 (5 of them for training) and 5 rows


def listing(rows: int = ROWS, train_rows: int = TRAIN_ROWS) -> Listing:
    paths = [f"{row}.png" for row in range(rows)]
    return Listing("made", paths, np.arange(rows) % 2, train_rows, ["even", "odd"], [], "aa11")


def pixels(rows: int = ROWS) -> np.ndarray:
    """Noise, brighter in odd rows."""
    noise = np.random.default_rng(0).integers(0, 200, (rows, 12, 12, 3))
    return (noise + 55 * (np.arange(rows) % 2)[:, None, None, None]).astype(np.uint8)


def small_teacher() -> Teacher:
    metadata = {"arch": "resnet18", "width": 0.125, "stem": "small", "feature_width": WIDTH, "key_width": KEY_WIDTH, **IMAGE.model_dump()}
    backbone = build_backbone("resnet18", 0.125, "small", 1)
    return Teacher(backbone, mlp_head([WIDTH, 16, KEY_WIDTH], 2), metadata)


def run(folder: Path, teacher=None, images=None, params=EXTRACT, seed=0) -> Path:
    """Extract into `folder`/out, with the state in the same folder."""
    images = MemoryImages(pixels()) if images is None else images
    teacher = small_teacher() if teacher is None else teacher
    rows = listing(len(images), min(TRAIN_ROWS, len(images)))
    state, out = folder / "state", folder / "out"
    extract_embeddings(teacher, rows, images, params, seed, state, out, CPU, {"teacher": "bb22"})
    return out


def content(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The store of an uninterrupted pass by one process."""
    return run(tmp_path_factory.mktemp("whole"))


def test_values_are_those_of_a_plain_loop(whole):
    embeddings, teacher, images = read_embeddings(whole, listing()), small_teacher(), MemoryImages(pixels())
    loader = ViewLoader(images, IMAGE, AUGMENT, 0, CPU)
    for row in range(ROWS):
        (center,) = center_views(images, [row], IMAGE, CPU, 1)
        np.testing.assert_allclose(embeddings.features_ND[row], teacher.features(center)[0].numpy(), rtol=2e-3, atol=1e-4)
    for row in range(TRAIN_ROWS):
        for view in range(EXTRACT.views):
            ((x,),) = loader.views([[Request(np.array([row]), np.array([row]), "extract", 0, view)]])
            np.testing.assert_allclose(embeddings.keys_TVP[row, view], teacher.keys(x)[0].numpy(), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(embeddings.keys_TVP.astype(np.float64), axis=2), 1, atol=1e-3)
    assert embeddings.attrs["teacher"] == "bb22"
    assert embeddings.attrs["recipe"] == {"extract": EXTRACT.model_dump(), "image": IMAGE.model_dump(), "seed": 0}


def test_one_chunk_and_batches_larger_than_it_give_the_same_values(whole, tmp_path):
    for views, batch_images, chunk_rows in ((3, 64, 8192), (3, 2, 7)):
        params = ExtractParams(views=views, batch_images=batch_images, chunk_rows=chunk_rows, precision="fp32", augment=AUGMENT)
        other, first = read_embeddings(run(tmp_path, params=params), listing()), read_embeddings(whole, listing())
        np.testing.assert_allclose(other.features_ND, first.features_ND, rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(other.keys_TVP, first.keys_TVP, rtol=2e-3, atol=1e-3)


def test_files_and_memory_are_both_read(tmp_path, monkeypatch):
    monkeypatch.setattr(task_loader, "worker_count", lambda: 0)
    for row, image in enumerate(pixels()):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
    images = FileImages(str(tmp_path), listing().paths)
    embeddings, teacher = read_embeddings(run(tmp_path, images=images), listing()), small_teacher()
    centers = torch.cat(list(center_views(images, np.arange(ROWS), IMAGE, CPU, 4)))
    np.testing.assert_allclose(embeddings.features_ND, teacher.features(centers).numpy(), rtol=2e-3, atol=1e-4)
    rows = np.arange(TRAIN_ROWS)
    for view in range(EXTRACT.views):
        ((x,),) = ViewLoader(images, IMAGE, AUGMENT, 0, CPU).views([[Request(rows, rows, "extract", 0, view)]])
        np.testing.assert_allclose(embeddings.keys_TVP[:, view], teacher.keys(x).numpy(), rtol=2e-3, atol=1e-3)


def test_keys_of_a_wide_head_with_batchnorm_are_stored(tmp_path):
    small = small_teacher()
    head = lively(layered_head(["linear_no_bias", "batchnorm_no_affine"], [WIDTH, 8192]))
    teacher = Teacher(small.backbone, head, small.metadata | {"key_width": 8192})
    embeddings = read_embeddings(run(tmp_path, teacher), listing())
    assert embeddings.keys_TVP.shape == (TRAIN_ROWS, EXTRACT.views, 8192)
    rows = np.arange(TRAIN_ROWS)
    ((x,),) = ViewLoader(MemoryImages(pixels()), IMAGE, AUGMENT, 0, CPU).views([[Request(rows, rows, "extract", 0, 1)]])
    np.testing.assert_allclose(embeddings.keys_TVP[:, 1], teacher.keys(x).numpy(), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(embeddings.keys_TVP.astype(np.float64), axis=2), 1, atol=1e-3)


def test_without_views_only_features_are_stored_and_a_killed_pass_resumes(whole, tmp_path, monkeypatch):
    params, seen, write = EXTRACT.model_copy(update={"views": 0}), [], stores.EmbeddingsWriter.write_chunk

    def killed(self, chunk, *arrays):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(chunk)
        write(self, chunk, *arrays)

    monkeypatch.setattr(stores.EmbeddingsWriter, "write_chunk", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, params=params)
    monkeypatch.setattr(stores.EmbeddingsWriter, "write_chunk", write)
    embeddings = read_embeddings(run(tmp_path, params=params), listing())
    assert embeddings.keys_TVP.shape == (TRAIN_ROWS, 0, KEY_WIDTH)
    np.testing.assert_array_equal(embeddings.features_ND, read_embeddings(whole, listing()).features_ND)


@pytest.mark.parametrize(("batch_images", "chunk_rows"), [(512, 8192), (5, 8), (8, 8), (3, 1)])
def test_no_view_is_made_that_the_teacher_does_not_see(tmp_path, monkeypatch, batch_images, chunk_rows):
    made: list[int] = []

    def counted(images_BSS3, image):
        made.append(len(images_BSS3))
        return center_view(images_BSS3, image)

    monkeypatch.setattr(loader, "center_view", counted)
    params = ExtractParams(views=1, batch_images=batch_images, chunk_rows=chunk_rows, precision="fp32", augment=AUGMENT)
    run(tmp_path, params=params)
    assert sum(made) == ROWS
    assert max(made) == min(batch_images, chunk_rows, ROWS)


def counting_teacher() -> tuple[Teacher, list[int]]:
    """A teacher, and the number of images in each of its forward passes."""
    teacher, seen = small_teacher(), []
    teacher.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return teacher, seen


@pytest.mark.parametrize("damage", ["none", "unfinished file", "not on the list"])
def test_an_interrupted_pass_resumes_and_ends_with_the_same_bytes(whole, tmp_path, monkeypatch, damage):
    write, state = stores.EmbeddingsWriter.write_chunk, tmp_path / "state"

    def fail_at_chunk_1(writer, chunk, *arrays):
        if chunk == 1:
            raise KeyboardInterrupt
        write(writer, chunk, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(stores.EmbeddingsWriter, "write_chunk", fail_at_chunk_1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert [path.name for path in (state / "done").iterdir()] == ["0"]
    assert not (tmp_path / "out").exists()
    if damage == "unfinished file":  # left behind by zarr when it is killed
        folder = state / "embeddings.zarr/features/c/1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "0.abc.partial").write_bytes(b"half")
    if damage == "not on the list":
        (state / "done/0").unlink()
    teacher, seen = counting_teacher()
    run(tmp_path, teacher)
    assert sum(seen) == ROWS + 3 * TRAIN_ROWS - (0 if damage == "not on the list" else 8 + 3 * 8)
    assert content(tmp_path / "out") == content(whole)


def test_the_state_of_other_settings_is_not_used_and_a_finished_one_is_used_whole(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(extract._Unfinished, "publish", lambda *_: None)
        run(tmp_path, seed=1)
    teacher, seen = counting_teacher()
    for _ in range(2):
        run(tmp_path, teacher)
        assert content(tmp_path / "out") == content(whole)
    assert sum(seen) == ROWS + 3 * TRAIN_ROWS


def test_state_on_another_disk(whole, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    finish = stores.EmbeddingsWriter.finish

    def finish_elsewhere(writer, target):
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", refuse)
            finish(writer, target)

    monkeypatch.setattr(stores.EmbeddingsWriter, "finish", finish_elsewhere)
    assert content(run(tmp_path)) == content(whole)


def join_and_run(rank: int, folder: Path) -> None:
    """One of two processes. It extracts twice completely, the second time with many chunks and a slow process; then again, and the process
    that gets chunk 3 kills itself before writing it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run(folder / "whole")
    write = extract._Unfinished.write

    def write_slowly(store, chunk, *arrays):
        (folder / f"by-{rank}-{chunk}").touch()
        time.sleep(0.25 * rank)
        write(store, chunk, *arrays)

    extract._Unfinished.write = write_slowly
    run(folder / "many", params=MANY_CHUNKS)

    def write_or_die(store, chunk, *arrays):
        if chunk == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write(store, chunk, *arrays)

    extract._Unfinished.write = write_or_die
    run(folder / "killed")


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_and_one_continues_after_a_kill(whole, tmp_path):
    # The error names the killed process or the one that waits for it in vain, whichever is noticed first.
    with pytest.raises((torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException)):
        start_two(join_and_run, tmp_path)
    assert content(tmp_path / "whole/out") == content(whole)
    assert content(tmp_path / "many/out") == content(run(tmp_path / "by one", params=MANY_CHUNKS))
    shares = [{file.name.rpartition("-")[2] for file in tmp_path.glob(f"by-{rank}-*")} for rank in (0, 1)]
    assert shares[0] | shares[1] == {str(chunk) for chunk in range(ROWS)}
    assert not shares[0] & shares[1]
    assert len(shares[0]) > len(shares[1]) > 0, "the fast process does more"
    done = {path.name for path in (tmp_path / "killed/state/done").iterdir()}
    assert done
    assert "3" not in done
    teacher, seen = counting_teacher()
    assert content(run(tmp_path / "killed", teacher)) == content(whole)
    assert sum(seen) < ROWS + 3 * TRAIN_ROWS


@pytest.mark.parametrize("views", [0, 3])
def test_a_process_claims_chunks_late_although_files_are_read_ahead(tmp_path, monkeypatch, views):
    """With a worker that reads two tasks ahead, each a batch of centre views: none of the many chunks of test rows is claimed early."""
    monkeypatch.setattr(task_loader, "worker_count", lambda: 1)
    for row, image in enumerate(pixels()):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
    taken, ahead, take, write = [], [], extract.taken_first, extract._Unfinished.write
    monkeypatch.setattr(extract, "taken_first", lambda mark: taken.append(int(mark.name)) or take(mark))
    monkeypatch.setattr(extract._Unfinished, "write", lambda store, chunk, *x: ahead.append(len(taken) - chunk) or write(store, chunk, *x))
    params = MANY_CHUNKS.model_copy(update={"views": views})
    run(tmp_path, images=FileImages(str(tmp_path), listing().paths), params=params)
    assert taken == list(range(ROWS))
    assert max(ahead) <= 6


class Pooled(nn.Module):
    """Mean colours, after `change`."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x.mean(dim=(2, 3)))


def plain_teacher(change) -> Teacher:
    return Teacher(Pooled(change), None, {"feature_width": 3, "key_width": 3, **IMAGE.model_dump()})


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_numbers_that_are_not_finite_are_refused_with_their_row(tmp_path, bad):
    images = pixels() // 2
    images[10] = 255
    teacher = plain_teacher(lambda x: torch.where(x.mean(dim=1, keepdim=True) > 1.5, bad, x))
    with pytest.raises(UserError, match="row 10 "):
        run(tmp_path, teacher, MemoryImages(images))
    assert not (tmp_path / "out").exists()


def test_constant_features_are_refused_but_a_constant_chunk_is_not(tmp_path):
    teacher = plain_teacher(torch.ones_like)
    for _ in range(2):
        with pytest.raises(UserError, match="gives all 29 images the same feature"):
            run(tmp_path, teacher)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "one", teacher, MemoryImages(pixels(1)))
    images = pixels()
    images[8:16] = images[8]
    run(tmp_path / "chunk", plain_teacher(torch.clone), MemoryImages(images))


def test_features_or_keys_that_differ_only_by_rounding_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"gives all 29 images the same feature \(they differ by .* of their length\)"):
        run(tmp_path / "rounding", plain_teacher(lambda x: 1 + 1e-4 * x))
    with pytest.raises(UserError, match="gives all 29 images the same feature"):
        run(tmp_path / "zeros", plain_teacher(torch.zeros_like))
    constant = nn.Linear(3, 3)
    nn.init.zeros_(constant.weight)
    metadata = {"feature_width": 3, "key_width": 3, **IMAGE.model_dump()}
    with pytest.raises(UserError, match="gives all 21 images the same key"):
        run(tmp_path / "keys", Teacher(Pooled(torch.clone), constant, metadata))
    unequal = torch.tensor([1.0, -1.0, 0.5])  # otherwise all keys would point the same way
    run(tmp_path / "near", plain_teacher(lambda x: 1 + 2e-2 * x * unequal))


def test_spreads_are_those_of_the_whole_store(whole, tmp_path, monkeypatch):
    found = {}
    publish = extract._Unfinished.publish
    monkeypatch.setattr(
        extract._Unfinished, "publish", lambda store, out: (found.update({k: s for k, _, s in store._spreads()}), publish(store, out))
    )
    embeddings = read_embeddings(run(tmp_path), listing())
    for kind, x in (("feature", embeddings.features_ND), ("key", embeddings.keys_TVP.reshape(-1, KEY_WIDTH))):
        x = x.astype(np.float64)
        assert found[kind] == pytest.approx(np.sqrt(x.var(axis=0).sum() / (x**2).sum(axis=1).mean()), rel=1e-6)


def test_returned_rate_counts_every_view(tmp_path, monkeypatch):
    ticks = iter([10.0, 14.0])
    monkeypatch.setattr(extract, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    state, out = tmp_path / "state", tmp_path / "out"
    images = MemoryImages(pixels())
    rate = extract_embeddings(small_teacher(), listing(), images, EXTRACT, 0, state, out, CPU, {"teacher": "b"})
    assert rate == (ROWS + 3 * TRAIN_ROWS) / 4


@pytest.mark.parametrize("test_rows", [8, 0])
def test_teacher_quality_is_compared_with_an_untrained_network_and_chance(tmp_path, test_rows):
    images, train_rows = MemoryImages(pixels()), ROWS - test_rows
    of_images = listing(train_rows=train_rows)
    teacher = plain_teacher(torch.clone)
    teacher.metadata |= {"arch": "resnet18", "width": 0.125, "stem": "small"}
    extract_embeddings(teacher, of_images, images, EXTRACT, 0, tmp_path / "state", tmp_path / "out", CPU, {"teacher": "b"})
    embeddings = read_embeddings(tmp_path / "out", of_images)
    quality = teacher_quality(embeddings, of_images, images, teacher, 0, CPU)
    assert quality["teacher_knn"] == 100.0  # mean colours distinguish even from odd rows
    assert 20 <= quality["chance"] <= 80
    assert 0 <= quality["random_knn"] <= 100
