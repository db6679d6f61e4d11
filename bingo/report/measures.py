"""Names of the measures in reports, comparisons, model cards and recipes."""

_LINEAR = {"linear": "linear, top-1", "linear_top1": "linear, top-1", "linear_top5": "linear, top-5"}
VIEW_OVERLAP_NEEDS = "bagging.method: knn, bagging.relation: teacher and at least two stored views (extract.views)"

_AGREEMENT = "agreement_"


def neighbor_order(key: str) -> tuple[bool, bool, int]:
    """Sort key for the measures in reports/knn: `knn_K` by k, `knn_K_weighted` by k, `agreement_K` by k."""
    weighted = key.endswith("_weighted")
    return key.startswith(_AGREEMENT), weighted, int(key.removesuffix("_weighted").rpartition("_")[2])


def measure_label(key: str) -> str:
    """`linear` and `linear_top1`: "linear, top-1"; `linear_top5`: "linear, top-5"; `knn_10_weighted`: "k-NN, k = 10, weighted votes";
    `agreement_10`: "agreement with the teacher, k = 10".
    """
    if key in _LINEAR:
        return _LINEAR[key]
    agreement, weighted, k = neighbor_order(key)
    return f"{'agreement with the teacher' if agreement else 'k-NN'}, k = {k}" + (", weighted votes" if weighted else "")
