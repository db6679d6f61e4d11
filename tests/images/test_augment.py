"""Batched views against torchvision, one image at a time: equal for given parameters, and equally distributed for random ones."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from bingo.images import augment as au
from bingo.images import colours as co
from bingo.images.draws import BRIGHTNESS, CONTRAST, CROP_TRIES, HUE, SATURATION, Colours, Crops, crop_boxes, draw_views
from bingo.params import AugmentParams, BicubicImageParams, ImageParams

ROWS = 6000
MOCO2 = AugmentParams(
    crop_scale=[0.2, 1.0],
    crop_ratio=[0.75, 4 / 3],
    rotate_degrees=0,
    jitter=[0.4, 0.4, 0.4, 0.1],
    jitter_p=0.8,
    gray_p=0.2,
    blur_p=0.5,
    blur_sigma_px=[0.1, 2.0],
    flip_p=0.5,
)
PLAIN = MOCO2.model_copy(update={"jitter": [0.0] * 4, "gray_p": 0.0, "blur_p": 0.0, "flip_p": 0.0})
IMAGE = ImageParams(crop_px=20, resize_px=20, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def random_images(count: int, side_px: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side_px, side_px, 3), dtype=np.uint8))


def unit_images(count: int, side_px: int) -> torch.Tensor:
    return au.to_unit(random_images(count, side_px))


def colours(count: int, operations=((-1,),), factors=((1.0,),), gray=False, sigma=0.0) -> Colours:
    operation_BO = np.broadcast_to(np.array(operations), (count, np.shape(operations)[1]))
    factor_BO = np.broadcast_to(np.array(factors), operation_BO.shape)
    return Colours(operation_BO, factor_BO, np.full(count, gray), np.full(count, sigma), np.zeros(count))


def recolour(x: torch.Tensor, drawn: Colours, augment: AugmentParams) -> torch.Tensor:
    """Coloured images, not normalised."""
    recolouring = co.Recolouring(drawn, augment, x.shape[3])
    numbers = [torch.from_numpy(number) for number in recolouring.numbers]
    return recolouring(x[recolouring.order_B], numbers, IMAGE.model_copy(update={"mean": [0.0] * 3, "std": [1.0] * 3}))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("side_px", "out_px"), [(20, 20), (33, 20), (20, 48), (64, 15)])
def test_crop_equals_resized_crop(side_px, out_px, interpolation):
    images = random_images(40, side_px)
    rng = np.random.default_rng(1)
    size = rng.integers(1, side_px + 1, (40, 2))
    boxes = np.concatenate([rng.integers(0, side_px + 1 - size), size], axis=1)
    flips = rng.random(40) < 0.5
    got = au.crop_and_resize(images, torch.from_numpy(au.crop_lines(boxes, flips, out_px)), out_px, interpolation)
    for b, (box, flip) in enumerate(zip(boxes.tolist(), flips, strict=True)):
        want = tv.resized_crop(au.to_unit(images[b : b + 1]), *box, [out_px, out_px], tv.InterpolationMode(interpolation), antialias=True)
        want = want.clamp(0, 1)  # as Pillow does with bytes
        torch.testing.assert_close(got[b : b + 1], tv.hflip(want) if flip else want, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("operation", "function", "factors"),
    [
        (BRIGHTNESS, tv.adjust_brightness, (0.0, 0.6, 1.0, 1.4)),
        (CONTRAST, tv.adjust_contrast, (0.0, 0.6, 1.0, 1.4)),
        (SATURATION, tv.adjust_saturation, (0.0, 0.6, 1.0, 1.4)),
        (HUE, tv.adjust_hue, (-0.5, -0.1, 0.0, 0.07, 0.5)),
    ],
)
def test_jitter_equals_torchvision(operation, function, factors):
    for factor in factors:
        x = unit_images(5, 20)
        x[3] = x[3, :1]  # a grey image
        want = torch.stack([function(image, factor) for image in x])
        got = recolour(x, colours(5, [[operation]], [[factor]]), MOCO2)
        torch.testing.assert_close(got, want, atol=3e-6, rtol=0)


def test_rotate_equals_torchvision():
    x, angles = unit_images(7, 21), [-180.0, -33.0, -1.0, 0.0, 12.5, 45.0, 90.0]
    want = torch.stack([tv.rotate(image, angle, tv.InterpolationMode.BILINEAR) for image, angle in zip(x, angles, strict=True)])
    torch.testing.assert_close(co.rotate(x, torch.from_numpy(co.turning(np.array(angles, np.float32))).float()), want, atol=3e-6, rtol=0)


def test_angles_are_uniform_and_absent_if_not_requested():
    turning = MOCO2.model_copy(update={"rotate_degrees": 15})
    _, drawn = draw_views(turning, 3, "test", 1, np.arange(ROWS), 0)
    assert np.abs(np.sort(drawn.angle_B) - np.linspace(-15, 15, ROWS)).max() < 0.8
    assert not draw_views(MOCO2, 3, "test", 1, np.arange(9), 0)[1].angle_B.any()


def test_each_image_has_its_own_order_and_factors():
    _, drawn = draw_views(MOCO2, 3, "test", 1, np.arange(60), 0)
    functions = {
        BRIGHTNESS: tv.adjust_brightness,
        CONTRAST: tv.adjust_contrast,
        SATURATION: tv.adjust_saturation,
        HUE: tv.adjust_hue,
    }
    x = unit_images(60, 20)
    got = recolour(x, drawn, MOCO2)
    for b, want in enumerate(x):
        for operation, factor in zip(drawn.operation_BO[b].tolist(), drawn.factor_BO[b].tolist(), strict=True):
            want = functions[operation](want, factor) if operation >= 0 else want
        want = tv.rgb_to_grayscale(want, 3) if drawn.gray_B[b] else want
        if sigma := float(drawn.sigma_B[b]):
            want = tv.gaussian_blur(want, [13, 13], [sigma, sigma])
        torch.testing.assert_close(got[b], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side_px", "sigma"), [(20, 0.1), (20, 0.7), (20, 2.0), (40, 1.3)])
def test_blur_equals_torchvision(side_px, sigma):
    x = unit_images(3, side_px)
    want = tv.gaussian_blur(x, [13, 13], [sigma, sigma])
    torch.testing.assert_close(co.blur(x, torch.from_numpy(co.blur_kernels(np.full(3, sigma), 2.0, side_px))), want, atol=2e-6, rtol=0)


def test_blur_of_a_tiny_image_keeps_the_mean_of_a_flat_one():
    x = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(co.blur(x, torch.from_numpy(co.blur_kernels(np.array([2.0]), 2.0, 4))), x)


@pytest.mark.parametrize("kind", [ImageParams, BicubicImageParams])
@pytest.mark.parametrize(("side_px", "resize_px", "crop_px"), [(20, 20, 20), (64, 40, 32), (20, 26, 21)])
def test_center_view_equals_torchvision(side_px, resize_px, crop_px, kind):
    image = kind(**IMAGE.model_dump()).model_copy(update={"resize_px": resize_px, "crop_px": crop_px})
    images = random_images(4, side_px)
    resized = tv.resize(au.to_unit(images), resize_px, tv.InterpolationMode(image.interpolation), antialias=True).clamp(0, 1)
    want = tv.normalize(tv.center_crop(resized, crop_px), image.mean, image.std)
    got = au.center_view(images, image)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_random_views_are_crop_colour_normalise():
    images = random_images(30, 24)
    crops, drawn = draw_views(MOCO2, 0, "test", 0, np.arange(30), 2)
    lines = torch.from_numpy(au.crop_lines(crop_boxes(crops, 24, 24), crops.flip_B, 20))
    x = recolour(au.crop_and_resize(images, lines, 20), drawn, MOCO2)
    got = au.random_views(images, np.arange(30), crops, drawn, MOCO2, IMAGE)
    torch.testing.assert_close(got, tv.normalize(x, IMAGE.mean, IMAGE.std))
    assert got.is_contiguous(memory_format=torch.channels_last)


def two_sample_ks(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of two empirical distribution functions."""
    grid = np.sort(np.concatenate([a, b]))
    return float(np.abs(np.searchsorted(np.sort(a), grid, "right") / len(a) - np.searchsorted(np.sort(b), grid, "right") / len(b)).max())


@pytest.mark.parametrize(
    ("height", "width"), [(50, 75), (120, 20), *(pytest.param(*sides, marks=pytest.mark.slow) for sides in [(60, 60), (30, 120)])]
)
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    """Area, ratio and place of 6,000 boxes compared with 6,000 of torchvision; 0.036 is the 0.1 % point of the Kolmogorov-Smirnov test."""
    crops, _ = draw_views(PLAIN, 0, "test", 0, np.arange(ROWS), 0)
    ours = crop_boxes(crops, height, width)
    blank = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(blank, PLAIN.crop_scale, PLAIN.crop_ratio) for _ in range(ROWS)])
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    statistics = (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    )
    for statistic in statistics:
        assert two_sample_ks(statistic(ours), statistic(theirs)) < 0.036


def test_a_box_that_never_fits_is_the_largest_in_the_middle():
    ranges = np.tile([*PLAIN.crop_scale, *PLAIN.crop_ratio], (2, 1))
    crops = Crops(np.full((2, 2 * CROP_TRIES + 2), 0.999), np.zeros(2, bool), ranges)
    boxes = crop_boxes(crops, np.array([10, 100]), np.array([100, 10]))
    assert boxes.tolist() == [[0, 43, 10, 13], [43, 0, 13, 10]]


def test_drawn_colours_have_the_stated_distribution():
    """Shares within 4 standard errors; factors evenly distributed over their ranges; all 24 orders about equally often."""
    crops, drawn = draw_views(MOCO2, 0, "test", 0, np.arange(ROWS), 0)
    jittered = drawn.operation_BO[:, 0] >= 0
    for share, p in ((jittered, 0.8), (drawn.gray_B, 0.2), (drawn.sigma_B > 0, 0.5), (crops.flip_B, 0.5)):
        assert abs(share.mean() - p) < 4 * np.sqrt(p * (1 - p) / ROWS)
    _, counts = np.unique(drawn.operation_BO[jittered], axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 0.7 * counts.mean()
    for operation, (low, high) in {
        BRIGHTNESS: (0.6, 1.4),
        CONTRAST: (0.6, 1.4),
        SATURATION: (0.6, 1.4),
        HUE: (-0.1, 0.1),
    }.items():
        factors = drawn.factor_BO[drawn.operation_BO == operation]
        assert two_sample_ks(factors, np.linspace(low, high, ROWS)) < 0.036
    assert two_sample_ks(drawn.sigma_B[drawn.sigma_B > 0], np.linspace(0.1, 2.0, ROWS)) < 0.045


def test_operations_of_strength_zero_are_not_drawn():
    some = MOCO2.model_copy(update={"jitter": [0.4, 0.0, 0.0, 0.1]})
    operations = draw_views(some, 0, "test", 0, np.arange(200), 0)[1].operation_BO
    assert operations.shape == (200, 2)
    assert set(operations.ravel().tolist()) == {-1, BRIGHTNESS, HUE}
    assert draw_views(PLAIN, 0, "test", 0, np.arange(5), 0)[1].operation_BO.shape == (5, 0)


def test_a_draw_depends_on_every_part_of_its_seed():
    def drawn(seed=0, purpose="test", epoch=0, row=7, view=0) -> np.ndarray:
        return draw_views(MOCO2, seed, purpose, epoch, [row], view)[0].uniforms_BJ

    others = (drawn(seed=1), drawn(purpose="other"), drawn(epoch=1), drawn(row=8), drawn(view=1))
    assert all(not np.array_equal(other, drawn()) for other in others)
    in_a_batch = draw_views(MOCO2, 0, "test", 0, [3, 7], np.array([5, 0]))[0].uniforms_BJ[1:]
    np.testing.assert_array_equal(in_a_batch, drawn())
