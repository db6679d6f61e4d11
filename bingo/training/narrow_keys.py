"""Reduction of a teacher's keys to their principal components, by a linear layer at the end of its head.

A key of a backbone without a head is as wide as its features, often 1,280 or more, and the costs of contrastive losses and of the store are
proportional to its width. The layer is fitted on the unit keys of centre views of train images: x -> W (x - mean), where W has the leading
eigenvectors of their covariance, each with its largest component positive, divided by the square roots of the eigenvalues if the keys are
whitened. The layer is part of the teacher's file and its fingerprint, so it applies to both stored and live keys. Shape letters: n images
of a batch, D key width before, P after.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.images.images import Images
from bingo.images.loader import center_views
from bingo.nets.backbones import Backbone
from bingo.nets.heads import Unit, head_widths
from bingo.params import ImageParams, TeacherParams
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar

FITTED_IMAGES = 32768  # drawn from the train images, if there are more: 4 for each dimension of the widest key
BATCH_IMAGES = 256
LEAST_VARIANCE = 1e-6  # of components that are whitened, as a fraction of the largest


def narrowing_head(head: nn.Sequential | None, width: int, key_width: int) -> nn.Sequential:
    """`head` followed by normalisation and a linear layer to `key_width`, whose weights are not fitted yet. `width`: that of the features.

    Raises UserError if the keys are not wider than `key_width`.
    """
    whole = width if head is None else head_widths(head)[-1]
    if key_width >= whole:
        line = f"teacher.key_width = {key_width}: the teacher's keys are {whole} wide"
        raise UserError(f"{line}; set teacher.key_width to {max(1, whole // 2)} or another smaller number, or to null")
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(*(head or []), Unit(), nn.Linear(whole, key_width))


def narrowed(
    backbone: Backbone, head: nn.Sequential | None, params: TeacherParams, image: ImageParams, images: Images, train_rows: int,
    seed: int, device: torch.device,
) -> nn.Sequential:  # fmt: skip
    """The fitted `narrowing_head` of a teacher with `params.key_width`; `image` describes its images. Networks are moved to `device`.

    Raises UserError as `narrowing_head` does, and if there are fewer train images than components.
    """
    assert params.key_width is not None
    wanted = narrowing_head(head, backbone.feature_width, params.key_width)
    if train_rows <= params.key_width:
        raise UserError(f"teacher.key_width = {params.key_width}: there are {train_rows} train images; set it to less")
    rows = seeds.distinct(seed, "narrow keys", 0, train_rows, FITTED_IMAGES)
    whole = nn.Sequential(backbone, *wanted[:-1]).to(device).to(memory_format=torch.channels_last).eval()
    mean_D, components_PD = principal_components(_outputs(whole, images, rows, image, device), params.key_width, params.key_whiten)
    wanted[-1].load_state_dict({"weight": components_PD, "bias": -components_PD @ mean_D})
    return wanted


@torch.no_grad()
def _outputs(network: nn.Module, images: Images, rows: np.ndarray, image: ImageParams, device: torch.device) -> Iterator[Tensor]:
    with progress_bar("principal components", len(rows), "images") as bar:
        for views_n in center_views(images, rows, image, device, BATCH_IMAGES):
            yield network(views_n).float()
            bar.advance(len(views_n))


def principal_components(batches: Iterable[Tensor], components: int, whiten: bool) -> tuple[Tensor, Tensor]:
    """Mean (D,) and leading components (P, D) of rows given in batches, float64 on the CPU."""
    count, sum_D, square_DD = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for x_nD in batches:
        count += len(x_nD)
        sum_D, square_DD = sum_D + x_nD.double().sum(dim=0).cpu(), square_DD + (x_nD.T @ x_nD).double().cpu()
    mean_D = sum_D / count
    variance_D, vectors_DD = torch.linalg.eigh(square_DD / count - torch.outer(mean_D, mean_D))  # rising
    components_PD = vectors_DD.T.flip(0)[:components]
    largest_P1 = components_PD.gather(1, components_PD.abs().argmax(dim=1, keepdim=True))
    components_PD = components_PD * largest_P1.sign()
    if whiten:
        variance_P = variance_D.flip(0)[:components]
        components_PD = components_PD / variance_P.clamp(min=LEAST_VARIANCE * float(variance_P[0])).sqrt()[:, None]
    return mean_D, components_PD
