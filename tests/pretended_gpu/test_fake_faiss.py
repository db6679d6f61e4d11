"""The replacement for FAISS's GPU functions gives the CPU's results, records its use, and refuses what FAISS refuses."""

import faiss
import numpy as np
import pytest

from bingo.bags import neighbors
from bingo.bags.builders import build_kmeans, build_knn
from bingo.bags.ivf import InvertedFile
from tests.pretended_gpu.fake_faiss import SCRATCH_BYTES, FakeResources, fake_faiss_gpus

ROWS_ND = np.random.default_rng(0).standard_normal((600, 24)).astype(np.float32)
INNER = faiss.METRIC_INNER_PRODUCT


@pytest.fixture
def small_searches(monkeypatch):
    """Small searches also use the GPUs, in blocks of which each GPU gets some."""
    monkeypatch.setattr(neighbors, "_GPU_LEAST_PRODUCTS", 0)
    monkeypatch.setattr(neighbors._Gpus, "query_rows", 50)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_search_gives_the_result_of_faiss(dtype):
    rows_ND = ROWS_ND.astype(dtype)
    wanted = faiss.knn(rows_ND[:9].astype(np.float32), rows_ND.astype(np.float32), 5, metric=INNER)
    with fake_faiss_gpus(1) as calls:
        scores_QK, places_QK = faiss.knn_gpu(faiss.StandardGpuResources(), rows_ND[:9], rows_ND, 5, metric=INNER, device=0)
    np.testing.assert_array_equal(places_QK, wanted[1])
    np.testing.assert_allclose(scores_QK, wanted[0], rtol=1e-5)
    assert calls.searches == {0: [(9, 600, 5)]}


def test_missing_rows_are_minus_one():
    with fake_faiss_gpus(1):
        scores_QK, places_QK = faiss.knn_gpu(faiss.StandardGpuResources(), ROWS_ND[:1], ROWS_ND[:2], 4, metric=INNER)
    assert places_QK[0, 2:].tolist() == [-1, -1]
    assert scores_QK.dtype == np.float32


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_search_uses_every_gpu_and_gives_the_cpus_bytes(gpus, small_searches):
    wanted = neighbors.top_k(ROWS_ND, ROWS_ND, 7)
    with fake_faiss_gpus(gpus) as calls:
        found = neighbors.top_k(ROWS_ND, ROWS_ND, 7)
    assert calls.devices() == set(range(gpus))
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("gpus", [1, 2])
def test_every_kind_of_bag_equals_the_cpus(gpus, small_searches):
    builders = (
        lambda: build_knn(ROWS_ND, 4),
        lambda: build_knn(ROWS_ND, 4, False, InvertedFile(12, 4, 0)),
        lambda: build_kmeans(ROWS_ND, 10, 3, 4, 0),
    )
    for build in builders:
        wanted = build()
        with fake_faiss_gpus(gpus) as calls:
            assert np.array_equal(build().members_TK, wanted.members_TK)
        assert calls.devices() <= set(range(gpus))


def test_kmeans_copies_its_index_to_every_gpu():
    with fake_faiss_gpus(2) as calls:
        kmeans = faiss.Kmeans(24, 4, niter=1, gpu=True)
        kmeans.train(ROWS_ND)
    assert calls.indexes[0] == calls.indexes[1] > 0
    assert calls.scratch_bytes(0) == len(calls.used[0]) * SCRATCH_BYTES


def test_outside_the_body_faiss_has_its_own_functions():
    own = faiss.knn_gpu, faiss.get_num_gpus, faiss.extra_wrappers.get_num_gpus, faiss.StandardGpuResources
    with pytest.raises(RuntimeError, match="invalid device"), fake_faiss_gpus(3):
        faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), faiss.get_num_gpus(), faiss.IndexFlatIP(3))
    assert (faiss.knn_gpu, faiss.get_num_gpus, faiss.extra_wrappers.get_num_gpus, faiss.StandardGpuResources) == own


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (lambda: faiss.knn_gpu(faiss.StandardGpuResources(), ROWS_ND, ROWS_ND, 2049, metric=INNER), "2048"),
        (lambda: faiss.knn_gpu(faiss.StandardGpuResources(), ROWS_ND, ROWS_ND, 1, metric=INNER, device=2), "invalid device 2"),
        (lambda: faiss.knn_gpu(faiss.StandardGpuResources(), ROWS_ND.astype(float), ROWS_ND, 1, metric=INNER), "float16"),
        (lambda: faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 5, faiss.IndexFlatIP(3)), "invalid device 5"),
    ],
)
def test_arguments_that_faiss_refuses_are_refused(search, message):
    with fake_faiss_gpus(2), pytest.raises((RuntimeError, TypeError), match=message):
        search()


def test_use_of_a_set_of_resources_by_two_threads_is_found():
    with fake_faiss_gpus(1) as calls:
        resources = FakeResources(calls)
        with resources.in_use, pytest.raises(RuntimeError, match="two threads"):
            faiss.knn_gpu(resources, ROWS_ND, ROWS_ND, 1, metric=INNER)
