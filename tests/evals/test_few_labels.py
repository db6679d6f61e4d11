"""The images that keep their label: counts by brute force, SimCLR's lists by file name, and an error for a list of other images."""

from collections import Counter

import numpy as np
import pytest

from bingo.evals.few_labels import drawn_rows, listed_rows
from bingo.images.listing import Listing
from bingo.runtime.errors import UserError

SIZES = {"n01440764": 40, "n01443537": 9, "n01484850": 2, "n01491361": 149}


def imagenet(sizes=SIZES) -> Listing:
    """A listing like that of ImageNet's folders; one test image has the file name of a train image."""
    paths = [f"train/{name}/{name}_{10000 + i}.JPEG" for name, size in sizes.items() for i in range(size)]
    labels = [label for label, size in enumerate(sizes.values()) for _ in range(size)]
    test = [f"val/{name}/{name}_10000.JPEG" for name in sizes]
    return Listing("folder", paths + test, np.array([*labels, *range(len(sizes))]), len(paths), list(sizes), [], "0" * 32)


@pytest.mark.parametrize("percent", [0.1, 1.0, 5.0, 10.0, 37.5, 100.0])
def test_a_draw_is_balanced_over_the_classes(percent):
    listing = imagenet()
    rows = drawn_rows(listing, percent, 0)
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] <= rows[-1] < listing.train_rows
    left, wanted = dict(enumerate(SIZES.values())), Counter()
    count = max(4, round(200 * percent / 100))
    while sum(wanted.values()) < count:  # one more from each class that has any left, while enough remain for all of these classes
        open_classes = [label for label, size in left.items() if size]
        if count - sum(wanted.values()) < len(open_classes):
            break
        for label in open_classes:
            wanted[label] += 1
            left[label] -= 1
    found = Counter(listing.labels_N[rows].tolist())
    assert len(rows) == count
    assert min(found.values()) >= 1
    assert all(0 <= found[label] - wanted[label] <= 1 for label in range(4))
    assert sum(found[label] - wanted[label] for label in range(4)) == count - sum(wanted.values())


def test_a_draw_follows_the_seed_and_a_smaller_one_is_part_of_a_larger():
    listing = imagenet()
    assert np.array_equal(drawn_rows(listing, 10, 3), drawn_rows(listing, 10, 3))
    assert not np.array_equal(drawn_rows(listing, 10, 3), drawn_rows(listing, 10, 4))
    assert set(drawn_rows(listing, 2, 3)) < set(drawn_rows(listing, 10, 3))


def test_a_list_of_simclr_names_train_images(tmp_path):
    listing, path = imagenet(), tmp_path / "1percent.txt"
    path.write_text("n01491361_10148.JPEG\nn01440764_10000.JPEG\n\nn01443537_10003.JPEG\nn01440764_10000.JPEG\n")
    rows = listed_rows(listing, path, "list")
    assert rows.tolist() == [0, 43, 199]
    assert [listing.paths[row] for row in rows] == [
        "train/n01440764/n01440764_10000.JPEG",
        "train/n01443537/n01443537_10003.JPEG",
        "train/n01491361/n01491361_10148.JPEG",
    ]


def test_a_path_distinguishes_images_with_the_same_file_name(tmp_path):
    listing = Listing("folder", ["a/1.png", "b/1.png", "bb/1.png", "a/2.png"], np.array([0, 1, 2, 0]), 4, ["a", "b", "bb"], [], "")
    path = tmp_path / "list.txt"
    path.write_text("b/1.png\r\n2.png\r\n")
    assert listed_rows(listing, path, "list").tolist() == [1, 3]
    path.write_text("1.png\n2.png\n")
    with pytest.raises(UserError, match=r"^list = .*: 1 of 2 images \(1.png\) match several train images; give their paths, starting with"):
        listed_rows(listing, path, "list")


FORMS = {
    "a mark at the start": b"\xef\xbb\xbfn01440764_10000.JPEG\nn01443537_10003.JPEG",
    "ends of lines of Windows": b"n01440764_10000.JPEG\r\nn01443537_10003.JPEG\r\n",
    "remarks": b"# drawn with seed 3\nn01440764_10000.JPEG\n  # n01443537_10001.JPEG\n n01443537_10003.JPEG \n",
    "paths of the listing": b"train/n01440764/n01440764_10000.JPEG\nn01443537/n01443537_10003.JPEG\n",
    "a label after a comma": b"n01440764_10000.JPEG,0\nn01443537/n01443537_10003.JPEG, 1\n",
    "labels after tabs and spaces": b"n01440764_10000.JPEG\t0\t1\nn01443537_10003.JPEG 1\n",
}


@pytest.mark.parametrize("kind", FORMS)
def test_forms_of_a_list(tmp_path, kind):
    (tmp_path / "list.txt").write_bytes(FORMS[kind])
    assert listed_rows(imagenet(), tmp_path / "list.txt", "the list").tolist() == [0, 43]


OTHER_NAMES = [
    "val/n01440764/n01440764_10000.JPEG",
    "/n01440764_10000.JPEG",
    "1440764_10000.JPEG",
    "n01440764_10000",
    "0 n01440764_10000.JPEG",
]


@pytest.mark.parametrize("line", OTHER_NAMES)
def test_a_name_matches_whole_parts_at_the_end_of_a_path(tmp_path, line):
    (tmp_path / "list.txt").write_text(line)
    with pytest.raises(UserError, match="not in the train split"):
        listed_rows(imagenet(), tmp_path / "list.txt", "list")


def test_a_name_with_a_space_or_comma_is_not_a_table(tmp_path):
    listing = Listing("folder", ["c/x, y.png", "c/2 3.png", "c/2"], np.zeros(3, int), 3, ["c"], [], "")
    (tmp_path / "list.txt").write_text("x, y.png 1\n2 3.png\n")
    with pytest.raises(UserError, match="1 of 2 images"):
        listed_rows(listing, tmp_path / "list.txt", "list")
    (tmp_path / "list.txt").write_text("x, y.png\n2 3.png\n")
    assert listed_rows(listing, tmp_path / "list.txt", "list").tolist() == [0, 1]


def test_the_advice_in_each_error_helps(tmp_path):
    listing, path = imagenet(), tmp_path / "list.txt"
    fewer = Listing("folder", listing.paths[:9], listing.labels_N[:9], 9, listing.classes, [], "")  # dataset.train_images: 9
    twins = Listing("folder", ["a/1.png", "b/1.png"], np.array([0, 1]), 2, ["a", "b"], [], "")
    first, late = "n01440764_10000.JPEG\n", "n01440764_10020.JPEG\n"
    accents = Listing("folder", ["a/\u00e9t\u00e9.png"], np.array([0]), 1, ["a"], [], "")
    for of, wrong, says, then, right in [
        (listing, None, "give a list of images", listing, first.encode()),
        (listing, b"", "give one file name per line", listing, first.encode()),
        (accents, "\u00e9t\u00e9.png".encode("latin-1"), "save it as plain text in UTF-8", accents, "\u00e9t\u00e9.png".encode()),
        (fewer, late.encode(), "set dataset.train_images: null", listing, late.encode()),
        (twins, b"1.png", "give their paths, starting with the class folder", twins, b"b/1.png"),
    ]:
        path.unlink(missing_ok=True)
        if wrong is not None:
            path.write_bytes(wrong)
        with pytest.raises(UserError, match=says):
            listed_rows(of, path, "list")
        path.write_bytes(right)
        assert len(listed_rows(then, path, "list")) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a_1.JPEG\nn01440764_10000.JPEG\nb_2.JPEG\nc_3.JPEG\nd_4.JPEG\n", r"4 of 5 images \(a_1.JPEG, b_2.JPEG, c_3.JPEG and 1 more\)"),
        ("val/n01440764/n01440764_10000.JPEG", r"1 of 1 images \(val/n01440764/n01440764_10000.JPEG\) are not in the train split"),
        ("\n\n", "lists no images"),
        (b"\xff\xfe\x00", "is not text"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_a_list_of_other_images_is_one_line(tmp_path, content, said):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as caught:
        listed_rows(imagenet(), path, "semi_eval.splits.one.list_file")
    (line,) = caught.value.lines
    assert line.startswith(f"semi_eval.splits.one.list_file = {path}: ")
    assert "\n" not in line
