"""2 and 3 processes build the same bytes as one; blocks are claimed, stored and read again; K-means equals FAISS's."""

import os
import socket
import time
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import zarr
from sklearn.datasets import load_digits

from bingo.bags import sharing
from bingo.bags.builders import build_kmeans, build_knn, build_label
from bingo.bags.index import Bags
from bingo.bags.ivf import InvertedFile
from bingo.bags.kmeans import train_centroids
from bingo.bags.metrics import view_overlap
from bingo.bags.near_duplicates import near_duplicate_cosine, rows_near
from bingo.bags.rows import Rows, unit_rows
from bingo.bags.sharing import ALONE, Sharing
from bingo.runtime import distributed
from bingo.runtime.chunks import StoredRows, new_array
from bingo.runtime.errors import UserError
from tests.processes import start

BUILDS = {
    "exact": lambda x, labels, who: build_knn(x, 5, sharing=who),
    "mutual": lambda x, labels, who: build_knn(x, 5, True, sharing=who),
    "lists": lambda x, labels, who: build_knn(x, 5, False, InvertedFile(40, 4, 0), who),
    "clusters": lambda x, labels, who: build_kmeans(x, 30, 4, 5, 0, who),
    "classes": lambda x, labels, who: build_label(labels, x, 5, who),
}


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits with noise, of which every tenth is a copy of one image, and their classes."""
    x, labels = load_digits(return_X_y=True)
    x = (x[:count] + np.random.default_rng(0).random((count, 64))).astype(np.float16)
    x[7::10] = x[7 % count]
    return x, labels[:count]


def all_of(bags: Bags) -> dict[str, np.ndarray]:
    """Every array of an index, and its recall."""
    arrays = {"members": bags.members_TK, "similarity": bags.similarity_TK, "centroids": bags.centroids_CD, "cluster": bags.cluster_T}
    return {name: x for name, x in arrays.items() if x is not None} | {"recall": np.array(bags.settings.get("recall", 1))}


def searched(features: Rows, who: Sharing) -> dict[str, np.ndarray]:
    """The result of searches with a few queries for every process; 20 queries are nearly equal to rows."""
    others, _ = digits(700)
    queries = np.concatenate([others[600:], others[20:40] + np.float16(0.01)])
    cosine = near_duplicate_cosine(features, 0.3, 0, who)
    near = rows_near(queries, features, cosine, who)
    return {"cosine": np.array(cosine), "near": near, "overlap": np.array(view_overlap(features, features[:][:, ::-1].copy(), 4, 0, who))}


def builds(rank: int, port: int, processes: int, folder: Path, slow: int) -> None:
    """One process of a group: every kind of bags for 600 rows in a store, then bags of three rows."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(processes)}
    x, labels = digits(600)
    features = StoredRows(zarr.open_group(folder / "store", mode="r")["features"], 600, "store", "dvc repro extract")
    kept: list[str] = []
    keep = sharing._BlockFiles.keep

    def slowly(task: sharing._BlockFiles, block: slice, found: tuple) -> None:
        end = time.monotonic() + 60
        while rank == slow and task._folder == folder / "exact/members" and time.monotonic() < end:
            if len(list(task._folder.glob("*.npz"))) == len(task.parts) - 1:  # all except this one
                break
            time.sleep(0.01)
        kept.append(str(task._folder.relative_to(folder)))
        keep(task, block, found)

    sharing._BlockFiles.keep = slowly  # type: ignore[method-assign]
    found: dict[str, np.ndarray] = {}
    with distributed.group(torch.device("cpu")):
        for kind, build in BUILDS.items():
            bags = build(features, labels, Sharing(folder / kind))
            assert (bags is None) == (rank > 0)
            found |= {} if bags is None else {f"{kind} {name}": array for name, array in all_of(bags).items()}
        found |= searched(features, Sharing(folder / "few"))
        few = build_knn(x[:3], 2, sharing=Sharing(folder / "three rows"))
        found |= {} if few is None else {"three rows": few.members_TK}
    np.savez(folder / f"rank-{rank}.npz", kept=kept, **found)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "slow"), [(2, 1), (3, -1)])
def test_a_group_builds_the_bags_of_one_process(tmp_path, processes, slow):
    x, labels = digits(600)
    new_array(zarr.create_group(tmp_path / "store", zarr_format=3), "features", x.shape, np.float16, 48)[:] = x
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start(processes, builds, port, processes, tmp_path, slow)
    ranks = [dict(np.load(tmp_path / f"rank-{rank}.npz")) for rank in range(processes)]
    few = searched(x, ALONE)
    assert 20 <= len(few["near"]) < 60
    wanted = {f"{kind} {name}": array for kind, build in BUILDS.items() for name, array in all_of(build(x, labels, ALONE)).items()}
    wanted |= {"three rows": build_knn(x[:3], 2).members_TK, **few}
    kept = [list(rank.pop("kept")) for rank in ranks]
    assert ranks[0].keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(ranks[0][name], array, err_msg=name)
    for rank in ranks[1:]:
        assert {name: array.tolist() for name, array in rank.items()} == {name: array.tolist() for name, array in few.items()}
    blocks = [len(list((tmp_path / "exact/members").iterdir())), sum(len(names) for names in kept)]
    assert blocks == [60, len(list(tmp_path.glob("*/*/*.npz")))], "each block once"
    if slow >= 0:
        assert kept[slow].count("exact/members") == 1, "the other process has done the blocks that a slow one has not"


def test_stored_blocks_are_read_and_missing_ones_are_searched(tmp_path, monkeypatch):
    x, _ = digits(300)
    whole = build_knn(x, 5)
    assert build_knn(x, 5, sharing=Sharing(tmp_path)).members_TK.tobytes() == whole.members_TK.tobytes()
    files = sorted((tmp_path / "members").iterdir())
    for file in files[::7]:
        file.unlink()
    kept = []
    keep = sharing._BlockFiles.keep
    monkeypatch.setattr(sharing._BlockFiles, "keep", lambda task, block, found: kept.append(block) or keep(task, block, found))
    assert build_knn(x, 5, sharing=Sharing(tmp_path)).members_TK.tobytes() == whole.members_TK.tobytes()
    assert len(kept) == len(files[::7])
    monkeypatch.setattr(sharing, "search_blocks", None)
    assert build_knn(x, 5, sharing=Sharing(tmp_path)).similarity_TK.tobytes() == whole.similarity_TK.tobytes()
    files[3].write_bytes(files[3].read_bytes()[:-9])
    with pytest.raises(UserError, match=r"\.npz: is damaged"):
        build_knn(x, 5, sharing=Sharing(tmp_path))


def test_resumed_lists_use_the_centroids_of_the_first_run(tmp_path):
    """Other centroids, which a GPU might compute after a restart, would give other lists."""
    x, _ = digits(300)
    search = InvertedFile(20, 2, 0)
    whole = build_knn(x, 5, False, search, Sharing(tmp_path))
    for file in (tmp_path / "members").iterdir():
        file.unlink()
    again = build_knn(x[::-1].copy(), 5, False, search, Sharing(tmp_path))
    assert again.members_TK.shape == whole.members_TK.shape
    np.testing.assert_array_equal(train_centroids(x[::-1], 20, 10, 0, 64, Sharing(tmp_path))[0], train_centroids(x, 20, 10, 0, 64)[0])


@pytest.mark.parametrize(("rows", "clusters", "iterations"), [(600, 7, 40), (600, 150, 5), (600, 600, 3), (15, 4, 9), (600, 300, 6)])
def test_kmeans_has_the_bits_of_faiss(rows, clusters, iterations):
    """The bits of the FAISS version installed here. Copies leave clusters empty, which are then split."""
    x, _ = digits(rows)
    x = np.repeat(x[:100], 6, axis=0) if clusters == 300 else x
    kmeans = faiss.Kmeans(
        64, clusters, niter=iterations, spherical=True, seed=faiss_seed(), min_points_per_centroid=1, max_points_per_centroid=rows
    )
    kmeans.train(unit_rows(x))
    assert (sum(step["nsplit"] for step in kmeans.iteration_stats) > 0) == (clusters in (150, 300))
    centroids, trained = train_centroids(x, clusters, iterations, 0)
    assert trained == rows
    np.testing.assert_array_equal(centroids, unit_rows(np.asarray(kmeans.centroids)))


def faiss_seed() -> int:
    from bingo import seeds

    return seeds.torch_seed(0, "kmeans") % 2**31


@pytest.mark.parametrize("rows", [1, 7, 4096, 4100, 4096 * 5, 4096 * 5 + 3, 123456])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_spans_cover_the_rows_and_do_not_change_how_faiss_splits_a_search(rows, processes):
    spans = []
    for rank in range(processes):
        who = Sharing()
        who._processes, who._rank = processes, rank
        spans.append(who.span(rows, 4096))
    assert [spans[0][0], *(end for _, end in spans)] == [first for first, _ in spans] + [rows]
    for first, end in spans:
        assert first % 4096 == 0
        assert end == first or end - first >= min(rows, 4096)
