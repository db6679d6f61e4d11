"""Distil a large self-supervised vision teacher into a small network through bags of similar images.

The Python API (docs/api.md); each function is imported, with its dependencies, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bingo.api import embed, load_student, open_bags, run_pipeline
    from bingo.bags.neighbors import top_k
    from bingo.embeddings.store import read_embeddings
    from bingo.images.images import open_images
    from bingo.images.listing import read_listing
    from bingo.params import load_params
    from bingo.teachers.teacher import load_teacher

__all__ = [
    "embed", "load_params", "load_student", "load_teacher", "open_bags", "open_images", "read_embeddings", "read_listing", "run_pipeline",
    "top_k",
]  # fmt: skip
_ELSEWHERE = {
    "load_params": "bingo.params",
    "load_teacher": "bingo.teachers.teacher",
    "open_images": "bingo.images.images",
    "read_embeddings": "bingo.embeddings.store",
    "read_listing": "bingo.images.listing",
    "top_k": "bingo.bags.neighbors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "bingo.api")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
