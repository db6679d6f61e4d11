"""Trainings from start to end, files, extraction, evaluations and the detector on the simulated GPU: the CPU's numbers, and known waits."""

from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch

from bingo.detection.detector import NumbersOnDevice
from bingo.nets import precision
from tests.pretended_gpu.device import AUTOGRAD, pretended_gpu
from tests.pretended_gpu.steps import CPU, deterministic
from tests.pretended_gpu.streams import GPU
from tests.pretended_gpu.works import WORKS

# Places where the host waits once: for weights, images, features and tables that are uploaded to the GPU, or a file that is written.
# Nothing else uploads from pageable memory.
ONCE = {
    "bingo/detection/loop.py:DetectorTrainer.__init__",
    "bingo/evals/finetune.py:ClassifierTrainer._test_logits",
    "bingo/evals/linear.py:Standardised.__init__",
    "bingo/evals/linear.py:_to_device",
    "bingo/evals/linear.py:linear_on_crops",
    "bingo/evals/scores.py:linear_layer",
    "bingo/images/colours.py:_band",
    "bingo/images/images.py:MemoryImages.on_device",
    "bingo/images/uploads.py:channels",
    "bingo/methods/negatives.py:Negatives._bag_tables",
    "bingo/methods/parts/momentum.py:Queue._load_from_state_dict",
    "bingo/runtime/checkpoints.py:Checkpoints.save",
    "bingo/training/loop.py:Trainer.__init__",
}
# Places where it waits repeatedly: a work that shows it, and the most waits. Lower or delete an entry when there are fewer waits; no place
# may be added to those for each image.
AGAIN = {
    # for each epoch or chunk
    "bingo/embeddings/extract.py:_Pass._features": ("extraction", 2),
    "bingo/embeddings/extract.py:_Pass._keys": ("extraction", 2),
    "bingo/evals/features.py:feature_blocks": ("linear layer on random crops", 4),
    "bingo/evals/finetune.py:ClassifierTrainer._test": ("fine-tuning", 2),
    "bingo/evals/linear.py:_LinearTrainer.hits": ("linear layer on stored features", 1),
    "bingo/evals/linear.py:_LinearTrainer.test": ("linear layer on stored features", 3),
    "bingo/nets/checkpoint.py:on_host": ("training with probe", 4),
    "bingo/runtime/finite.py:LossWatch.first": ("training with probe", 3),
    "bingo/training/loop.py:Trainer._check_weights": ("training with probe", 2),
    "bingo/training/loop.py:Trainer._end_epoch": ("training with probe", 8),
    "bingo/detection/loop.py:DetectorTrainer._record": ("detector fpn fp32", 12),
    # for each image: most are torchvision's, which has as many regions as the image
    "bingo/detection/detector.py:Regions._losses": ("detector fpn fp32", 18),
    "bingo/detection/detector.py:Regions._mask_maps": ("detector fpn fp32", 24),
    "bingo/detection/detector.py:Regions.forward": ("detector fpn fp32", 28),
    "bingo/detection/detector.py:_Detector.forward": ("detector fpn fp32", 28),
    "bingo/detection/detector.py:_Proposals.compute_loss": ("detector fpn fp32", 4),
    "bingo/detection/detector.py:_SeededSampler.__call__": ("detector fpn fp32", 16),
    "bingo/detection/scores.py:_detections": ("detector c4 bf16", 16),
}
OWN = {f"{AUTOGRAD}: {what}" for what in ("upload", "tolist", "_local_scalar_dense")}  # in the works themselves
UP_TO_ROUNDING = {"large bank": 1e-5}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", WORKS)
def test_a_work_gives_the_cpus_numbers_and_waits_only_at_known_places(tmp_path, name):
    for folder in ("cpu", "gpu"):
        (tmp_path / folder).mkdir()
    with deterministic():
        with mock.patch.object(precision, "HALF_SIMILARITIES", ("cpu",)):
            wanted = WORKS[name](CPU, tmp_path / "cpu")
        with pretended_gpu() as record:
            numbers = WORKS[name](GPU, tmp_path / "gpu")
    assert len(wanted) > 0
    np.testing.assert_allclose(numbers, wanted, rtol=UP_TO_ROUNDING.get(name, 0))
    assert set(record.faults) <= {"waits", "pageable"}
    assert {place for _, place in record.pageable} <= ONCE | {AUTOGRAD}
    waits = Counter[str]()
    for (what, place), count in record.waits.items():
        waits[f"{place}: {what}" if place == AUTOGRAD else place] += count
    assert set(waits) - OWN - ONCE <= set(AGAIN)
    for place, (work, most) in AGAIN.items():
        if work == name:
            assert 0 < waits[place] <= most, place


def test_numbers_in_torchvision_are_not_uploaded_at_every_call():
    """They have torch's values and dtypes, for any number; other data are uploaded as before."""
    boxes = torch.tensor([[1.5, 2.0]])

    def made(device):
        x = boxes.to(device)
        numbers = [torch.tensor(value, device=device) for value in (0.5, -3, True, float("inf"), 2**40)]
        cast = [torch.tensor(value).to(x) for value in (1, 0.25, False)]
        lists = [torch.as_tensor(values, dtype=torch.float32, device=device) for values in ([0.1, 0.7], (10.0, 5.0), [3, 4])]
        return [*numbers, torch.tensor(0.3, dtype=torch.float16, device=device), *cast, *lists, x.to(dtype=torch.float64), x.to(x)]

    wanted = made(CPU)
    with pretended_gpu() as record:
        for _ in range(2):
            record.clear()
            with NumbersOnDevice():
                found = made(GPU)
        assert record.pageable.total() == 1, "only x itself"
        for one, other in zip(found, wanted, strict=True):
            assert (one.device, one.dtype, one.shape) == (GPU, other.dtype, other.shape)
            assert torch.equal(one.cpu(), other)
