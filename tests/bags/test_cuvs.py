"""`bagging.search: cuvs` with a replacement for cuVS that searches exactly or misses rows; not tested with cuVS on a GPU."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bingo.bags.builders import GraphSearch, build_bags, build_knn
from bingo.bags.metrics import bag_metrics
from bingo.bags.sharing import Sharing
from bingo.params import load_params
from bingo.planning.limits import search_mistakes


class FakeDeviceArray:
    """pylibraft.common.device_ndarray: a copy of an array on the GPU."""

    def __init__(self, np_ndarray: np.ndarray):
        self._array = np_ndarray.copy()

    def copy_to_host(self) -> np.ndarray:
        """As in pylibraft."""
        return self._array


class IndexParams:
    """As in cuvs.neighbors.cagra of 25.12."""

    def __init__(self, *, metric="sqeuclidean", intermediate_graph_degree=128, graph_degree=64, build_algo="ivf_pq"):
        assert metric == "sqeuclidean"


class SearchParams:
    """As in cuvs.neighbors.cagra of 25.12."""

    def __init__(self, *, max_queries=0, itopk_size=64, max_iterations=0, algo="auto", team_size=0, search_width=1):
        self.itopk_size = itopk_size


class FakeCagra:
    """cuvs.neighbors.cagra. `dropped`: number of nearest other rows of each query that are never found; `found`: most rows found per
    query."""

    IndexParams, SearchParams = IndexParams, SearchParams

    def __init__(self, dropped: int = 0, found: int = 10**9):
        self.dropped, self.found, self.builds, self.queries = dropped, found, 0, 0

    def build(self, index_params: IndexParams, dataset: np.ndarray, resources: Any = None) -> np.ndarray:
        """The index is the rows themselves."""
        assert isinstance(index_params, IndexParams)
        assert (dataset.dtype, dataset.flags.c_contiguous) == (np.float16, True)
        self.builds += 1
        return dataset.astype(np.float32)

    def search(
        self,
        search_params: SearchParams,
        index: np.ndarray,
        queries: FakeDeviceArray,
        k: int,
        neighbors: Any = None,
        distances: Any = None,
        resources: Any = None,
        filter: Any = None,
    ) -> tuple[FakeDeviceArray, FakeDeviceArray]:
        """(squared distances float32, rows uint32), nearest first; missing neighbours are the largest number in each."""
        assert isinstance(queries, FakeDeviceArray), "queries must be on the GPU"
        assert k <= search_params.itopk_size
        rows_QD = queries.copy_to_host()
        assert rows_QD.dtype == np.float16, "the same as the rows of the index"
        self.queries += len(rows_QD)
        squares_QN = ((rows_QD.astype(np.float32)[:, None] - index) ** 2).sum(axis=2)
        places_QN = np.argsort(squares_QN, axis=1, kind="stable")
        left = np.r_[0, 1 + self.dropped : places_QN.shape[1]]  # the query itself is found
        places_Qk = places_QN[:, left][:, :k].astype(np.uint32)
        squares_Qk = np.take_along_axis(squares_QN, places_Qk.astype(np.int64), axis=1)
        missing = np.arange(k) >= self.found
        missing[places_Qk.shape[1] :] = True
        wide = ((0, 0), (0, k - places_Qk.shape[1]))
        squares_Qk, places_Qk = np.pad(squares_Qk, wide), np.pad(places_Qk, wide)
        squares_Qk[:, missing], places_Qk[:, missing] = np.finfo(np.float32).max, 2**32 - 1
        return FakeDeviceArray(squares_Qk), FakeDeviceArray(places_Qk)


def installed(monkeypatch: pytest.MonkeyPatch, cagra: FakeCagra) -> FakeCagra:
    """Make Python import the replacement as cuvs and pylibraft."""
    content = {"cuvs": {}, "cuvs.neighbors": {"cagra": cagra}, "pylibraft": {}, "pylibraft.common": {"device_ndarray": FakeDeviceArray}}
    for name, attributes in content.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return cagra


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """300 digits, without pairs that are equally far from a third one."""
    return (load_digits(return_X_y=True)[0][:300] + np.random.default_rng(0).random((300, 64))).astype(np.float16)


def test_a_graph_that_finds_all_rows_gives_the_bytes_of_the_exact_search(features, monkeypatch, tmp_path):
    cagra = installed(monkeypatch, FakeCagra())
    exact = build_knn(features, 5, mutual=True)
    for sharing in (Sharing(), Sharing(tmp_path)):
        found = build_knn(features, 5, True, GraphSearch(0), sharing)
        assert found.members_TK.tobytes() == exact.members_TK.tobytes()
        assert found.similarity_TK.tobytes() == exact.similarity_TK.tobytes()
        assert found.settings == {**exact.settings, "search": "cuvs", "seed": 0, "recall": 1.0}
        assert found.recall_warning() is None
    assert (cagra.builds, cagra.queries) == (2, 600)
    assert bag_metrics(found, None)["recall"] == 1.0
    assert "lists" not in bag_metrics(found, None)


@pytest.mark.parametrize(("dropped", "recall"), [(1, 4 / 5), (2, 3 / 5), (5, 0)])
def test_rows_that_a_graph_misses_are_reported(features, monkeypatch, dropped, recall):
    """Without its nearest others, each row still gets the rest of its five neighbours."""
    installed(monkeypatch, FakeCagra(dropped))
    exact, found = build_knn(features, 5 + dropped), build_knn(features, 5, False, GraphSearch(0))
    assert (found.members_TK != exact.members_TK[:, dropped:]).mean() < 2e-3, "except rows that float16 cannot distinguish"
    assert found.settings["recall"] == pytest.approx(recall, abs=2e-3)
    assert f"recall {found.settings['recall']:.6g}: " in (found.recall_warning() or "")


def test_missing_neighbours_are_padding_and_none_is_listed_twice(features, monkeypatch):
    installed(monkeypatch, FakeCagra(found=4))
    found = build_knn(features, 5, False, GraphSearch(0))
    np.testing.assert_array_equal(found.members_TK[:, :3], build_knn(features, 3).members_TK)
    assert (found.members_TK[:, 3:] == -1).all()
    assert np.isneginf(found.similarity_TK[:, 3:]).all()
    few = build_knn(features[:4], 3, False, GraphSearch(0))  # fewer rows than the candidates requested
    assert (np.sort(few.members_TK, axis=1) == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]).all()


def test_the_parameter_selects_cuvs_and_is_refused_if_it_is_not_installed(features, monkeypatch):
    params = load_params()
    params = params.model_copy(update={"bagging": params.bagging.model_copy(update={"search": "cuvs", "k": 4})})
    (line,) = search_mistakes(params)
    assert line.startswith("bagging.search = cuvs: ")
    assert "cuvs-cu12" in line
    cagra = installed(monkeypatch, FakeCagra())
    assert search_mistakes(params) == []
    bags = build_bags(params.bagging, features, np.full(300, -1), params.seed)
    assert bags is not None
    assert (bags.settings["search"], bags.settings["recall"], cagra.builds) == ("cuvs", 1.0, 1)
    params = params.model_copy(update={"bagging": params.bagging.model_copy(update={"search": "ivf"})})
    monkeypatch.undo()
    assert search_mistakes(params) == []
