"""Linear evaluation: accuracy of an independent solver, one explicit step, the released protocol, and an unchanged backbone."""

import contextlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from bingo.evals.features import backbone_features
from bingo.evals.finetune import FROZEN, Task, random_crops
from bingo.evals.linear import Standardised, linear_on_crops, linear_on_features
from bingo.evals.scores import linear_layer
from bingo.images.images import MemoryImages
from bingo.nets.backbones import build_backbone
from bingo.params import CachedProbeParams, CropProbeParams, ImageParams
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import UserError

CPU = torch.device("cpu")
COSINE = {"drop_epochs": None, "drop_factor": 0.1, "hold_epochs": 0, "init_std": 0.01}
CACHED = CachedProbeParams(epochs=40, batch_images=64, lr=0.1, weight_decay=1e-3, **COSINE)
IMAGE = ImageParams(crop_px=12, resize_px=14, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
CROP = CropProbeParams(
    final_lr=0.0,
    nets=["student"],
    standardise=False,
    epochs=3,
    batch_images=16,
    lr=0.2,
    weight_decay=0.0,
    crop_scale=[0.5, 1.0],
    flip_p=0.0,
    **COSINE,
)


def digits(seed: int = 0):
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.data))
    features, labels = data.data[order].astype(np.float32), data.target[order].astype(np.int64)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


def coloured_squares(rows: int = 160):
    """Noise with a mean colour for each of 4 classes; 3/4 of the rows are for training, the others for testing."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 4
    colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [150, 150, 60]])
    pixels = colours[labels][:, None, None, :] + rng.normal(0, 30, (rows, 14, 14, 3))
    return MemoryImages(pixels.clip(0, 255).astype(np.uint8)), labels, np.arange(rows * 3 // 4), np.arange(rows * 3 // 4, rows)


def task(images: MemoryImages, labels: np.ndarray, train_rows: np.ndarray, test_rows: np.ndarray, crops) -> Task:
    return Task(images, labels, train_rows, test_rows, 4, IMAGE, random_crops(crops.crop_scale, crops.flip_p))


@pytest.mark.parametrize("seed", [0, 1])
def test_reaches_the_accuracy_of_logistic_regression(seed):
    train_X, train_y, test_X, test_y = digits(seed)
    mean, std = train_X.mean(0), train_X.std(0)
    std[std == 0] = 1
    # The same objective: weight decay w on a mean over N rows is C = 1 / (w N) on a sum.
    reference = LogisticRegression(max_iter=1000, C=1 / (CACHED.weight_decay * len(train_X)))
    reference.fit((train_X - mean) / std, train_y)
    score = linear_on_features(train_X, train_y, test_X, test_y, 10, CACHED, 0, CPU)[0]
    assert score["top1_last"] >= 100 * reference.score((test_X - mean) / std, test_y) - 1
    assert score["top1_last"] <= score["top1_best"] <= score["top5_best"]
    assert score["top5_last"] > 99
    assert 1 <= score["best_epoch"] <= CACHED.epochs


def test_does_not_depend_on_scale_or_offset_of_features_and_is_repeatable():
    train_X, train_y, test_X, test_y = digits()
    params = CACHED.model_copy(update={"epochs": 5})
    score = linear_on_features(train_X, train_y, test_X, test_y, 10, params, 0, CPU)[0]
    torch.rand(1)  # changes the state of torch's global generator, which is not used
    assert score == linear_on_features(train_X, train_y, test_X, test_y, 10, params, 0, CPU)[0]
    assert score == linear_on_features(train_X * 2**-10, train_y, test_X * 2**-10, test_y, 10, params, 0, CPU)[0]
    moved = linear_on_features(train_X + 32, train_y, test_X + 32, test_y, 10, params, 0, CPU)[0]
    assert moved["top1_last"] == pytest.approx(score["top1_last"], abs=0.5)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_the_saved_layer_is_applied_to_plain_features(offset):
    train_X, train_y, test_X, test_y = digits()
    moved, params = train_X + np.float32(offset), CACHED.model_copy(update={"epochs": 2})
    _, hits, layer = linear_on_features(moved, train_y, test_X + np.float32(offset), test_y, 10, params, 0, CPU)
    weight_CD, bias_C = layer["weight"].numpy(), layer["bias"].numpy()
    np.testing.assert_array_equal(((test_X + offset) @ weight_CD.T + bias_C).argmax(1) == test_y, hits)
    assert not weight_CD[:, train_X.std(0) == 0].any(), "a constant dimension is not used"


def test_read_only_float16_features_are_accepted_and_unchanged():
    train_X, train_y, test_X, test_y = digits()
    half = train_X.astype(np.float16)
    half.flags.writeable = False
    params = CACHED.model_copy(update={"epochs": 2})
    score = linear_on_features(half, train_y, test_X, test_y, 10, params, 0, CPU)[0]
    assert score == linear_on_features(train_X, train_y, test_X, test_y, 10, params, 0, CPU)[0]  # 0..16 are exact in float16
    np.testing.assert_array_equal(train_X, digits()[0])


def test_one_step_equals_softmax_regression():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((8, 3)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2, 0, 1])
    params = CachedProbeParams(epochs=1, batch_images=8, lr=0.5, weight_decay=0.1, **COSINE)
    layer = linear_layer(3, 3, 0.01, 0, "linear-cached", CPU)
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    scaled = (X.astype(np.float64) - X.mean(0)) / X.std(0)
    exponents = np.exp(scaled @ weight.T + bias)
    error = exponents / exponents.sum(1, keepdims=True) - np.eye(3)[y]
    weight = weight - 0.5 * (error.T @ scaled / 8 + 0.1 * weight)
    bias = bias - 0.5 * (error.mean(0) + 0.1 * bias)
    test_X, test_y = rng.standard_normal((200, 3)).astype(np.float32), rng.integers(0, 3, 200)
    logits = (test_X - X.mean(0)) / X.std(0) @ weight.T + bias
    score = linear_on_features(X, y, test_X, test_y, 3, params, 0, CPU)[0]
    assert score["top1_last"] == pytest.approx(100 * (logits.argmax(1) == test_y).mean())
    assert score["top5_last"] == 100  # of 3 classes
    assert score["best_epoch"] == 1


def test_the_initial_layer_is_as_published():
    layer = linear_layer(512, 1000, 0.01, 0, FROZEN, CPU)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not layer.bias.any()
    assert not torch.equal(layer.weight, linear_layer(512, 1000, 0.01, 1, FROZEN, CPU).weight)
    own = linear_layer(512, 1000, None, 0, FROZEN, CPU)  # torch's: weights and bias uniform in +-1 / sqrt(512)
    bound = 512**-0.5
    for values in (own.weight, own.bias):
        assert values.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_both_protocols_and_fine_tuning_start_with_init_std(tmp_path):
    """With a rate so small that nothing changes, the accuracy after the first step is that of the initial layer."""
    X, y, test_X, test_y = digits()
    images, labels, train_rows, test_rows = coloured_squares()
    backbone = build_backbone("resnet18", 0.125, "small", 0)
    still = {"epochs": 1, "lr": 1e-9}
    for std in (None, 0.5):
        cached = CACHED.model_copy(update=still | {"init_std": std})
        got = linear_on_features(X, y, test_X, test_y, 10, cached, 0, CPU)[0]["top1_last"]
        mean, deviation = X.mean(axis=0), X.std(axis=0)
        scaled = (test_X - mean) / np.where(deviation > 0, deviation, np.inf)
        with torch.no_grad():
            outputs = linear_layer(64, 10, std, 0, "linear-cached", CPU)(torch.from_numpy(scaled.astype(np.float32)))
        assert got == pytest.approx(100 * float((outputs.argmax(1).numpy() == test_y).mean()), abs=0.2)
        crops = CROP.model_copy(update=still | {"init_std": std})
        checkpoints = Checkpoints(tmp_path / str(std))
        what = task(images, labels, train_rows, test_rows, crops)
        got = linear_on_crops(backbone, what, crops, "fp32", 0, CPU, checkpoints)["top1_last"]
        features = torch.from_numpy(backbone_features(backbone, images, test_rows, IMAGE, CPU, "fp32", 16))
        with torch.no_grad():
            outputs = linear_layer(backbone.feature_width, 4, std, 0, FROZEN, CPU)(features)
        assert got == pytest.approx(100 * float((outputs.argmax(1).numpy() == labels[test_rows]).mean()), abs=0.1)


def test_the_number_of_threads_is_restored():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train_X, train_y, test_X, test_y = digits()
        linear_on_features(train_X, train_y, test_X, test_y, 10, CACHED.model_copy(update={"epochs": 1}), 0, CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_mistakes_are_named():
    train_X, train_y, test_X, test_y = digits()
    with pytest.raises(UserError, match=r"labels such as -1, allowed are 0..9"):
        linear_on_features(train_X, np.full_like(train_y, -1), test_X, test_y, 10, CACHED, 0, CPU)
    with pytest.raises(UserError, match="no test images"):
        linear_on_features(train_X, train_y, test_X[:0], test_y[:0], 10, CACHED, 0, CPU)
    train_X[3, 4] = np.nan
    with pytest.raises(UserError, match=r"nan or inf after 19 steps with lr = 0.1"):
        linear_on_features(train_X, train_y, test_X, test_y, 10, CACHED, 0, CPU)


def test_crops_learn_and_leave_the_backbone_untouched(tmp_path):
    images, labels, train_rows, test_rows = coloured_squares()
    backbone = build_backbone("resnet18", 0.125, "small", 0)
    seen_modes = []
    backbone.bn1.register_forward_hook(lambda layer, *_: seen_modes.append((layer.training, torch.is_grad_enabled())))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    folder = Checkpoints(tmp_path)
    score = linear_on_crops(backbone.train(), task(images, labels, train_rows, test_rows, CROP), CROP, "fp32", 0, CPU, folder)
    assert score["top1_last"] > 75  # of 4 classes; chance is 25
    assert set(score) == {"top1_last", "top5_last", "top1_best", "top5_best", "best_epoch"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert set(seen_modes) == {(False, False)}
    assert len(seen_modes) == 3 + 3 * 8  # 40 test images once, and 120 train images in each of 3 epochs
    assert all(module.training for module in backbone.modules())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_the_cosine_ends_at_final_lr(tmp_path):
    images, labels, train_rows, test_rows = coloured_squares(40)
    backbone, crops = build_backbone("resnet10t", 0.125, "small", 0), CROP.model_copy(update={"final_lr": 0.05})
    trainers: list = []
    kept = contextlib.contextmanager(lambda trainer: iter([trainers.append(trainer)]))
    what = task(images, labels, train_rows, test_rows, crops)
    linear_on_crops(backbone, what, crops, "fp32", 0, CPU, Checkpoints(tmp_path), kept)
    steps = crops.epochs * -(-len(train_rows) // crops.batch_images)
    want = 0.05 + (0.2 - 0.05) * (1 + np.cos(np.pi * (steps - 1) / steps)) / 2
    assert trainers[0].optimizer.param_groups[0]["lr"] == pytest.approx(want)


def test_standardised_features_are_those_of_umbc(tmp_path):
    """eval_linear.py, computed explicitly: centre views scaled to unit length, minus the mean, divided by sqrt(variance + 1e-5) of the
    train images."""
    images, labels, train_rows, test_rows = coloured_squares()
    backbone = build_backbone("resnet18", 0.125, "small", 0)
    rows = (IMAGE, CPU, "fp32", 16)
    train, test = (backbone_features(backbone, images, which, *rows).astype(np.float64) for which in (train_rows, test_rows))
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    want = (test - train.mean(axis=0)) / np.sqrt(train.var(axis=0, ddof=1) + 1e-5)
    net = Standardised(backbone, torch.from_numpy(backbone_features(backbone, images, train_rows, *rows)))
    np.testing.assert_allclose(backbone_features(net, images, test_rows, *rows), want, atol=1e-3)
    assert 0.5 < want.std() < 1.5
    standardised = CROP.model_copy(update={"standardise": True, "lr": 0.05})
    checkpoints = Checkpoints(tmp_path)
    score = linear_on_crops(backbone, task(images, labels, train_rows, test_rows, standardised), standardised, "fp32", 0, CPU, checkpoints)
    assert score["top1_last"] >= 75
    raw = CROP.model_copy(update={"lr": 0.05})
    checkpoints = Checkpoints(tmp_path / "raw")
    plain = linear_on_crops(backbone, task(images, labels, train_rows, test_rows, raw), raw, "fp32", 0, CPU, checkpoints)
    assert plain != score


def test_crops_differ_between_epochs_and_are_repeatable(tmp_path):
    images, labels, train_rows, test_rows = coloured_squares(32)
    inputs: list[torch.Tensor] = []

    class Pixels(nn.Module):
        feature_width = 3

        def forward(self, x):
            if len(x) == 24:
                inputs.append(x.clone())
            return x.mean(dim=(2, 3))

    params = CROP.model_copy(update={"batch_images": 24, "epochs": 2})
    scores = [
        linear_on_crops(
            Pixels(), task(images, labels, train_rows, test_rows, params), params, "fp32", 0, CPU, Checkpoints(tmp_path / str(run))
        )
        for run in range(2)
    ]
    assert scores[0] == scores[1]
    assert torch.equal(inputs[0], inputs[2])
    assert torch.equal(inputs[1], inputs[3])
    assert not torch.isclose(inputs[0].sum(dim=(1, 2, 3)).sort().values, inputs[1].sum(dim=(1, 2, 3)).sort().values).all()


@pytest.mark.parametrize("training", [True, False])
def test_features_are_a_forward_of_centre_views(training):
    images, _, _, rows = coloured_squares(32)
    backbone = build_backbone("resnet18", 0.125, "small", 0).train(training)
    features = backbone_features(backbone, images, rows[::-1], IMAGE, CPU, "fp32", batch_images=3)
    assert backbone.training == training
    # Images of 14 px are not resized: the centre view is the middle 12 px.
    pixels = torch.from_numpy(images.images_NSS3[rows[::-1]]).permute(0, 3, 1, 2)[:, :, 1:13, 1:13].float() / 255
    mean, std = torch.tensor(IMAGE.mean)[:, None, None], torch.tensor(IMAGE.std)[:, None, None]
    with torch.no_grad():
        expected = backbone.eval()((pixels - mean) / std).numpy()
    assert features.dtype == np.float32
    assert features.shape == (8, 64)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
