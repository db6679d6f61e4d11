"""The search on GPUs, with recorded replacements for FAISS's GPU functions: which GPUs are used, what they hold, and exactness."""

import numpy as np
import pytest

from bingo.bags import neighbors
from bingo.bags.builders import build_kmeans, build_knn
from bingo.bags.ivf import InvertedFile
from bingo.evals.probe import BANK_IMAGES, NEIGHBORS, QUERY_IMAGES
from tests.pretended_gpu.fake_faiss import SCRATCH_BYTES, fake_faiss_gpus

ROWS_ND = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16)
BAGS = {
    "exact": lambda: build_knn(ROWS_ND, 4),
    "lists": lambda: build_knn(ROWS_ND, 4, False, InvertedFile(60, 8, 0)),
    "clusters": lambda: build_kmeans(ROWS_ND, 10, 3, 4, 0),
}


@pytest.fixture(autouse=True)
def any_search(monkeypatch):
    """Searches of any number of rows use the GPUs, in blocks of which each GPU gets some."""
    monkeypatch.setattr(neighbors, "_GPU_LEAST_PRODUCTS", 0)
    monkeypatch.setattr(neighbors._Gpus, "query_rows", 100)
    monkeypatch.delenv("BINGO_DEVICE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("count", [1, 3])
def test_a_process_creates_one_set_of_resources_for_each_gpu(count):
    with fake_faiss_gpus(count) as calls:
        for build in BAGS.values():
            build()
    assert calls.devices() == set(range(count))
    assert len(calls.resources) == count
    assert [calls.scratch_bytes(gpu) for gpu in range(count)] == [SCRATCH_BYTES] * count
    assert all(calls.indexes[gpu] and calls.searches[gpu] for gpu in range(count))


@pytest.mark.parametrize("kind", BAGS)
def test_no_gpu_is_used_if_the_cpu_is_requested(kind, monkeypatch):
    monkeypatch.setenv("BINGO_DEVICE", "cpu")
    with fake_faiss_gpus(2) as calls:
        BAGS[kind]()
    assert (calls.resources, calls.devices()) == ([], set())


@pytest.mark.parametrize(("rank", "own"), [("0", {0}), ("1", {1}), ("2", set())])
@pytest.mark.parametrize("kind", BAGS)
def test_in_a_group_a_process_uses_only_its_own_gpu(kind, rank, own, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with fake_faiss_gpus(2) as calls:
        BAGS[kind]()
    assert calls.devices() == own


@pytest.mark.parametrize(("width", "on_gpus"), [(2048, False), (16384, False), (2**20, True)])
def test_a_probe_of_a_network_of_any_width_leaves_the_gpu_to_the_training(width, on_gpus, monkeypatch):
    monkeypatch.undo()
    with fake_faiss_gpus(2):
        device = neighbors._device(NEIGHBORS, float(QUERY_IMAGES) * BANK_IMAGES * width)
    assert isinstance(device, neighbors._Gpus) == on_gpus


@pytest.mark.parametrize(
    ("width", "active", "centres", "copies", "noise"),
    [
        pytest.param(512, 20, 8, 150, 2e-2, id="sparse"),
        pytest.param(8, 3, 8, 150, 2e-2, id="narrow"),
        pytest.param(64, 64, 8, 150, 5e-3, id="dense"),
        pytest.param(128, 6, 2, 600, 5e-3, id="more than the candidates"),
    ],
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_near_duplicates_are_found_exactly_from_float16(width, active, centres, copies, noise, blocks):
    """The cosine of every neighbour equals the one at its place in float64, up to float32's error; float16 alone would lose up to 5e-5."""
    rng = np.random.default_rng(0)
    centres_CD = np.zeros((centres, width))
    for centre_D in centres_CD:
        centre_D[rng.choice(width, active, replace=False)] = np.abs(rng.standard_normal(active))
    rows_ND = np.repeat(centres_CD, copies, axis=0)
    rows_ND = (rows_ND * (1 + noise * rng.standard_normal(rows_ND.shape))).astype(np.float32)
    unit_ND = rows_ND / np.linalg.norm(rows_ND.astype(np.float64), axis=1, keepdims=True)
    cosines_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(cosines_NN, -np.inf)
    wanted_N5 = np.sort(cosines_NN, axis=1)[:, :-6:-1]
    budget_bytes = 10**9 if blocks == 1 else rows_ND.nbytes // blocks
    with fake_faiss_gpus(1):
        rows_N5, cosines_N5 = neighbors.top_k(rows_ND, rows_ND, 5, np.arange(len(rows_ND)), budget_bytes=budget_bytes)
    assert np.abs(np.take_along_axis(cosines_NN, rows_N5.astype(int), axis=1) - wanted_N5).max() < 1e-6
    np.testing.assert_allclose(cosines_N5, wanted_N5, atol=1e-6)


@pytest.mark.parametrize("width", [2, 3, 8, 128, 2048])
@pytest.mark.parametrize("share", [1.0, 0.02])
def test_the_tolerance_is_above_what_float16_loses(width, share):
    rng = np.random.default_rng(0)
    a, b = np.abs(rng.standard_normal((2, 2000, width))) + 1e-9
    a *= rng.random(a.shape) < max(share, 2 / width)
    b = a * (1 + 1e-3 * b)
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (a, b))
    scores = np.vecdot(a.astype(np.float16).astype(np.float32), b.astype(np.float16).astype(np.float32))
    lost = np.abs(scores - np.vecdot(a, b)).max()
    assert lost < neighbors._Gpus.attempts[0].tolerance
    assert width > 3 or lost > 2e-4  # an earlier tolerance
