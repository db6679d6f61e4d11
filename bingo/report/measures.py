"""What each measure is called, wherever people read of it: reports, comparisons, model cards, recipes."""

_LINEAR = {"linear": "linear, top-1", "linear_top1": "linear, top-1", "linear_top5": "linear, top-5"}


def knn_parts(key: str) -> tuple[bool, int]:
    """Whether the votes are weighted, and k, of `knn_K` or `knn_K_weighted`; as keys they sort by k, weighted votes last."""
    number, _, weighted = key.removeprefix("knn_").partition("_")
    return bool(weighted), int(number)


def measure_label(key: str) -> str:
    """`linear` and `linear_top1`: "linear, top-1"; `linear_top5`: "linear, top-5"; `knn_10_weighted`: "kNN, k = 10, weighted votes";
    `agreement_10`: "agreement with the teacher, k = 10".
    """
    if key in _LINEAR:
        return _LINEAR[key]
    if key.startswith("agreement_"):
        return f"agreement with the teacher, k = {key.removeprefix('agreement_')}"
    weighted, k = knn_parts(key)
    return f"kNN, k = {k}" + (", weighted votes" if weighted else "")
