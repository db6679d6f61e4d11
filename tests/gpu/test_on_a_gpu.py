"""What the simulated GPU cannot test: a real GPU's numbers compared with the CPU's, waits reported by CUDA, NCCL, FAISS's GPU code, nvJPEG.

python -m benchmarks.gpu tests                        writes every deviation to the file of results
BINGO_TEST_DEVICE=cpu python -m pytest tests/gpu      a rehearsal on the CPU
"""

import os
from pathlib import Path

import faiss
import numpy as np
import pytest
import simplejpeg
import torch
from torch.multiprocessing import get_context

from bingo.bags import neighbors
from bingo.images.nvjpeg import decode_on
from bingo.nets.batchnorm import groups as batchnorm
from bingo.runtime import distributed
from tests.photographs import BASELINE, photographs
from tests.pretended_gpu.steps import CASES, CPU, Case, Outcome, deterministic, outcome_of, steps, trainer

DEVICE = torch.device(os.environ.get("BINGO_TEST_DEVICE", "cuda"))
REAL = DEVICE.type == "cuda"
# At least six times the effect of the order of sums: for two steps on the CPU with and without oneDNN, losses differ by up to 1.4e-4
# (relative) and updates by up to 0.008 of their length; in bf16 by 1.2e-3 and 0.033. Losses of CompRess and CoSS are small differences
# of large numbers, and ISD has a temperature of 0.02: in bf16 their losses change by up to 0.6 (relative) on the CPU too, and by a
# different amount for each number of threads. Only their updates are therefore compared in bf16.
LOSS_BOUND, UPDATE_BOUND = {"fp32": 2e-3, "bf16": 2e-2}, {"fp32": 0.05, "bf16": 0.3}
UNCERTAIN_IN_BF16, UNCERTAIN_BOUND = ("compress", "coss", "isd"), 0.6
pytestmark = pytest.mark.skipif(REAL and not torch.cuda.is_available(), reason="torch sees no GPU here")


def loss_deviations(got: Outcome, want: Outcome) -> dict[str, float]:
    """The relative differences of the losses."""
    return {name: abs(got.sums[name] - value) / max(abs(value), 1e-6) for name, value in want.sums.items()}


def update_deviation(start: dict[str, torch.Tensor], got: Outcome, want: Outcome) -> float:
    """The length of the difference of all weights, relative to that of their update."""
    names = [name for name, value in start.items() if value.is_floating_point()]
    apart, update = (torch.cat([(want.state[name] - other[name]).double().flatten() for name in names]) for other in (got.state, start))
    return float(apart.norm() / update.norm())


def two_steps(folder: Path, case: Case, device: torch.device) -> Outcome:
    """Two training steps as in a stage. On a GPU the second must not wait for it."""
    with deterministic():
        run = trainer(folder, case, device)
        try:
            steps(run, 2, lambda: torch.cuda.set_sync_debug_mode("error") if device.type == "cuda" else None)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return outcome_of(run)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("case", CASES if REAL else CASES[::9], ids=lambda case: case.name)
def test_a_step_agrees_with_the_cpu_and_does_not_wait(tmp_path, case):
    start = {name: value.clone() for name, value in trainer(tmp_path, case, CPU).method.state_dict().items()}
    want, got = (two_steps(tmp_path / device.type, case, device) for device in (CPU, DEVICE))
    losses, update = loss_deviations(got, want), update_deviation(start, got, want)
    print(f"{case.name}: losses differ by {max(losses.values()):.1e}, weights by {update:.1e} of their update")
    if case.precision == "bf16" and case.method in UNCERTAIN_IN_BF16:
        assert update <= UNCERTAIN_BOUND
    else:
        assert max(losses.values()) <= LOSS_BOUND[case.precision]
        assert update <= UPDATE_BOUND[case.precision]


def test_one_wrong_sign_is_beyond_the_bounds(tmp_path):
    """With the sign of one of the 20 convolutions' updates changed."""
    case = CASES[0]
    start = {name: value.clone() for name, value in trainer(tmp_path, case, CPU).method.state_dict().items()}
    want, got = (two_steps(tmp_path, case, CPU) for _ in range(2))
    assert update_deviation(start, got, want) == max(loss_deviations(got, want).values()) == 0
    name = "student.layer2.0.conv1.weight"
    got.state[name].copy_(2 * start[name] - want.state[name])
    assert update_deviation(start, got, want) > UPDATE_BOUND["fp32"]


SHAPES = [((512, 256, 32, 32), 1), ((96, 130, 7, 5), 3), ((512, 2048, 1, 1), 1), ((64, 24, 112, 112), 2)] if REAL else [((24, 6, 3, 2), 3)]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "blocks"), SHAPES)
def test_grouped_batchnorm_equals_batchnorm_of_each_group_in_float64(shape, blocks, dtype):
    """With its own kernels; the second call must not wait for the GPU. The mean of the input is 30 times its standard deviation."""
    groups, torch_random = 4, torch.Generator(DEVICE).manual_seed(0)
    x, dy = (torch.randn(shape, generator=torch_random, device=DEVICE) for _ in range(2))
    x, dy = ((part.to(dtype).contiguous(memory_format=torch.channels_last)) for part in (x + 30, dy))
    given = [0.5 + torch.rand(shape[1], generator=torch_random, device=DEVICE) for _ in range(4)]
    exact = [value.double() for value in (x, *given)]
    leaves, exact_leaves = ([values[index].requires_grad_() for index in (0, 3, 4)] for values in ([x, *given], exact))
    start = [value.clone() for value in given[:2]]

    def called() -> list[torch.Tensor]:
        for value, kept in zip(given[:2], start, strict=True):
            value.copy_(kept)
        with batchnorm.grouped_batchnorm(groups, len(x) // blocks):
            y = torch.nn.functional.batch_norm(x, *given, True, 0.3, 1e-3)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy), *(value.clone() for value in given[:2])]

    assert not REAL or (batchnorm._kernels() is not None and batchnorm._in_place(x, groups))
    first = called()
    if REAL:
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = called()
    finally:
        if REAL:
            torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, again))
    means, variances = (batchnorm._copies(value, groups) for value in exact[1:3])
    y = batchnorm._one_by_one(exact[0], blocks, groups, means, variances, *exact[3:], 0.3, 1e-3)
    want = [y.detach(), *torch.autograd.grad(y, exact_leaves, dy.double()), means.mean(0), variances.mean(0)]
    for name, got, wanted in zip(("y", "dx", "dweight", "dbias", "running mean", "running variance"), first, want, strict=True):
        apart = float((got.double() - wanted).abs().max() / wanted.abs().max())
        print(f"{shape}, {dtype}, {name}: differs by at most {apart:.1e} of the largest")
        assert apart <= (torch.finfo(dtype).eps if name in ("y", "dx") else 0) + 3e-5, name


def share_of_two(rank: int, folder: str, kind: str, answers) -> None:
    """One of two processes: its mean losses after two steps."""
    ports = {"cpu": "29611", "cuda": "29612"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[kind]}
    device = torch.device(kind, rank) if kind == "cuda" else CPU
    with distributed.group(device), deterministic():
        run = trainer(Path(folder) / str(rank), CASES[0], device)
        steps(run, 2)
        answers.put((rank, {name: float(distributed.mean(value)) for name, value in run.sums.items()}))


@pytest.mark.skipif(REAL and torch.cuda.device_count() < 2, reason="torch sees one GPU")
def test_two_processes_agree_with_two_on_the_cpu(tmp_path):
    """With NCCL, and with gloo."""
    context, found = get_context("spawn"), []
    for kind in ("cpu", DEVICE.type):
        answers = context.Queue()
        processes = [context.Process(target=share_of_two, args=(rank, str(tmp_path / kind), kind, answers)) for rank in (0, 1)]
        for process in processes:
            process.start()
        found.append(dict(answers.get(timeout=200) for _ in processes))
        for process in processes:
            process.join(100)
            assert process.exitcode == 0
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-6)
    assert found[1][0] == pytest.approx(found[0][0], rel=LOSS_BOUND["fp32"])


def test_neighbours_are_exact():
    """For sparse near-duplicates, among which half precision cannot find the best; compared with all cosines in float64."""
    rows, width, k = (40_000, 128, 10) if REAL else (600, 32, 5)
    if REAL:
        if not hasattr(faiss, "StandardGpuResources"):
            pytest.skip("FAISS was built without GPU support")
        assert faiss.get_num_gpus() > 0
        assert float(rows) ** 2 * width > neighbors._GPU_LEAST_PRODUCTS
    random = np.random.default_rng(0)
    groups_GD = random.random((rows // 50, width)) * (random.random((rows // 50, width)) < 0.2)
    base_ND = (groups_GD.repeat(50, axis=0) + 0.01 * random.random((rows, width))).astype(np.float32)
    found_QK, cosines_QK = neighbors.top_k(base_ND, base_ND, k, np.arange(rows))
    unit_ND = torch.nn.functional.normalize(torch.from_numpy(base_ND).to(DEVICE, torch.float64))
    for start in range(0, rows, 2000):
        scores_qN = unit_ND[start : start + 2000] @ unit_ND.T
        here = torch.arange(len(scores_qN), device=DEVICE)
        scores_qN[here, start + here] = -torch.inf
        best_qK = scores_qN.topk(k).values.cpu().numpy()
        own_qK = scores_qN.gather(1, torch.from_numpy(found_QK[start : start + 2000]).to(DEVICE, torch.int64)).cpu().numpy()
        np.testing.assert_allclose(own_qK, best_qK, rtol=0, atol=5e-7)
        np.testing.assert_allclose(cosines_QK[start : start + 2000], best_qK, rtol=0, atol=1e-6)


def test_nvjpeg_decodes_the_cpus_pixels_except_interpolated_colours(tmp_path):
    """It accepts all files that are given to it. It repeats subsampled colours, like libjpeg with fast upsampling, whereas libjpeg
    interpolates them by default; this deviation, the largest possible for the noise in this photograph, is printed."""
    paths = photographs(tmp_path)[:BASELINE]
    files = [torch.frombuffer(bytearray((tmp_path / path).read_bytes()), dtype=torch.uint8) for path in paths]
    for path, got, usual in zip(paths, decode_on(DEVICE, files), decode_on(CPU, files), strict=True):
        assert got is not None, path
        kind = "GRAY" if path == "grey.jpg" else "RGB"
        repeated = simplejpeg.decode_jpeg((tmp_path / path).read_bytes(), kind, fastupsample=REAL)
        want = torch.from_numpy(repeated).permute(2, 0, 1).float()
        interpolated = (got.cpu().float() - usual.float()).abs()
        print(f"{path}: nvJPEG's pixels differ by {float(interpolated.mean()):.2f} of 255 levels, at most {float(interpolated.max()):.0f}")
        assert (got.cpu().float() - want).abs().max() <= 3, path
