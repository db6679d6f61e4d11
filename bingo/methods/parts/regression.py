"""The head of a regression of the teacher's outputs."""

from torch import nn

from bingo import seeds
from bingo.nets.heads import batchnorm_mlp


def regression_head(width: int, hidden: int, out: int, seed: int) -> nn.Sequential:
    """SimReg's head of 4 linear layers (mlp_arch.py): width -> hidden (BatchNorm, ReLU) -> width -> hidden (BatchNorm, ReLU) -> out."""
    inner = batchnorm_mlp(width, hidden, width, seeds.torch_seed(seed, "inner head"))
    return nn.Sequential(inner, batchnorm_mlp(width, hidden, out, seeds.torch_seed(seed, "student head")))
