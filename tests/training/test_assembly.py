"""Before the first step, both student and moving average of a method have the weights that the student starts from."""

import pytest
import torch

from bingo.nets.backbones import build_backbone
from bingo.params import load_params, method_names
from bingo.planning.dry_run import dry_student, dry_teacher
from bingo.training.assembly import baseline, distillation
from tests.workspace import ROOT

CPU = torch.device("cpu")
PARAMS = load_params(ROOT / "params.yaml")
TRAININGS = [*(("distill", name) for name in method_names()), ("baseline", "moco"), ("baseline", "isd")]


@pytest.mark.parametrize(("kind", "name"), TRAININGS)
def test_every_copy_of_the_student_starts_from_the_weights(kind, name):
    params = PARAMS.model_copy(update={"distill": PARAMS.distill.model_copy(update={"method": name})})
    network = params.student
    start = build_backbone(network.arch, network.width, network.stem, 77)
    for buffer in start.buffers():
        buffer.fill_(3)
    if kind == "baseline":
        method = baseline(params, name).build(CPU, "fp32", start=start)
    else:
        dry = dry_student(params, dry_teacher(params, checkpoint=False))
        method = distillation(params).build(CPU, "fp32", dry.stored, dry.bags, start=start)
    wanted = start.state_dict()
    copies = [module for module in method.modules() if module.state_dict().keys() == wanted.keys()]
    assert method.student in copies
    section = params.methods.section(name)
    assert len(copies) >= 1 + section.momentum_keys("momentum" if kind == "baseline" else params.distill.keys)
    assert all(torch.equal(tensor, wanted[key]) for module in copies for key, tensor in module.state_dict().items())
