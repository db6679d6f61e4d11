"""Milliseconds of BatchNorm with batch statistics for large bf16 layers, forward and backward: in one group, and in 16 by each method.

python -m benchmarks.gpu_batchnorm                       on a GPU, also prints the kernels of each method
python -m benchmarks.gpu_batchnorm --shapes 8,16,4,4     on a CPU; Triton's kernels need a GPU
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_profile import profiled, seconds_of
from benchmarks.parser import Parser
from bingo.nets.batchnorm import groups as batchnorm

GROUPS, REPEATS = 16, 20
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "one group": lambda x, mean, var, scale: F.batch_norm(x, mean, var, scale, scale, True, 0.1, 1e-5),
    "side by side": lambda x, mean, var, scale: batchnorm._side_by_side(
        x, 1, GROUPS, batchnorm._copies(mean, GROUPS), batchnorm._copies(var, GROUPS), scale, scale, 0.1, 1e-5
    ),
    "kernels": lambda x, mean, var, scale: batchnorm._kernels()(x, mean, var, scale, scale, 0.1, 1e-5, 1, GROUPS),
}


def measure(shape: list[int], device: torch.device) -> None:
    """Print a layer's milliseconds with each method, and its kernels."""
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy, mean, var = torch.randn_like(x), torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    scale = torch.ones(shape[1], device=device, requires_grad=True)
    for name, way in WAYS.items():
        if name == "kernels" and (device.type == "cpu" or batchnorm._kernels() is None):
            print(f"{shape}, kernels: Triton does not work here")
            continue

        def step(way: Callable = way) -> None:
            torch.autograd.grad(way(x, mean, var, scale), (x, scale), dy)

        seconds_of(step, REPEATS, device)
        seconds = seconds_of(step, REPEATS, device) / REPEATS
        least = 8 * x.numel() * x.element_size() / 1e9  # x is read twice and y written; x and dy are read twice and dx written
        print(f"{shape}, {name}: {1000 * seconds:.3f} ms, {least / seconds:,.0f} GB/s of the bytes that must be moved")
        print(profiled(step, REPEATS, device), flush=True)


def main() -> None:
    """Measure and print the requested shapes."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["512,256,32,32", "512,2048,4,4"], help="N,C,H,W")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for shape in options.shapes:
        measure([int(number) for number in shape.split(",")], torch.device(options.device))


if __name__ == "__main__":
    main()
