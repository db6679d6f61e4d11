"""Narrower keys: principal components compared with numpy's singular vectors, and a teacher with them from images to file."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from workspace import SHORT, new_workspace

from bingo.embeddings.store import read_embeddings
from bingo.images.images import MemoryImages
from bingo.images.listing import read_listing
from bingo.images.loader import center_views
from bingo.nets.backbones import build_backbone
from bingo.nets.heads import describe_head, mlp_head
from bingo.params import ImageParams, TeacherParams, read_yaml
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import Teacher, load_teacher, save_teacher, teacher_metadata
from bingo.training import narrow_keys
from bingo.training.narrow_keys import narrowed, principal_components

CPU = torch.device("cpu")
IMAGE = ImageParams(crop_px=10, resize_px=12, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
ROWS, SEED = 60, 3


@dataclass(frozen=True)
class Reference:
    """With numpy: centred rows, singular values and right singular vectors."""

    mean: np.ndarray
    variances: np.ndarray
    vectors: np.ndarray


def by_numpy(x_ND: np.ndarray) -> Reference:
    mean = x_ND.mean(axis=0)
    _, singular, vectors = np.linalg.svd(x_ND - mean, full_matrices=False)
    signs = np.sign(vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)])
    return Reference(mean, singular**2 / len(x_ND), vectors * signs[:, None])


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("block_rows", [7, 500])
def test_components_are_the_right_singular_vectors_of_the_centred_rows(whiten, block_rows):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, 9)) * np.arange(1, 10) @ rng.standard_normal((9, 9)) + 5).astype(np.float32)
    mean, components = principal_components(torch.from_numpy(x).split(block_rows), 4, whiten)
    want = by_numpy(x.astype(np.float64))
    wanted = want.vectors[:4] / (np.sqrt(want.variances[:4, None]) if whiten else 1)
    np.testing.assert_allclose(mean.numpy(), want.mean, rtol=1e-6)
    np.testing.assert_allclose(components.numpy(), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    if whiten:
        projected = (x - want.mean) @ components.numpy().T
        np.testing.assert_allclose(np.cov(projected.T, bias=True), np.eye(4), atol=1e-3)


def test_rows_in_a_plane_can_be_whitened():
    """Components without variance are not scaled to infinity."""
    x = torch.randn(40, 2) @ torch.randn(2, 6)
    _, components = principal_components([x], 5, whiten=True)
    assert torch.isfinite(components).all()
    assert components.abs().max() < 1e4


def teacher_params(key_width: int, whiten: bool = False) -> TeacherParams:
    changes = {"source": "random", "arch": "resnet18", "width": 0.125, "key_width": key_width, "key_whiten": whiten}
    return TeacherParams.model_validate(read_yaml("params.yaml")["teacher"] | changes)


def parts(with_head: bool):
    backbone = build_backbone("resnet18", 0.125, "small", 1)
    return backbone, mlp_head([64, 32, 24], 2) if with_head else None


@pytest.fixture
def images() -> MemoryImages:
    return MemoryImages(np.random.default_rng(0).integers(0, 256, (ROWS + 5, 12, 12, 3), dtype=np.uint8))


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
def test_keys_are_normalised_components_of_unit_keys_also_in_the_file(tmp_path, images, with_head, whiten):
    params, (backbone, head) = teacher_params(6, whiten), parts(with_head)
    wide = Teacher(*parts(with_head), {})
    narrow = narrowed(backbone, head, params, IMAGE, images, ROWS, SEED, CPU)
    (views,) = center_views(images, np.arange(ROWS + 5), IMAGE, CPU, 100)
    keys = wide.keys(views).double().numpy()
    reference = by_numpy(keys[:ROWS])  # of train images only
    want = (keys - reference.mean) @ reference.vectors[:6].T / (np.sqrt(reference.variances[:6]) if whiten else 1)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    metadata = teacher_metadata(params, IMAGE, backbone, narrow, {"source": "random", "pretrained": False})
    assert (metadata["key_width"], metadata["feature_width"]) == (6, 64)
    save_teacher(tmp_path / "teacher.safetensors", backbone, narrow, metadata)
    for teacher in (Teacher(backbone, narrow, metadata), load_teacher(tmp_path / "teacher.safetensors")):
        np.testing.assert_allclose(teacher.keys(views).numpy(), want, rtol=0, atol=2e-3)
        np.testing.assert_allclose(teacher.features(views).numpy(), wide.features(views).numpy(), rtol=1e-5, atol=1e-6)


def test_of_many_images_a_fixed_subset_is_read(images, monkeypatch):
    monkeypatch.setattr(narrow_keys, "FITTED_IMAGES", 20)
    read = []
    real = narrow_keys.center_views
    monkeypatch.setattr(narrow_keys, "center_views", lambda images, rows, *rest: read.append(rows) or real(images, rows, *rest))
    heads = [narrowed(*parts(True), teacher_params(6), IMAGE, images, ROWS, SEED, CPU) for _ in range(2)]
    assert [len(set(rows.tolist())) for rows in read] == [20, 20]
    assert max(read[0]) < ROWS
    assert all(torch.equal(a, b) for a, b in zip(*(head.state_dict().values() for head in heads), strict=True)), "always the same"
    assert describe_head(heads[0]) == {"layers": ["linear", "relu", "linear", "unit", "linear"], "widths": [64, 32, 24, 6]}


@pytest.mark.parametrize(("with_head", "key_width", "train_rows", "words"), [
    (True, 24, ROWS, "teacher.key_width = 24: the teacher's keys are 24 wide"),
    (False, 100, ROWS, "teacher.key_width = 100: the teacher's keys are 64 wide"),
    (False, 30, 30, "teacher.key_width = 30: there are 30 train images"),
])  # fmt: skip
def test_too_wide_is_refused(images, with_head, key_width, train_rows, words):
    with pytest.raises(UserError, match=f"^{words}"):
        narrowed(*parts(with_head), teacher_params(key_width), IMAGE, images, train_rows, SEED, CPU)


def test_normalisation_can_be_a_layer_of_a_head():
    head = nn.Sequential(narrow_keys.Unit())
    np.testing.assert_allclose(head(torch.tensor([[3.0, 4.0]])).numpy(), [[0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("source", ["random", "pretrain"])
def test_the_stages_train_on_narrow_keys_stored_and_live(tmp_path, stages, source):
    """As many images as in other tests of stages, and one epoch; the teacher's file, the store and the student's head have width 6."""
    small = {"teacher.source": source, "teacher.key_width": 6, "extract.views": 2, "distill.method": "simreg", "distill.epochs": 1}
    epochs = {"teacher.pretrain.epochs": 1, "teacher.pretrain.lr_warmup_epochs": 0, "distill.lr_warmup_epochs": 0}
    workspace = new_workspace(tmp_path / "bingo", stages, SHORT | small | epochs)
    for stage in ("scan", "teacher", "extract", "bag", "distill"):
        workspace.done(stage)
    listing = read_listing(workspace.root / "data/listing.parquet")
    embeddings = read_embeddings(workspace.root / "data/embeddings.zarr", listing)
    teacher = load_teacher(workspace.root / "models/teacher.safetensors")
    assert (embeddings.key_width, teacher.metadata["key_width"]) == (6, 6)
    np.testing.assert_allclose(np.linalg.norm(embeddings.keys_TVP.astype(np.float64), axis=2), 1, atol=2e-3)
    workspace.edit({"distill.keys": "live"})
    workspace.done("distill")
