"""The gallery: its files against the index, and the page in a real browser, opened as a file."""

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import chromium
import numpy as np
import pytest
from fabricated import images_of, make_workspace
from PIL import Image

from bingo.bags.index import read_bags
from bingo.browse.gallery import sidecars, sprites
from bingo.browse.gallery.sprites import make_sprites, sprite_format
from bingo.browse.listing_rows import ListingRows
from bingo.browse.pictures import Pictures
from bingo.images.images import write_images
from bingo.images.listing import Listing, read_listing, write_listing
from tests.cli.test_browse import bingo_bags, mistake

needs_browser = pytest.mark.skipif(chromium.PATH is None, reason="no Chromium here: apt-get install chromium")
NASTY = ["<img src=x onerror=alert(1)>", "a\"b'c & </script> \u2028", "plain"]
ROWS, K = 150, 5


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery")
    make_workspace(root, train_rows=ROWS, classes=NASTY, k=K, name="<b>class</b>/it's \"")
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    patch.setattr(sidecars, "BAG_ROWS", 64)
    patch.setattr(sidecars, "PATH_ROWS", 32)
    assert bingo_bags("gallery")[:2] == (0, "gallery: .bingo/gallery/index.html\n")
    yield root
    patch.undo()


@pytest.fixture(scope="module")
def truth(workspace):
    """Listing, index, and purity, mean cosine and in-degree of every anchor, by loops."""
    listing = read_listing(workspace / "data/listing.parquet")
    index = read_bags(workspace / "data/bags.zarr", listing)
    members_TK, labels_T = index.table.members_TK, listing.labels_N[:ROWS]
    purity_T = [np.mean(labels_T[members] == labels_T[row]) for row, members in enumerate(members_TK)]
    similarity_T = [index.similarity(row).mean() for row in range(ROWS)]
    in_degree_T = [sum(row in bag for bag in members_TK) for row in range(ROWS)]
    return (
        listing,
        index,
        SimpleNamespace(purity_T=np.array(purity_T), similarity_T=np.array(similarity_T), in_degree_T=np.array(in_degree_T)),
    )


def arguments(path):
    """The arguments with which a sidecar calls its function."""
    return json.loads("[" + re.fullmatch(r"bingo\.\w+\((.*)\);\n", path.read_text(encoding="ascii"))[1] + "]")


# ---- files


def test_sidecars_contain_the_index(workspace, truth):
    listing, index, figures = truth
    data = workspace / ".bingo/gallery/data"
    meta, columns = arguments(data / "meta.js")[0], arguments(data / "columns.js")[0]
    assert (meta["rows"], meta["k"], meta["classes"]) == (ROWS, K, NASTY)
    column = {name: np.frombuffer(base64.b64decode(content), dtype) for name, (dtype, content) in columns.items()}
    assert column["label"].tolist() == listing.labels_N[:ROWS].tolist()
    assert column["in_bags"].tolist() == figures.in_degree_T.tolist()
    assert column["purity"] / meta["scale"] == pytest.approx(figures.purity_T, abs=1e-4)
    assert column["similarity"] / meta["scale"] == pytest.approx(figures.similarity_T, abs=1e-4)
    paths, members, cosines = [], [], []
    for block in range(3):
        kind, number, content = arguments(data / f"bags-{block:06d}.js")
        raw = base64.b64decode(content)
        assert (kind, number) == ("bags", block)
        members.append(np.frombuffer(raw[: len(raw) * 2 // 3], "<i4").reshape(-1, K))
        cosines.append(np.frombuffer(raw[len(raw) * 2 // 3 :], "<i2").reshape(-1, K))
    for block in range(5):
        paths += arguments(data / f"paths-{block:06d}.js")[2]
    assert np.concatenate(members).tolist() == index.table.members_TK.tolist()
    assert np.concatenate(cosines) / meta["scale"] == pytest.approx(index.table.similarity_TK.astype(np.float32), abs=1e-4)
    assert paths == listing.paths[:ROWS]


def test_thumbnails_are_the_stored_images(workspace):
    images = images_of(np.arange(ROWS + 10) % 3, 12)
    sheets = sorted((workspace / ".bingo/gallery/thumbnails").iterdir())
    assert [sheet.name for sheet in sheets] == ["s000000.png", "s000001.png", "s000002.png"]
    for row in (0, 63, 64, 149):
        with Image.open(sheets[row // 64]) as sheet:
            left, top = row % 8 * 12, row % 64 // 8 * 12
            assert np.array_equal(np.asarray(sheet.crop((left, top, left + 12, top + 12))), images[row])


def test_a_gallery_is_rewritten_only_after_a_change_and_thumbnails_are_kept(workspace):
    folder = workspace / ".bingo/gallery"
    sprite = next((workspace / ".bingo/thumbnails").rglob("*.png"))
    made, before = folder.stat().st_ino, sprite.stat().st_mtime_ns
    bingo_bags("gallery")
    assert folder.stat().st_ino == made
    (folder / "made_from.json").write_text("null\n")
    bingo_bags("gallery")
    assert folder.stat().st_ino != made
    assert sprite.stat().st_mtime_ns == before


def test_only_a_gallery_is_replaced(workspace):
    (workspace / "photos").mkdir(exist_ok=True)
    (workspace / "photos/holiday.jpg").write_bytes(b"dear")
    assert "--out = photos: contains files that do not belong to a gallery" in mistake("gallery", "--out", "photos")
    assert (workspace / "photos/holiday.jpg").read_bytes() == b"dear"
    assert "--out = params.yaml: is a file; give a folder" in mistake("gallery", "--out", "params.yaml")


def test_unreadable_images_are_grey_and_retried(tmp_path, monkeypatch):
    listing = make_workspace(tmp_path, train_rows=70)
    monkeypatch.chdir(tmp_path)
    write_images("data/images.zarr", listing, None)
    Path("params.yaml").write_text("dataset:\n  root: photos\n")
    Path("photos/class").mkdir(parents=True)
    for path, pixels in list(zip(listing.paths, images_of(listing.labels_N, 100), strict=True))[:64]:
        Image.fromarray(pixels[:, 20:80]).save(tmp_path / "photos" / path)
    code, _, err = bingo_bags("gallery")
    assert (code, err) == (0, "warning: 6 images could not be read and are shown in grey; check dataset.root\n")
    for path, pixels in zip(listing.paths, images_of(listing.labels_N, 100), strict=True):
        Image.fromarray(pixels).save(tmp_path / "photos" / path)
    assert bingo_bags("gallery")[2] == ""
    names = sorted(file.name for file in (tmp_path / ".bingo/gallery/thumbnails").iterdir())
    assert names == ["s000000.webp", "s000001.webp"]
    with Image.open(tmp_path / ".bingo/gallery/thumbnails/s000000.webp") as sheet:
        assert sheet.size == (768, 768)


@pytest.mark.parametrize(
    ("size_px", "shown_px"), [((300, 200), (96, 64)), ((60, 120), (48, 96)), ((50, 50), (96, 96)), ((400, 2), (96, 1))]
)
def test_thumbnails_keep_the_shape_of_a_photograph(tmp_path, size_px, shown_px):
    """For a red image, the red pixels in its tile have its shape and are centred, and the others are transparent."""
    Image.new("RGB", size_px, (220, 20, 20)).save(tmp_path / "photo.png")
    listing = Listing("toys", ["photo.png"], np.array([-1]), 1, [], [], "0" * 32)
    write_listing(tmp_path / "listing.parquet", listing)
    write_images(tmp_path / "images.zarr", listing, None)
    pictures = Pictures(tmp_path / "images.zarr", "images", listing.fingerprint, open, lambda path: (tmp_path / path).open("rb"))
    rows = ListingRows(tmp_path / "listing.parquet", "listing")
    assert make_sprites(tmp_path / "made", pictures, rows, np.arange(1), sprite_format(pictures)) == 0
    with Image.open(tmp_path / "made/s000000.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGBA").crop((0, 0, 96, 96))).astype(int)
    shown = pixels[:, :, 3] > 128
    top, left = np.argwhere(shown).min(axis=0)
    height, width = np.argwhere(shown).max(axis=0) - (top, left) + 1
    assert (width, height) == shown_px
    assert shown.sum() == width * height
    assert (left, top) == ((96 - width) // 2, (96 - height) // 2)
    assert np.quantile(np.abs(pixels[shown][:, :3] - (220, 20, 20)), 0.95) < 12, "all except the border next to empty tiles"


def test_the_page_neither_turns_names_into_html_nor_uses_the_network():
    static = Path(sidecars.__file__).parent / "static"
    text = "".join(file.read_text() for file in static.iterdir())
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttpRequest", "http:", "https:"):
        assert word not in text


# ---- the page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    tab = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture
def page(browser, workspace):
    """The gallery, opened as a file; after the test, the page must have no errors."""
    browser.errors.clear()
    browser.open((workspace / ".bingo/gallery/index.html").as_uri())
    browser.wait("document.querySelectorAll('#members button').length > 0")
    yield browser
    assert browser.errors == []


def rows(page, name):
    return page.value(f"[...document.querySelectorAll('#{name} button')].map(b => Number(b.dataset.row))")


def text(page, name):
    return page.value(f"document.getElementById('{name}').textContent")


def wait_for_bag(page, row):
    page.wait(f"document.getElementById('bag-title').textContent === 'Bag of row {row}'")


def choose(page, name, value):
    page.value(f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('change')); }})(document.getElementById('{name}'))")


def search(page, words):
    page.press("Escape")  # leave the field, where a slash would be typed
    page.press("/")
    page.type(words)
    page.press("Enter")


def focused(page):
    return page.value("Number(document.activeElement.dataset.row)")


@pytest.mark.slow
@needs_browser
def test_the_page_shows_bags_and_clicking_opens_other_bags(page, truth):
    listing, index, _ = truth
    assert rows(page, "anchors") == list(range(60))
    assert rows(page, "members") == index.members(0).tolist()
    assert text(page, "bag-path") == listing.paths[0]
    page.click("#anchors li:nth-child(8) button")
    wait_for_bag(page, 7)
    assert rows(page, "members") == index.members(7).tolist()
    labels = page.value("[...document.querySelectorAll('#members button')].map(b => b.getAttribute('aria-label'))")
    for place, (row, cosine, label) in enumerate(zip(index.members(7), index.similarity(7), labels, strict=True), 1):
        same = "the same class" if listing.labels_N[row] == listing.labels_N[7] else "another class"
        assert label.startswith(f"member {place}: row {row}, similarity {cosine:.3f}, class {NASTY[listing.labels_N[row]]}")
        assert label.endswith(same)
    member = int(index.members(7)[2])
    page.click("#members li:nth-child(3) button")
    wait_for_bag(page, member)
    assert rows(page, "members") == index.members(member).tolist()
    page.value("history.back()")
    wait_for_bag(page, 7)


@needs_browser
def test_search_by_row_path_and_class(page, truth):
    listing, index, _ = truth
    search(page, "149")
    wait_for_bag(page, 149)
    assert rows(page, "members") == index.members(149).tolist()
    search(page, "IT'S \"_013")
    page.wait("document.getElementById('count').textContent.includes(' of ')")
    wanted = [row for row in range(ROWS) if "it's \"_013" in listing.paths[row]]
    assert rows(page, "anchors") == wanted
    assert text(page, "count") == f"{len(wanted)} of {ROWS}"
    search(page, "onerror")  # part of the name of a class
    page.wait("document.getElementById('count').textContent.startsWith('50 of')")
    assert rows(page, "anchors") == list(range(0, ROWS, 3))
    search(page, "150")
    page.wait("document.getElementById('problem').textContent.includes('rows 0 to 149')")
    page.click("#reset")
    choose(page, "class", "1")
    page.wait("document.getElementById('anchors').querySelector('button').dataset.row === '1'")
    assert rows(page, "anchors") == list(range(1, ROWS, 3))
    search(page, "no such thing")
    page.wait("document.getElementById('count').textContent.startsWith('0 of')")
    assert "No anchor matches." in text(page, "anchors")


@needs_browser
@pytest.mark.parametrize("sort", ["purity-low", "purity-high", "similarity-low", "similarity-high", "hubs", "orphans"])
def test_sorting(page, truth, sort):
    figures = truth[2]
    values = {"purity": figures.purity_T, "similarity": figures.similarity_T}.get(sort.partition("-")[0], figures.in_degree_T)
    scaled = np.rint(values.astype(np.float64) * 10_000)
    wanted = np.lexsort((np.arange(ROWS), scaled if sort.endswith(("low", "orphans")) else -scaled))
    choose(page, "sort", sort)
    page.wait(f"document.querySelector('#anchors button').dataset.row === '{wanted[0]}' && location.hash.includes('{sort}')")
    assert rows(page, "anchors") == wanted[:60].tolist()
    page.click("#next")
    page.wait("document.getElementById('page').textContent === 'page 2 of 3'")
    assert rows(page, "anchors") == wanted[60:120].tolist()


@needs_browser
def test_everything_can_be_reached_from_the_keyboard(page, truth):
    index = truth[1]
    page.press("Escape")
    assert focused(page) == 0
    page.press("ArrowRight")
    assert focused(page) == 1
    columns = page.value("(l => l.filter(b => b.offsetTop === l[0].offsetTop).length)([...document.querySelectorAll('#anchors button')])")
    page.press("ArrowDown")
    assert focused(page) == 1 + columns
    assert page.value("document.activeElement.matches(':focus-visible')")
    page.press("Enter")
    wait_for_bag(page, 1 + columns)
    page.wait("document.activeElement.closest('#members')")
    first, second = index.members(1 + columns)[:2]
    assert focused(page) == first
    page.press("ArrowRight")
    assert focused(page) == second
    page.press("Enter")
    wait_for_bag(page, int(second))
    page.press("Escape")
    assert page.value("document.activeElement.closest('#anchors') !== null")
    page.press("PageDown")
    page.wait("document.getElementById('page').textContent === 'page 2 of 3'")
    assert focused(page) == 60
    reachable = set()
    for _ in range(20):  # enough for all controls and one tile of each list
        page.press("Tab")
        reachable.add(page.value("document.activeElement.id || document.activeElement.closest('ul')?.id || ''"))
    assert {"search", "class", "sort", "reset", "previous", "next", "anchors", "members"} <= reachable


@needs_browser
def test_names_are_shown_as_text_and_all_controls_have_names(page):
    assert page.value("document.querySelectorAll('main img, main script, b').length") == 0
    assert NASTY[0] in text(page, "bag-figures")
    assert page.value("[...document.querySelectorAll('#class option')].map(o => o.textContent)") == ["all", *NASTY]
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    for node in tree:
        if not node["ignored"] and node["role"]["value"] in ("button", "combobox", "searchbox", "img", "link", "list"):
            assert node.get("name", {}).get("value"), node
    assert {"banner", "main", "search", "contentinfo", "status", "alert"} <= {node["role"].get("value") for node in tree if "role" in node}


def contrast(first, second):
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of two rgb(...) strings."""

    def luminance(color):
        parts = np.array([int(part) for part in re.findall(r"\d+", color)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_contrast_in_light_and_dark(page, dark):
    page.dark(dark)
    style = "getComputedStyle(document.querySelector({!r})).{}"
    paper = page.value(style.format("body", "backgroundColor"))
    assert contrast(paper, "rgb(255, 255, 255)") == pytest.approx(1, abs=0.01) if not dark else contrast(paper, "rgb(255,255,255)") > 15
    for selector in ("body", "#count", "#bag-path", "dt", "footer", ".field", "#problem"):
        assert contrast(page.value(style.format(selector, "color")), paper) >= 4.5
    for selector in (".tile .line", ".tile .faint", "#search"):
        box = ".tile" if "tile" in selector else selector
        assert contrast(page.value(style.format(selector, "color")), page.value(style.format(box, "backgroundColor"))) >= 4.5
    for kind in ("same", "other"):
        mark = page.value(f"(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('.{kind} .mark')))")
        assert contrast(*mark) >= 4.5
        assert contrast(mark[1], paper) >= 3
    page.dark(False)


@needs_browser
def test_a_narrow_window_does_not_scroll_horizontally(page):
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
    page.wait("innerWidth === 360")
    assert page.value("document.documentElement.scrollWidth") <= 360
    page.call("Emulation.clearDeviceMetricsOverride")


@needs_browser
def test_without_labels_images_are_named_by_file_and_classes_are_not_mentioned(browser, tmp_path, monkeypatch):
    make_workspace(tmp_path, train_rows=20, labelled=False, name="holiday/photo")
    monkeypatch.chdir(tmp_path)
    bingo_bags("gallery")
    browser.open((tmp_path / ".bingo/gallery/index.html").as_uri())
    browser.wait("document.querySelectorAll('#members button').length > 0")
    browser.wait("document.querySelector('#anchors .faint').textContent === 'photo_0000.png'")
    names = browser.value(
        "[...document.querySelectorAll('[aria-label]')].map(x => x.ariaLabel).join() + document.getElementById('search').placeholder"
    )
    said = f"{browser.value('document.body.innerText')} {names}".lower()
    assert [word for word in ("class", "label", "purity", "unknown") if word in said] == []


@needs_browser
def test_of_many_images_a_sample_is_shown_and_the_others_are_files(browser, tmp_path, monkeypatch):
    listing = make_workspace(tmp_path, train_rows=100, k=3, name="class #1/it's")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sprites, "_MOST_FILES", 40)
    write_images("data/images.zarr", listing, None)
    Path("params.yaml").write_text("dataset:\n  source: folder\n  root: the photos\n")
    images = images_of(listing.labels_N, 60)
    for path, pixels in zip(listing.paths, images, strict=True):
        (tmp_path / "the photos" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "the photos" / path)
    assert bingo_bags("gallery")[::2] == (0, "")
    index = read_bags("data/bags.zarr", listing)
    anchors = list(range(0, 100, 10))  # 40 thumbnails: of the anchors and their three members each
    wanted = sorted({*anchors, *(member for row in anchors for member in index.members(row).tolist())})
    columns = arguments(tmp_path / ".bingo/gallery/data/columns.js")[0]
    assert [np.frombuffer(base64.b64decode(columns[name][1]), "<i4").tolist() for name in ("sample", "thumbnails")] == [anchors, wanted]
    for place in (0, len(wanted) - 1):
        with Image.open(tmp_path / f".bingo/gallery/thumbnails/s{place // 64:06d}.webp") as sheet:
            left, top = place % 8 * 96 + 8, place % 64 // 8 * 96 + 8
            shown = np.asarray(sheet.convert("RGB").crop((left, top, left + 80, top + 80)), float)
        assert np.abs(shown.mean(axis=(0, 1)) - images[wanted[place]].mean(axis=(0, 1))).max() < 12
    browser.errors.clear()
    browser.open((tmp_path / ".bingo/gallery/index.html").as_uri())
    wait_for_bag(browser, 0)
    assert rows(browser, "anchors") == anchors
    assert rows(browser, "members") == index.members(0).tolist()
    choose(browser, "sort", "row")
    browser.wait("document.querySelectorAll('#anchors button').length === 60")
    search(browser, "_0013")
    browser.wait("document.getElementById('count').textContent === '1 of 100'")
    other = next(row for row in range(100) if row not in wanted)
    browser.value(f"location.hash = 'row={other}'")
    wait_for_bag(browser, other)
    browser.wait("document.getElementById('anchor-thumb').style.backgroundImage.includes('photos')")
    address = browser.value("document.getElementById('anchor-thumb').style.backgroundImage.slice(5, -2)")
    assert Path(unquote(urlsplit(address).path)) == tmp_path / "the photos" / listing.paths[other]
    browser.call("Runtime.evaluate", expression=f"window.probe = new Image(); probe.src = {address!r}")
    browser.wait("probe.naturalWidth === 60")
    assert browser.errors == []


@pytest.mark.slow
@needs_browser
def test_clusters_can_be_browsed_and_a_missing_sidecar_is_reported(browser, tmp_path, monkeypatch):
    make_workspace(tmp_path, method="kmeans", labelled=False)
    monkeypatch.chdir(tmp_path)
    bingo_bags("gallery")
    clusters = read_bags("data/bags.zarr", read_listing("data/listing.parquet")).table.cluster_T
    browser.errors.clear()
    browser.open((tmp_path / ".bingo/gallery/index.html").as_uri() + "#row=7")
    wait_for_bag(browser, 7)
    browser.click("#cluster")
    browser.wait("document.getElementById('count').textContent.includes('in cluster')")
    assert rows(browser, "anchors") == np.flatnonzero(clusters == clusters[7]).tolist()
    assert browser.value("getComputedStyle(document.getElementById('class').closest('label')).display") == "none"
    assert "purity" not in text(browser, "sort").lower()
    assert browser.errors == []
    (tmp_path / ".bingo/gallery/data/bags-000000.js").unlink()
    browser.open((tmp_path / ".bingo/gallery/index.html").as_uri())
    browser.wait("document.getElementById('problem').textContent.includes('data/bags-000000.js could not be loaded')")
