"""Paths of all artefacts, relative to the workspace."""

from pathlib import Path

LISTING = Path("data/listing.parquet")
IMAGES = Path("data/images.zarr")
EMBEDDINGS = Path("data/embeddings.zarr")
BAGS = Path("data/bags.zarr")
LEFT_OUT = Path("data/left_out.json")
MODELS = Path("models")
TEACHER = Path("models/teacher.safetensors")
STUDENT = Path("models/student.safetensors")
EMA = Path("models/ema.safetensors")
START = Path("models/start.safetensors")
SUPERVISED = Path("models/supervised.safetensors")
NO_WEIGHTS = b"none\n"  # the content of these files without weights, because DVC warns about empty files
STUDENT_HEAD = Path("models/student_head.safetensors")
BEST = Path("models/best")
LINEAR = Path("models/linear")
BASELINES = Path("models/baselines")
DETECTORS = Path("models/detectors")
REPORTS = Path("reports")
PLOTS = REPORTS / "plots"
EXPORTS = REPORTS / "exports.js"  # no stage's output
RUNS = Path(".bingo/runs")
LOGS = Path(".bingo/logs")
LIMITS = Path(".bingo/planning/limits.json")
