"""The loader: equal pixels for equal keys with any workers, batches and other views; files give the same views as memory."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms import functional as tv

from bingo.datasets.sources import scan
from bingo.images import decode_crops, decoding, nvjpeg
from bingo.images import loader as loader_module
from bingo.images.augment import cropped_views, random_views
from bingo.images.decode import BadImage, decode_rgb
from bingo.images.draws import crop_boxes, draw_views
from bingo.images.images import FileImages, MemoryImages
from bingo.images.loader import Request, ViewLoader, center_views
from bingo.params import BicubicImageParams, ImageParams, load_params
from bingo.runtime import workers
from bingo.runtime.errors import UserError
from tests.images.test_augment import MOCO2 as AUGMENT
from tests.photographs import BASELINE
from tests.photographs import photographs as make_photographs

CPU = torch.device("cpu")
IMAGE = ImageParams(crop_px=16, resize_px=20, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
UNCOLOURED = AUGMENT.model_copy(update={"jitter": [0.0] * 4, "gray_p": 0.0, "blur_p": 0.0})


def _request(rows, purpose="train", epoch=0, view=0, keys=None) -> Request:
    rows = np.asarray(rows, np.int64)
    return Request(rows, rows if keys is None else np.asarray(keys, np.int64), purpose, epoch, view)


@pytest.fixture(scope="module")
def memory() -> MemoryImages:
    return MemoryImages(np.random.default_rng(0).integers(0, 256, (50, 20, 20, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> FileImages:
    """70 files with several dimensions and formats, more than one task."""
    root, rng, paths = tmp_path_factory.mktemp("images"), np.random.default_rng(1), []
    for i in range(70):
        noise = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = noise.resize((int(rng.integers(20, 90)), int(rng.integers(20, 90))), Image.Resampling.BICUBIC)
        paths.append(f"{i:02d}.{'png' if i % 2 else 'jpg'}")
        image.save(root / paths[-1])
    return FileImages(str(root), paths)


def views(images, plans, workers=0) -> list[list[torch.Tensor]]:
    return list(ViewLoader(images, IMAGE, AUGMENT, 0, CPU, workers).views(plans))


def test_requests_computed_together_give_the_views_of_each_alone(memory):
    """Two requests of one family, one of another, and one more of the first; bitwise equal."""
    weak = AUGMENT.model_copy(update={"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0})
    rows = np.array([3, 0, 5, 3])
    plan = [Request(rows, rows, "anchor", 1, 0), Request(rows[:3], rows[:3], "member", 1, 1)]
    plan += [Request(rows, rows, "anchor", 1, 2, weak), Request(rows[1:], rows[1:], "anchor", 2, 0)]
    loader = ViewLoader(memory, IMAGE, AUGMENT, 7, CPU)
    (together,) = loader.views([plan])
    assert [len(views_B3PP) for views_B3PP in together] == [4, 3, 4, 3]
    for views_B3PP, request in zip(together, plan, strict=True):
        ((alone_B3PP,),) = loader.views([[request]])
        assert torch.equal(views_B3PP, alone_B3PP)
        assert views_B3PP.is_contiguous(memory_format=torch.channels_last)


def test_memory_views_are_the_augment_path(memory):
    rows = np.array([3, 3, 49, 0])
    ((got,),) = views(memory, [[_request(rows, epoch=2, view=5)]])
    crops, colours = draw_views(AUGMENT, 0, "train", 2, rows, 5)
    want = random_views(torch.from_numpy(memory.images_NSS3), rows, crops, colours, AUGMENT, IMAGE)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert (got.dtype, got.shape) == (torch.float32, (4, 3, 16, 16))
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_a_view_depends_only_on_its_key(kind, request: pytest.FixtureRequest):
    """It does not depend on the batch, its order, other requests of the plan, or earlier plans."""
    images = request.getfixturevalue(kind)
    whole = views(images, [[_request([4, 7, 9, 30])]])[0][0]
    shuffled = views(images, [[_request([1, 2])], [_request([9, 4], view=3), _request([30, 9, 4, 7, 9])]])[1][1]
    torch.testing.assert_close(shuffled, whole[[3, 2, 0, 1, 2]], rtol=0, atol=1e-6)
    for other in (_request([4], purpose="other"), _request([4], epoch=1), _request([4], view=1), _request([4], keys=[5])):
        assert not torch.allclose(views(images, [[other]])[0][0], whole[:1])
    by_array = views(images, [[_request([4, 4], view=np.array([1, 0]))]])[0][0]
    torch.testing.assert_close(by_array[1], whole[0], rtol=0, atol=1e-6)


def test_workers_do_not_change_views(files):
    """Two passes with the same workers, with the tasks of a plan spread over them, compared with no workers."""
    rng = np.random.default_rng(2)
    plans = [[_request(rng.integers(0, 70, 48), view=v) for v in (0, 1)] for _ in range(4)]
    alone, loader = views(files, plans), ViewLoader(files, IMAGE, AUGMENT, 0, CPU, workers=2)
    state = torch.random.get_rng_state()
    for _ in range(2):
        for got, want in zip(loader.views(iter(plans)), alone, strict=True):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    next(loader.views(plans))  # an unfinished pass
    torch.testing.assert_close(next(loader.views(plans))[1], alone[0][1], rtol=0, atol=0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert loader.wait_seconds > 0


@pytest.mark.parametrize("image_kind", [ImageParams, BicubicImageParams])
@pytest.mark.parametrize("augment", [AUGMENT, UNCOLOURED], ids=["colours", "no colours"])
def test_file_views_are_the_drawn_crops(files, augment, image_kind):
    """One file at a time: Pillow's crop, resize and mirror (as torchvision's on Pillow images), then the batched colours."""
    rows = np.arange(70)
    seen = image_kind(**IMAGE.model_dump())
    ((got,),) = ViewLoader(files, seen, augment, 0, CPU, 0).views([[_request(rows)]])
    crops, colours = draw_views(augment, 0, "train", 0, rows, 0)
    wanted = []
    for row, path in enumerate(files.paths):
        with Image.open(f"{files.root}/{path}") as opened:
            image = opened.convert("RGB")
        (box,) = crop_boxes(crops[row : row + 1], image.height, image.width).tolist()
        crop = tv.resized_crop(image, *box, [16, 16], tv.InterpolationMode(seen.interpolation))
        wanted.append(np.asarray(tv.hflip(crop) if crops.flip_B[row] else crop))
    want = cropped_views(torch.from_numpy(np.stack(wanted)), colours, augment, IMAGE)
    error_B = (got - want).abs().flatten(1)
    assert error_B.mean(dim=1).max() < 0.1
    if augment is UNCOLOURED:  # without hue, which magnifies a difference of one level between nearly grey pixels
        assert (error_B.amax(dim=1) < 2.01 / 255 / 0.22).sum() > 60  # the others are JPEG files that were decoded at a smaller scale


def test_views_of_a_jpeg_equal_views_of_its_pixels(tmp_path):
    """Colour, grey, rotated by EXIF, and with a gap that Pillow tolerates; compared with a lossless file of Pillow's pixels."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 15, 3), np.uint8)).resize((75, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(tmp_path / "colour.jpg", quality=80)
    photo.convert("L").save(tmp_path / "grey.jpg", quality=80)
    photo.save(tmp_path / "turned.jpg", quality=80, exif=turned)
    photo.save(tmp_path / "progressive.jpg", quality=80, progressive=True)
    content = (tmp_path / "colour.jpg").read_bytes()
    (tmp_path / "hole.jpg").write_bytes(content[:1500] + bytes(100) + content[1600:])
    names = ["colour", "grey", "turned", "progressive", "hole"]
    for name in names:
        decode_rgb((tmp_path / f"{name}.jpg").read_bytes(), lambda height, width: 1)[0].save(tmp_path / f"{name}.png")
    jpeg, png = (
        views(FileImages(str(tmp_path), [f"{name}.{kind}" for name in names]), [[_request(range(5))]])[0][0] for kind in ("jpg", "png")
    )
    torch.testing.assert_close(jpeg, png, rtol=0, atol=0)


def test_each_image_of_a_plan_is_decoded_once(files, monkeypatch):
    decoded = []
    decode = decoding.decode_crops
    monkeypatch.setattr(decoding, "decode_crops", lambda content, *rest: decoded.append(content) or decode(content, *rest))
    views(files, [[_request([5, 6]), _request([6, 5, 5], view=1), _request([8])]])
    assert len(decoded) == len(set(decoded)) == 3


@pytest.fixture
def photographs(tmp_path) -> FileImages:
    return FileImages(str(tmp_path), make_photographs(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_decodes_plain_jpeg_files_and_the_cpu_all_others(photographs, monkeypatch, workers):
    """Each file is decoded once for all its views, in any order of requests; libjpeg on the CPU replaces nvJPEG."""
    given: list[int] = []
    monkeypatch.setattr(nvjpeg, "decode_jpeg", lambda files, *how: given.extend(map(len, files)) or decode_jpeg(files, *how))
    rows = np.arange(len(photographs))
    plan = [_request(rows), _request(rows[::-1], view=1), _request([2, 2, 13], view=2)]
    got, want = by_gpu(photographs, plan, workers)
    assert given == [Path(photographs.root, path).stat().st_size for path in photographs.paths[:BASELINE]]
    for ours, theirs, request in zip(got, want, plan, strict=True):
        there_B = torch.from_numpy(request.image_rows_B < BASELINE)
        assert torch.equal(ours[~there_B], theirs[~there_B])
        assert (ours[there_B] - theirs[there_B]).abs().max() < 2.01 / 255 / 0.22
        assert not torch.equal(ours[there_B], theirs[there_B])  # resized as floats, not as bytes


def by_gpu(images: FileImages, plan: list[Request], workers: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A plan's views with the decoding of dataset.jpeg_decoder: gpu, run on the CPU, and without it."""
    crops_alone = UNCOLOURED.model_copy(update={"crop_scale": [0.7, 1.0]})
    (want,) = ViewLoader(images, IMAGE, crops_alone, 0, CPU, 0).views([plan])
    loader = ViewLoader(images, IMAGE, crops_alone, 0, CPU, workers)
    images.jpeg_decoder = "gpu"
    (got,) = loader.views([plan])
    return got, want


def refusing(refused: bytes):
    """A decoder that fails for one file, and thus for all files decoded together with it."""

    def decode(files: list[torch.Tensor], mode: object, device: torch.device) -> list[torch.Tensor]:
        if any(file.numpy().tobytes() == refused for file in files):
            raise RuntimeError("nvjpegDecodeBatched failed: 5")
        return decode_jpeg(files, mode, device)

    return decode


def test_a_file_that_fails_on_the_gpu_is_decoded_on_the_cpu(photographs, monkeypatch):
    refused = Path(photographs.root, photographs.paths[3]).read_bytes()
    monkeypatch.setattr(nvjpeg, "decode_jpeg", refusing(refused))
    (got,), (want,) = by_gpu(photographs, [_request(range(14))])
    assert torch.equal(got[3], want[3])
    assert not any(torch.equal(got[row], want[row]) for row in (0, 1, 2, 4, 5))


def test_a_file_that_neither_device_can_decode_is_named_with_its_row(photographs, monkeypatch):
    refused = Path(photographs.root, photographs.paths[3]).read_bytes()
    decode = decoding.decode_crops

    def neither(content, *rest):
        if content == refused:
            raise BadImage("it is broken")
        decode(content, *rest)

    monkeypatch.setattr(nvjpeg, "decode_jpeg", refusing(refused))
    loader = ViewLoader(photographs, IMAGE, UNCOLOURED, 0, CPU, 0)
    photographs.jpeg_decoder = "gpu"
    monkeypatch.setattr(decoding, "decode_crops", neither)
    (line,) = lines_of(lambda: list(loader.views([[_request(range(6))]])))
    assert "grey.jpg (row 3) can no longer be read (it is broken)" in line


def test_on_a_cpu_the_gpus_decoder_is_refused_only_for_files(photographs, memory):
    photographs.jpeg_decoder = "gpu"
    (line,) = lines_of(lambda: ViewLoader(photographs, IMAGE, AUGMENT, 0, CPU))
    assert line.startswith("dataset.jpeg_decoder = gpu: ")
    assert "set dataset.jpeg_decoder: cpu" in line
    assert len(next(center_views(photographs, [0, 7], IMAGE, CPU, 4, 0))) == 2


FOR_TEACHER = BicubicImageParams(crop_px=20, resize_px=22, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_teachers_view_is_the_students_with_the_teachers_size_and_normalisation(kind, workers, request):
    """Bitwise equal to the views of a loader for only one of them, in any order of requests."""
    if kind == "memory" and workers:
        pytest.skip("nothing is decoded")
    images = request.getfixturevalue(kind)
    plan = [_request([5, 6, 5]), _request([6, 5, 5], view=1), _request([8, 6, 7], view=1)]
    for_teacher = [replace(plan[2], for_teacher=True), replace(plan[0], for_teacher=True)]
    loader = ViewLoader(images, IMAGE, AUGMENT, 0, CPU, workers, FOR_TEACHER)
    ((*students, third, first),) = loader.views([[*plan[:2], plan[2], *for_teacher]])
    (expected,) = ViewLoader(images, IMAGE, AUGMENT, 0, CPU, 0).views([plan])
    (teachers,) = ViewLoader(images, FOR_TEACHER, AUGMENT, 0, CPU, 0).views([[plan[2], plan[0]]])
    for got, want in zip([*students, third, first], [*expected, *teachers], strict=True):
        assert torch.equal(got, want)
    assert first.shape == (3, 3, 20, 20)


def test_teacher_and_student_see_the_same_box_by_torchvisions_definition(memory):
    rows = np.array([4, 9])
    plan = [_request(rows), replace(_request(rows), for_teacher=True)]
    ((student, teacher),) = ViewLoader(memory, IMAGE, UNCOLOURED, 0, CPU, 0, FOR_TEACHER).views([plan])
    crops, _ = draw_views(UNCOLOURED, 0, "train", 0, rows, 0)
    for i, (top, left, height, width) in enumerate(crop_boxes(crops, memory.side_px, memory.side_px).tolist()):
        pixels = torch.from_numpy(memory.images_NSS3[rows[i]]).permute(2, 0, 1) / 255
        for seen, got in ((IMAGE, student[i]), (FOR_TEACHER, teacher[i])):
            mode = tv.InterpolationMode(seen.interpolation)
            view = tv.resized_crop(pixels, top, left, height, width, [seen.crop_px, seen.crop_px], mode, antialias=True).clamp(0, 1)
            view = view.flip(2) if crops.flip_B[i] else view
            torch.testing.assert_close(got, tv.normalize(view, seen.mean, seen.std), rtol=0, atol=2e-4)


def test_an_image_is_decoded_once_and_large_enough_for_teacher_and_student(tmp_path, monkeypatch):
    """A JPEG file of 400 px would be decoded at a quarter for views of 16 px; for the teacher's of 180 px it is not."""
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (400, 400, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    decoded, factors = [], []
    decode, shrunk = decoding.decode_crops, decode_crops._crops_of_shrunk
    monkeypatch.setattr(decoding, "decode_crops", lambda content, *rest: decoded.append(content) or decode(content, *rest))
    monkeypatch.setattr(
        decode_crops, "_crops_of_shrunk", lambda image, factor, wanted: factors.append(factor) or shrunk(image, factor, wanted)
    )
    whole = UNCOLOURED.model_copy(update={"crop_scale": [0.9, 1.0]})
    small = IMAGE.model_copy(update={"crop_px": 16, "resize_px": 16})
    images, large = FileImages(str(tmp_path), ["a.jpg"]), FOR_TEACHER.model_copy(update={"crop_px": 180, "resize_px": 180})
    for other, expected in ((None, [8]), (large, [8])):
        plan = [_request([0])] + ([replace(_request([0]), for_teacher=True)] if other else [])
        next(ViewLoader(images, small, whole, 0, CPU, 0, other).views([plan]))
        assert factors == expected
    assert len(decoded) == 2


def test_memory_and_file_views_nearly_agree(memory, tmp_path):
    """The same squares from memory (in floats) and from lossless files (crops rounded to 8 bits)."""
    for i, image in enumerate(memory.images_NSS3):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files = FileImages(str(tmp_path), [f"{i}.png" for i in range(50)])
    pair = [next(ViewLoader(x, IMAGE, UNCOLOURED, 0, CPU, 0).views([[_request(range(50))]]))[0] for x in (memory, files)]
    assert (pair[0] - pair[1]).abs().max() < 1.01 / 255 / 0.22


@pytest.mark.parametrize(("workers", "image_kind"), [(0, ImageParams), (1, ImageParams), (1, BicubicImageParams)])
def test_center_views_are_in_row_order(files, workers, image_kind):
    rows = [5, 0, 69, 3, 2]
    seen = image_kind(**IMAGE.model_dump())
    got = list(center_views(files, rows, seen, CPU, 2, workers))
    assert [len(x) for x in got] == [2, 2, 1]
    for row, view in zip(rows, torch.cat(got), strict=True):
        with Image.open(f"{files.root}/{files.paths[row]}") as opened:
            resized = tv.resize(opened.convert("RGB"), 20, tv.InterpolationMode(seen.interpolation))
            want = tv.to_tensor(tv.center_crop(resized, [16, 16]))
        want = tv.normalize(want, IMAGE.mean, IMAGE.std)
        assert (view - want).abs().max() < (0.5 if files.paths[row].endswith("jpg") else 1.01 / 255 / 0.22)


def test_center_views_from_memory(memory):
    got = torch.cat(list(center_views(memory, range(50), IMAGE, CPU, 16)))
    x = torch.from_numpy(memory.images_NSS3).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(got, tv.normalize(x[:, :, 2:18, 2:18], IMAGE.mean, IMAGE.std), atol=1e-5, rtol=0)


def lines_of(act) -> list[str]:
    """The lines of the UserError raised by `act`. Its traceback is not kept, because it would keep the workers."""
    try:
        act()
    except UserError as error:
        return error.lines
    pytest.fail("no UserError was raised")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_became_unreadable_is_named_with_its_row(files, tmp_path, workers):
    (tmp_path / "1.png").write_bytes(b"no longer an image")
    broken = FileImages(str(tmp_path), ["0.png", "1.png"])
    Image.new("RGB", (30, 30)).save(tmp_path / "0.png")
    (line,) = lines_of(lambda: views(broken, [[_request([0, 1])]], workers))
    assert "1.png (row 1) can no longer be read (no image format is recognised in it); restore it, or set dataset.check: decode" in line
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png \(row 1\) can no longer be read \(No such file"):
        list(center_views(broken, [1], IMAGE, CPU, 4, 0))


def test_the_advice_for_a_bad_file_after_a_scan_of_headers_helps(tmp_path):
    """A truncated photograph has a valid header: with `check: header`, another scan would list it again."""
    (tmp_path / "train/cat").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for name in ("a", "b", "c"):
        Image.fromarray(noise).save(tmp_path / f"train/cat/{name}.jpg")
    whole = (tmp_path / "train/cat/b.jpg").read_bytes()
    (tmp_path / "train/cat/b.jpg").write_bytes(whole[: len(whole) // 2])
    asked = {"source": "folder", "root": str(tmp_path), "store_px": None, "check": "header", "on_bad_image": "skip"}
    dataset = load_params(Path(__file__).parents[2] / "params.yaml").dataset.model_copy(update=asked)

    def load(dataset) -> int:
        listing, _ = scan(dataset, 0)
        return sum(len(part) for part in center_views(FileImages(str(tmp_path), listing.paths), range(len(listing)), IMAGE, CPU, 4, 0))

    (line,) = lines_of(lambda: load(dataset))
    advised = re.search(r"set dataset\.(\w+): (\w+)", line)
    assert advised
    assert load(dataset.model_copy(update={advised[1]: advised[2]})) == 2


def test_a_file_that_became_a_link_out_of_the_root_is_not_read(tmp_path):
    root = tmp_path / "link to the root"
    (tmp_path / "root/class").mkdir(parents=True)
    root.symlink_to(tmp_path / "root")
    for path in ("outside.png", "root/0.png"):
        Image.new("RGB", (30, 30)).save(tmp_path / path)
    (root / "class/1.png").symlink_to("../0.png")
    (root / "2.png").symlink_to(tmp_path / "outside.png")
    (root / "up").symlink_to(tmp_path)
    paths = ["0.png", "class/1.png", "2.png", "up/outside.png", "../outside.png", str(tmp_path / "outside.png")]
    images = FileImages(str(root), paths)
    assert len(list(center_views(images, [0, 1], IMAGE, CPU, 4, 0))) == 1
    for row in range(2, 6):
        (line,) = lines_of(lambda row=row: list(center_views(images, [row], IMAGE, CPU, 4, 0)))
        assert f"{paths[row]} (row {row}) can no longer be read (it leads out of the dataset's folder" in line


def test_the_worker_count_is_this_processs_share(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers.worker_count() == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers.worker_count() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert workers.worker_count() == 0


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="pretends a GPU")
def test_a_gpu_uses_one_stream_for_copies_in_all_passes(files, monkeypatch):
    from tests.pretended_gpu import device

    made: list[object] = []
    loader_module._copying_stream.cache_clear()
    with device.pretended_gpu() as record:
        gpu, stream = torch.device("cuda", 0), torch.cuda.Stream
        monkeypatch.setattr(torch.cuda, "Stream", lambda *given: made.append(stream(*given)) or made[-1])
        loader = ViewLoader(files, IMAGE, AUGMENT, 0, gpu, workers=0)
        passes = [list(loader.views([[_request(range(5))], [_request(range(3))]])) for _ in range(3)]
        centers = list(center_views(files, range(5), IMAGE, gpu, 2, workers=0))
        monkeypatch.undo()
        assert len(made) == 1
        assert not record.unordered
        for found in passes:
            for (x,), (y,) in zip(found, views(files, [[_request(range(5))], [_request(range(3))]]), strict=True):
                torch.testing.assert_close(x.cpu(), y)
        assert sum(len(x) for x in centers) == 5
    loader_module._copying_stream.cache_clear()
