"""The embeddings store: written values are read back, and damaged, missing, foreign or out-of-range values are refused."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bingo.embeddings.store import create_embeddings, open_for_writing, read_embeddings
from bingo.runtime.artefacts import fingerprint
from bingo.runtime.errors import UserError

ROWS, TRAIN_ROWS, WIDTH, VIEWS, KEY_WIDTH, CHUNK_ROWS = 23, 17, 5, 3, 4, 4
ATTRS = {"listing": "aa11", "teacher": "bb22", "recipe": {"views": VIEWS, "seed": 0}}


class FakeListing(SimpleNamespace):
    def __len__(self):
        return self.rows


LISTING = FakeListing(fingerprint="aa11", rows=ROWS, train_rows=TRAIN_ROWS)


def arrays():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    keys = rng.standard_normal((TRAIN_ROWS, VIEWS, KEY_WIDTH)).astype(np.float32)
    return features, keys / np.linalg.norm(keys, axis=2, keepdims=True)


def create(path):
    return create_embeddings(path, ROWS, TRAIN_ROWS, WIDTH, VIEWS, KEY_WIDTH, CHUNK_ROWS, ATTRS)


def write_chunk(writer, chunk):
    features, keys = arrays()
    writer.write_chunk(chunk, features[writer.rows(chunk)], keys[writer.train_rows(chunk)])


@pytest.fixture
def store(tmp_path):
    writer = create(tmp_path / "state")
    for chunk in range(writer.chunks):
        write_chunk(writer, chunk)
    writer.finish(tmp_path / "embeddings.zarr")
    return tmp_path / "embeddings.zarr"


def test_what_is_written_is_read(store):
    embeddings = read_embeddings(store, LISTING)
    features, keys = arrays()
    np.testing.assert_array_equal(embeddings.features_ND, features.astype(np.float16))
    np.testing.assert_array_equal(embeddings.keys_TVP, keys.astype(np.float16))
    np.testing.assert_array_equal(embeddings.features[TRAIN_ROWS:], features[TRAIN_ROWS:].astype(np.float16))
    for view in range(VIEWS):
        np.testing.assert_array_equal(embeddings.view_keys(view)[np.array([16, 3])], keys[[16, 3], view].astype(np.float16))
    assert embeddings.features_ND.dtype == embeddings.keys_TVP.dtype == np.float16
    assert embeddings.fingerprint == fingerprint(ATTRS)
    assert (embeddings.rows, embeddings.train_rows, embeddings.feature_width) == (ROWS, TRAIN_ROWS, WIDTH)
    assert (embeddings.views, embeddings.key_width) == (VIEWS, KEY_WIDTH)
    assert embeddings.attrs["recipe"] == ATTRS["recipe"]
    assert embeddings.features_ND is embeddings.features_ND  # kept in memory


def test_train_features_are_read_without_test_features(store):
    features, _ = arrays()
    whole = read_embeddings(store, LISTING)
    assert np.shares_memory(whole.features_ND, whole.train_features_TD)
    np.testing.assert_array_equal(whole.train_features_TD, features[:TRAIN_ROWS].astype(np.float16))
    (store / "features/c/5/0").unlink()  # test rows only
    np.testing.assert_array_equal(read_embeddings(store, LISTING).train_features_TD, features[:TRAIN_ROWS].astype(np.float16))


def test_chunks_cover_every_row_once(tmp_path):
    writer = create(tmp_path / "state")
    assert [row for chunk in range(writer.chunks) for row in writer.rows(chunk)] == list(range(ROWS))
    assert [row for chunk in range(writer.chunks) for row in writer.train_rows(chunk)] == list(range(TRAIN_ROWS))


def test_interruption_and_another_order_give_equal_bytes(store, tmp_path):
    create(tmp_path / "state")
    write_chunk(open_for_writing(tmp_path / "state"), 4)
    (tmp_path / "state/features/c/2").mkdir(parents=True, exist_ok=True)
    (tmp_path / "state/features/c/2/0.1234.partial").write_bytes(b"left by a killed process")
    writer = open_for_writing(tmp_path / "state")
    todo = [chunk for chunk in reversed(range(writer.chunks)) if not writer.chunk_is_complete(chunk)]
    assert todo == [5, 3, 2, 1, 0]
    for chunk in todo:
        write_chunk(writer, chunk)
    writer.finish(tmp_path / "again.zarr")
    assert contents(tmp_path / "again.zarr") == contents(store)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_chunk_without_its_keys_is_not_complete(tmp_path):
    writer = create(tmp_path / "state")
    write_chunk(writer, 0)
    assert writer.chunk_is_complete(0)
    assert not writer.chunk_is_complete(1)
    keys = tmp_path / "state/keys/c/0/0/0"
    keys.write_bytes(keys.read_bytes()[:-1])
    assert not writer.chunk_is_complete(0)


def test_finish_refuses_missing_chunks(tmp_path):
    writer = create(tmp_path / "state")
    write_chunk(writer, 2)
    with pytest.raises(UserError, match="5 of 6 chunks are not written"):
        writer.finish(tmp_path / "embeddings.zarr")
    assert not (tmp_path / "embeddings.zarr").exists()


def test_a_large_chunk_does_not_pad_a_small_store(tmp_path):
    writer = create_embeddings(tmp_path / "state", 10, 7, WIDTH, VIEWS, KEY_WIDTH, 8192, ATTRS)
    writer.write_chunk(0, np.ones((10, WIDTH)), np.ones((7, VIEWS, KEY_WIDTH)))
    assert (tmp_path / "state/features/c/0/0").stat().st_size == 10 * WIDTH * 2 + 4


@pytest.mark.parametrize("array", ["features", "keys"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65536.0, -1e9])
def test_numbers_that_float16_cannot_hold_are_refused(tmp_path, array, value):
    writer = create(tmp_path / "state")
    features, keys = arrays()
    (features[6] if array == "features" else keys[6, 1])[2] = value
    with pytest.raises(UserError, match=re.escape("at row 6 reaches")) as error:
        writer.write_chunk(1, features[4:8], keys[4:8])
    assert len(error.value.lines) == 1
    assert str(abs(value)) in str(error.value)
    assert not writer.chunk_is_complete(1)


def test_a_wrong_shape_is_a_programmers_mistake(tmp_path):
    writer = create(tmp_path / "state")
    features, keys = arrays()
    with pytest.raises(ValueError, match="wanted"):
        writer.write_chunk(0, features[:3], keys[:4])


@pytest.mark.parametrize("array", ["features", "keys"])
def test_a_missing_chunk_is_refused(store, array):
    next((store / array / "c/2").rglob("0")).unlink() if array == "features" else (store / "keys/c/2/0/0").unlink()
    with pytest.raises(UserError, match=f"array {array} has no value at row 8: chunk 2 is missing; run: dvc repro extract"):
        load(store, array)


@pytest.mark.parametrize("damage", ["flip", "shorten", "empty", "lengthen", "crc only"])
@pytest.mark.parametrize("array", ["features", "keys"])
def test_a_damaged_chunk_is_refused(store, array, damage):
    file = store / ("features/c/1/0" if array == "features" else "keys/c/1/0/0")
    whole = bytearray(file.read_bytes())
    flipped = bytearray(whole)
    flipped[11] ^= 1
    changed = {"flip": flipped, "shorten": whole[:-7], "empty": b"", "lengthen": whole + b"x", "crc only": whole[-4:]}
    file.write_bytes(changed[damage])
    with pytest.raises(UserError, match=f"array {array} has a damaged chunk") as error:
        load(store, array)
    assert len(str(error.value).splitlines()) == 1


def load(store, array):
    embeddings = read_embeddings(store, LISTING)
    return embeddings.features_ND if array == "features" else embeddings.keys_TVP


@pytest.mark.parametrize("file", ["zarr.json", "features/zarr.json", "keys/zarr.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"zarr_format": 3, "node_type": "group"}'])
def test_damaged_metadata_are_refused(store, file, content):
    (store / file).unlink() if content is None else (store / file).write_bytes(content)
    with pytest.raises(UserError, match="dvc repro extract") as error:
        read_embeddings(store, LISTING)
    assert len(str(error.value).splitlines()) == 1


def test_another_listing_is_refused_with_both_names(store):
    other = FakeListing(fingerprint="cc33", rows=ROWS, train_rows=TRAIN_ROWS)
    with pytest.raises(UserError, match="from listing aa11, this run reads listing cc33; run: dvc repro extract"):
        read_embeddings(store, other)


def test_an_absent_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="the store does not exist"):
        read_embeddings(tmp_path / "embeddings.zarr", LISTING)
