"""Every stage as a process on the simulated GPU writes the bytes of a run on the CPU."""

import json

import pytest
from coco_data import make_split
from workspace import ROOT, Workspace, new_workspace

TUNE = {"epochs": 1, "batch_images": 16, "drop_epochs": None}
PRETRAIN = {"epochs": 1, "lr_warmup_epochs": 0, "batch_anchors": 32, "probe_every_epochs": 1, "precision": "fp32"}
TINY = {
    "dataset": {"train_images": 120, "test_images": 40},
    "teacher": {"key_width": 8},
    "teacher.pretrain": PRETRAIN,
    "extract": {"views": 2, "batch_images": 32, "chunk_rows": 64, "precision": "fp32"},
    "bagging": {"k": 3},
    "student": {"width": 0.125, "stem": "imagenet"},  # for the detector
    "distill": {**PRETRAIN, "keep_best": True},
    "methods.bingo": {"terms": "symmetric_mix"},
    "linear_eval.crops": {"batch_images": 32},
    "knn_eval": {"k": [1, 5], "agreement_k": [1, 5]},
    "semi_eval": {"splits": {"fifth": {"percent": 20.0, "list_file": None, "trunk_lr": 0.01, "head_lr": 0.1, "linear_lr": 0.1}}},
    "semi_eval.finetune": TUNE,
    "semi_eval.linear": TUNE,
    "transfer": {
        "datasets": {"other": {"source": "digits", "root": None, "store_px": 24, "train_images": 40, "test_images": 20}},
        "resized_px": 24,
    },
    "transfer.linear": TUNE,
    "transfer.finetune": TUNE,
    "transfer_coco": {
        "runs": ["c4-short"], "root": "coco", "train_images": "train", "train_annotations": "annotations/instances_train.json",
        "val_images": "val", "val_annotations": "annotations/instances_val.json", "schedules": {"short": [1, 2]}, "batch_images": 2,
        "lr_warmup_steps": 1, "min_side_px": [64], "max_side_px": 128, "test_min_side_px": 64, "precision": "fp32",
    },
}  # fmt: skip
CHANGES = {f"{section}.{name}": value for section, values in TINY.items() for name, value in values.items()}
STAGES = (
    "scan", "teacher", "extract", "bag", "weights", "distill", "baseline moco", "linear_eval", "knn_eval", "semi_eval fifth",
    "transfer_cifar other", "transfer_coco c4-short", "report",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, stages) -> tuple[Workspace, Workspace]:
    """Two workspaces with a small COCO, for the CPU and for the simulated GPU; no stage has run in them."""
    root = tmp_path_factory.mktemp("devices")
    on_cpu, on_gpu = (new_workspace(root / name, stages, CHANGES) for name in ("cpu", "gpu"))
    (on_gpu.root / "tests").symlink_to(ROOT / "tests")
    for workspace in (on_cpu, on_gpu):
        make_split(workspace.root / "coco", "train", 4, 0)
        make_split(workspace.root / "coco", "val", 2, 1)
    return on_cpu, on_gpu


def test_every_stage_writes_the_cpus_bytes(made):
    on_cpu, on_gpu = made
    record = on_gpu.root / "record"
    for stage in STAGES:
        on_cpu.done(stage)
        variables = {"BINGO_DEVICE": "cuda", "PRETENDED_RECORD": str(record)}
        done = on_gpu.stages.start_module(f"tests.pretended_gpu.stage {stage}", on_gpu.root, **variables).wait()
        assert (done.status, done.err) == (0, ""), f"{stage}: {done}"
        outputs = on_cpu.outputs(stage.partition(" ")[0])
        assert on_gpu.existing_files(*outputs) == on_cpu.existing_files(*outputs), stage
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["stage"] for line in lines] == list(STAGES)
    assert {line["stage"] for line in lines if not line["launches"]} == {"scan", "bag", "weights", "report"}
    assert {kind for line in lines for kind in line} <= {"stage", "launches", "waits", "pageable"}


def test_no_stage_is_missing():
    assert {stage.partition(" ")[0] for stage in STAGES} == {path.stem for path in (ROOT / "stages").glob("[!_]*.py")}
