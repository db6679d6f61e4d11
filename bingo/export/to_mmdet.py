"""mmdet: a checkpoint of MMEngine with the backbone under `backbone.`; MMDetection's ResNet has torchvision's names."""

import io
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from bingo.export.contract import Loading, NotReadBack, ReadBack, quoted
from bingo.export.resnets import STEM_CHANNELS, in_255, resnet_depth
from bingo.export.stored import StoredNetwork
from bingo.runtime.artefacts import canonical_json, write_bytes

SUFFIXES = (".pth", ".pt")
PREFIX = "backbone."


def write(network: StoredNetwork, path: Path) -> None:
    """The dict `meta`, `state_dict` as torch.save writes it; it holds tensors and strings alone."""
    resnet_depth(network, "mmdet")
    state = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in network.backbone.state_dict().items()}
    content = io.BytesIO()
    torch.save({"meta": {"bingo": canonical_json(network.metadata)}, "state_dict": state}, content)
    write_bytes(path, content.getvalue())


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Read by MMEngine into MMDetection's ResNet, strictly; its last stage is pooled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mmdet
            from mmdet.models.backbones import ResNet
            from mmengine.runner import load_checkpoint
    except Exception as error:  # mmdet refuses versions of mmcv by AssertionError
        raise NotReadBack(f"mmdet cannot be imported ({' '.join(str(error).split())[:80]})") from None
    net = ResNet(**_arguments(network))
    net.eval()  # gives None there
    with redirect_stdout(io.StringIO()):
        load_checkpoint(net, str(path), map_location="cpu", strict=True, revise_keys=[(f"^{re.escape(PREFIX)}", "")])

    def features(x: Tensor) -> Tensor:
        return net(x)[-1].mean(dim=(2, 3))

    return ReadBack(f"mmdet {mmdet.__version__}", features)


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """What a configuration of MMDetection says of the backbone and the images."""
    arguments = "".join(f", {name}={value}" for name, value in _arguments(network).items())
    pretrained = f'dict(type="Pretrained", checkpoint={quoted(file_name)}, prefix="{PREFIX}")'
    mean, std = in_255(network.image.mean), in_255(network.image.std)
    lines = [
        f'backbone = dict(type="ResNet"{arguments}, init_cfg={pretrained})',
        f"data_preprocessor = dict(mean={mean}, std={std}, bgr_to_rgb=True)",
    ]
    return Loading("python", "\n".join(lines))


def _arguments(network: StoredNetwork) -> dict[str, int]:
    channels = int(STEM_CHANNELS * network.width)
    return {"depth": resnet_depth(network, "mmdet"), "base_channels": channels, "stem_channels": channels}
