"""Scaling of bags with the number of images: exact neighbours and K-means from 10^4 to 10^6 rows, compared with the machine's limit.

    python -m benchmarks.bench_bags --plot bags.svg          2 cores: about 10 minutes, 5 GB of disk, 12 GB of memory
    python -m benchmarks.bench_bags --device cuda --rows 10000 100000 1000000 1281167 --flop 1e16
    python -m benchmarks.bench_bags --device cuda --rows 1281167 --flop 1e16 --searches exact

Features are a mixture of Gaussians, written block by block to a zarr store. Each measurement runs in a separate process and includes
reading and normalising the first N rows. The limit is 2 N^2 D operations (K-means: 2 N C D for each assignment, plus the pairs within
clusters) at the rate of a matrix product of the same width, measured before each table (float32; half precision on a GPU). A search of more
than --flop operations uses fewer queries Q: its time a + b Q is fitted to two values of Q and given for Q = N. Such times are marked *, and
times extrapolated with the fitted exponents are marked ~. Smallest and largest of up to three repeats are in brackets. FAISS's own
IndexFlatIP is measured for comparison, with its float32 rows already in memory.
"""

import argparse
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parser import Parser

IMAGENET_ROWS, IMAGENET_WIDTH = 1_281_167, 2048
CENTRES, INNER_WIDTH, NOISE = 1000, 16, 0.3  # classes, dimensions in which images of a class differ, noise of each image
CHUNK_ROWS = 8192
FEW_QUERIES = 64
REPEATED_SECONDS = 10.0
MATRIX_ROWS = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class Timed:
    """Seconds of each repeat, and the peak memory of the process in MB of 10^6 bytes."""

    seconds: list[float]
    peak_mb: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Grown:
    """One row of the table: seconds for all N queries, and whether they were scaled from fewer queries."""

    rows: int
    seconds: float
    spread: str
    scaled: bool
    peak_mb: float


def main() -> None:
    """Measure, and print each result as soon as it is known."""
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not in_own_process(gpus_of_faiss)[0]:
        raise SystemExit("--device cuda: FAISS sees no GPU, or has no GPU support (faiss-cpu); install faiss-gpu, or give --device cpu")
    sizes = sorted(options.rows)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = Path(folder) / "features.zarr"
        in_own_process(make_features, store, sizes[-1], options.width)
        print(f"{options.width} wide, k = {options.k}, {options.device}")
        exact = grow("exact", search_exactly, store, sizes, options)
        if options.searches == "exact":
            return
        peer = grow("IndexFlatIP", search_flat, store, sizes, options)
        streamed(store, sizes, options)
        clustered = grow_kmeans(store, sizes, options)
        rate = measured_rate(options)
        limits = [2 * rows**2 * options.width / rate for rows in sizes]
        extrapolate(exact, clustered, options, rate)
    if options.ivf_rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            approximate(Path(folder) / "features.zarr", options)
    if options.plot:
        plot(options.plot, {"exact (top_k)": exact, "FAISS IndexFlatIP": peer, "K-means bags": clustered}, sizes, limits, options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--searches", choices=["all", "exact"], default="all")
    parser.add_argument("--width", type=int, default=IMAGENET_WIDTH)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--flop", type=float, default=4e12, help="most operations of one measurement")
    parser.add_argument("--budget-mb", type=float, default=256, help="memory for the streamed search")
    parser.add_argument("--ivf-rows", type=int, default=1_000_000, help="0: no approximate search")
    parser.add_argument("--ivf-width", type=int, default=128)
    parser.add_argument("--graph", action="store_true", help="also measure an HNSW graph, which takes minutes to build")
    parser.add_argument("--folder", type=Path, help="folder for the temporary store")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def in_own_process(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The result of `work`, and the peak memory of its process in MB."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(with_peak, work, *arguments).result()


def gpus_of_faiss() -> int:
    """The number of GPUs that FAISS sees."""
    import faiss

    return faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0


def with_peak(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The result of `work`, and this process's peak memory in MB."""
    result = work(*arguments)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def make_features(store: Path, rows: int, width: int) -> None:
    """Write rows of CENTRES classes; images of a class differ in INNER_WIDTH directions and by noise."""
    import zarr

    from bingo.runtime.chunks import new_array

    random = np.random.default_rng(0)
    array = new_array(zarr.create_group(store, zarr_format=3), "features", (rows, width), np.float16, min(CHUNK_ROWS, rows))
    centres_CD = random.standard_normal((CENTRES, width), np.float32)
    inner_ID = random.standard_normal((INNER_WIDTH, width), np.float32) / math.sqrt(INNER_WIDTH)
    for start in range(0, rows, CHUNK_ROWS):
        count = min(CHUNK_ROWS, rows - start)
        x_nD = NOISE * random.standard_normal((count, width), np.float32)
        x_nD += random.standard_normal((count, INNER_WIDTH), np.float32) @ inner_ID
        x_nD += centres_CD[random.integers(0, CENTRES, count)]
        array[start : start + count] = x_nD.astype(np.float16)


def stored(store: Path, rows: int) -> Any:
    """The first rows of a store, to be read later."""
    import zarr

    from bingo.runtime.chunks import StoredRows

    return StoredRows(zarr.open_group(store, mode="r")["features"], rows, str(store), "the benchmark again")


def matrix_rate(width: int, device: str) -> float:
    """Operations per second of the matrix product (MATRIX_ROWS, width) x (width, MATRIX_ROWS), the best of five: the limit."""
    import torch

    dtype = torch.float16 if device == "cuda" else torch.float32
    rows = MATRIX_ROWS[device]
    x, y = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    product = torch.empty(rows, rows, dtype=dtype, device=device)

    def once() -> float:
        begun = time.perf_counter()
        torch.matmul(x, y.T, out=product)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    once()
    return 2 * rows**2 * width / min(once() for _ in range(5))


def measured_rate(options: argparse.Namespace) -> float:
    """`matrix_rate`, measured in a separate process and printed."""
    rate, _ = in_own_process(matrix_rate, options.width, options.device)
    print(f"\nmatrix product, {'half precision' if options.device == 'cuda' else 'float32'}: {rate / 1e9:,.0f} GFLOP/s")
    return rate


def repeated(work: Callable[[], Any]) -> list[float]:
    """Seconds of up to three calls, fewer if they take long."""
    seconds: list[float] = []
    while len(seconds) < 3 and (not seconds or sum(seconds) + seconds[-1] < REPEATED_SECONDS):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return seconds


def search_exactly(store: Path, rows: int, queries: int, options: argparse.Namespace, budget_bytes: int | None = None) -> list[float]:
    """Seconds of this project's search of the first rows among all rows, including reading."""
    import faiss  # noqa: F401 (before the clock starts)

    from bingo.bags.neighbors import top_k
    from bingo.bags.rows import held, memory_budget

    budget = memory_budget() if budget_bytes is None else budget_bytes
    _ = stored(store, 1)[:]  # so that zarr is imported

    def search() -> None:
        base = held(stored(store, rows), budget)
        asked = base if queries == rows else stored(store, queries)
        top_k(asked, base, options.k, np.arange(queries), budget_bytes=budget)

    return repeated(search)


def search_flat(store: Path, rows: int, queries: int, options: argparse.Namespace) -> list[float]:
    """Seconds of FAISS's own exact index of unit rows, in half precision on the first GPU with --device cuda."""
    import faiss

    from bingo.bags.rows import blocks, unit_rows

    index = faiss.IndexFlatIP(options.width)
    if options.device == "cuda":
        cloner = faiss.GpuClonerOptions()
        cloner.useFloat16 = True
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, cloner)
    for _, x_nD in blocks(stored(store, rows)):
        index.add(unit_rows(x_nD))
    queries_QD = unit_rows(stored(store, queries)[:])
    return repeated(lambda: index.search(queries_QD, options.k + 1))


def grow(name: str, search: Callable[..., list[float]], store: Path, sizes: list[int], options: argparse.Namespace) -> list[Grown]:
    """Measure one search at each number of rows, and print the table."""
    rate = measured_rate(options)
    print(f"{name}: N, queries, seconds for all N, GFLOP/s, share of the limit, peak MB")
    grown = []
    for rows in sizes:
        queries = min(rows, max(2 * FEW_QUERIES, int(options.flop / (2 * rows * options.width))))
        many = timed(search, store, rows, queries, options)
        if queries == rows:
            seconds = many.median
        else:
            few = timed(search, store, rows, FEW_QUERIES, options)
            seconds = few.median + (many.median - few.median) * (rows - FEW_QUERIES) / (queries - FEW_QUERIES)
        grown.append(Grown(rows, seconds, spread_of(many), queries < rows, many.peak_mb))
        flops = 2 * rows**2 * options.width
        mark = "*" if queries < rows else " "
        print(
            f"{rows:>9,} {queries:>9,} {seconds:>10,.1f} s{mark} {spread_of(many):18} {flops / seconds / 1e9:>8,.0f}"
            f" {flops / rate / seconds:>6.0%} {many.peak_mb:>8,.0f}",
            flush=True,
        )
    print(f"exponent in N: {exponent(grown):.2f} (expected 2)", flush=True)
    return grown


def timed(work: Callable[..., list[float]], *arguments: Any) -> Timed:
    """`work`, measured in a separate process."""
    seconds, peak_mb = in_own_process(work, *arguments)
    return Timed(seconds, peak_mb)


def spread_of(timed: Timed) -> str:
    """The smallest and the largest repeat, as text."""
    return f"[{min(timed.seconds):.1f} .. {max(timed.seconds):.1f}]" if len(timed.seconds) > 1 else ""


def exponent(grown: list[Grown]) -> float:
    """The slope of log seconds over log rows by least squares, using only times over a second if there are at least two."""
    long = [point for point in grown if point.seconds > 1]
    grown = long if len(long) > 1 else grown
    if len(grown) < 2:
        return math.nan
    return float(np.polyfit(np.log([point.rows for point in grown]), np.log([point.seconds for point in grown]), 1)[0])


def streamed(store: Path, sizes: list[int], options: argparse.Namespace) -> None:
    """The same search with all rows in memory and streamed from the store with a small budget, at the number of rows nearest to 10^5."""
    rows = min(sizes, key=lambda size: abs(math.log(size / 1e5)))
    queries = min(rows, max(2 * FEW_QUERIES, int(options.flop / (2 * rows * options.width))))
    print(f"\n{queries:,} queries of {rows:,} rows, in memory and streamed")
    for label, budget in (("in memory", 10**15), (f"{options.budget_mb:,.0f} MB", int(options.budget_mb * 1e6))):
        found = timed(search_exactly, store, rows, queries, options, budget)
        print(f"{label:>12}: {found.median:8,.1f} s {spread_of(found):18} peak {found.peak_mb:,.0f} MB", flush=True)


def kmeans_bags(store: Path, rows: int, options: argparse.Namespace) -> tuple[list[float], float]:
    """Seconds and operations of this project's K-means bags: training, assignment, and neighbours within clusters."""
    import faiss  # noqa: F401 (before the clock starts)

    from bingo.bags.builders import build_kmeans

    sizes_C = np.zeros(options.clusters)

    def build() -> None:
        bags = build_kmeans(stored(store, rows), options.clusters, options.iterations, options.k, 0)
        sizes_C[:] = np.diff(bags.cluster_start)

    seconds = repeated(build)
    assigned = float(rows) * options.clusters * (options.iterations + 1)
    return seconds, 2 * options.width * (assigned + float((sizes_C**2).sum()))


def grow_kmeans(store: Path, sizes: list[int], options: argparse.Namespace) -> list[Grown]:
    """K-means bags at each number of rows that does not take too long."""
    rate = measured_rate(options)
    print(f"K-means bags, {options.clusters} clusters, {options.iterations} iterations: N, seconds, share of the limit, peak MB")
    grown = []
    for rows in sizes:
        if 2 * options.width * rows * (options.clusters * (options.iterations + 1) + rows / options.clusters) > 2 * options.flop:
            print(f"{rows:>9,} not run")
            continue
        (seconds, flops), peak_mb = in_own_process(kmeans_bags, store, rows, options)
        found = Timed(seconds, peak_mb)
        grown.append(Grown(rows, found.median, spread_of(found), False, peak_mb))
        print(f"{rows:>9,} {found.median:>10,.1f} s {spread_of(found):18} {flops / rate / found.median:>6.0%} {peak_mb:>8,.0f}", flush=True)
    print(f"exponent in N: {exponent(grown):.2f} (expected 1; more if the pairs within clusters dominate)", flush=True)
    return grown


def extrapolate(exact: list[Grown], clustered: list[Grown], options: argparse.Namespace, rate: float) -> None:
    """Print seconds and memory for ImageNet's size, extrapolated from the largest measured number of rows with the fitted exponent."""
    last = exact[-1]
    width_factor = IMAGENET_WIDTH / options.width
    seconds = last.seconds * (IMAGENET_ROWS / last.rows) ** exponent(exact) * width_factor
    limit = 2 * IMAGENET_ROWS**2 * IMAGENET_WIDTH / rate
    held_gb = IMAGENET_ROWS * IMAGENET_WIDTH * (2 + (2 if options.device == "cuda" else 4)) / 1e9
    print(f"\n{IMAGENET_ROWS:,} x {IMAGENET_WIDTH}, extrapolated from the exponents above:")
    print(f"    exact ~{seconds:,.0f} s = {seconds / 3600:.2f} h; limit {limit:,.0f} s; {held_gb:.1f} GB in memory, or streamed")
    if clustered:
        grown = clustered[-1].seconds * (IMAGENET_ROWS / clustered[-1].rows) ** exponent(clustered) * width_factor
        print(f"    K-means ~{grown:,.0f} s ({options.clusters} clusters, {options.iterations} iterations)")


def approximate(store: Path, options: argparse.Namespace) -> None:
    """Approximate indexes on --ivf-rows rows, and the share of the exact bags that they find."""
    in_own_process(make_features, store, options.ivf_rows, options.ivf_width)
    lines, peak_mb = in_own_process(approximate_lines, store, options)
    print(f"\napproximate search of {options.ivf_rows:,} x {options.ivf_width}, peak {peak_mb:,.0f} MB")
    print("\n".join(lines), flush=True)


def approximate_lines(store: Path, options: argparse.Namespace) -> list[str]:
    """Build and search inverted lists, and with --graph an HNSW graph; recall is measured on a sample of queries with exact bags."""
    import faiss

    from bingo.bags.neighbors import top_k
    from bingo.bags.rows import unit_rows

    rows, queries = options.ivf_rows, min(2000, options.ivf_rows)
    unit_ND = unit_rows(stored(store, rows)[:])
    begun = time.perf_counter()
    exact_QK, _ = top_k(unit_ND[:queries], unit_ND, options.k, np.arange(queries))
    lines = [f"    exact: {(time.perf_counter() - begun) * rows / queries:,.0f} s* for all rows, from {queries:,}"]

    def measure(name: str, index: Any, searches: list[tuple[str, Callable[[], None]]]) -> None:
        begun = time.perf_counter()
        index.train(unit_ND)
        index.add(unit_ND)
        lines.append(f"    {name}: built in {time.perf_counter() - begun:,.0f} s")
        for label, set_effort in searches:
            set_effort()
            begun = time.perf_counter()
            _, found_QM = index.search(unit_ND[:queries], options.k + 1)
            seconds = (time.perf_counter() - begun) * rows / queries
            lines.append(f"        {label}: {seconds:,.0f} s* for all rows, recall of the bag {recall(found_QM, exact_QK):.4f}")

    lists = int(4 * math.sqrt(rows))
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(options.ivf_width), options.ivf_width, lists, faiss.METRIC_INNER_PRODUCT)
    ivf.cp.max_points_per_centroid = 64
    probes = [count for count in (1, 4, 16, 64) if count <= lists]
    measure(f"IVF, {lists:,} lists", ivf, [(f"{count} probes", lambda count=count: setattr(ivf, "nprobe", count)) for count in probes])
    if options.graph:
        graph = faiss.IndexHNSWFlat(options.ivf_width, 32, faiss.METRIC_INNER_PRODUCT)
        efforts = [(f"efSearch {effort}", lambda effort=effort: setattr(graph.hnsw, "efSearch", effort)) for effort in (32, 128)]
        measure("HNSW, 32 links", graph, efforts)
    return lines


def recall(found_QM: np.ndarray, exact_QK: np.ndarray) -> float:
    """The mean share of exact members among those found; one more row is found, because the row itself is usually among them."""
    return float((exact_QK[:, :, None] == found_QM[:, None, :]).any(axis=2).mean())


def plot(path: Path, curves: dict[str, list[Grown]], sizes: list[int], limits: list[float], options: argparse.Namespace) -> None:
    """Plot seconds over N on logarithmic axes; hollow points are scaled from fewer queries."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for (name, grown), colour in zip(curves.items(), ("C0", "C1", "C2"), strict=True):
        axes.plot([point.rows for point in grown], [point.seconds for point in grown], colour, label=name, linewidth=1)
        for point in grown:
            axes.plot(point.rows, point.seconds, "o", color=colour, fillstyle="none" if point.scaled else "full", markersize=5)
    axes.plot(sizes, limits, "k--", linewidth=1, label="limit of exact: 2 N² D")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="train rows N",
        ylabel="seconds",
        title=f"Bags of {options.width}-wide features, {options.device}",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
