"""hub: a folder for the Hugging Face Hub, which timm.create_model("hf-hub:OWNER/NAME") reads there and ("local-dir:FOLDER") here.

`config.json` has timm's format (timm/models/_hub.py, save_config_for_hf): architecture, arguments of the model, names of the classes, and
as `pretrained_cfg` how images are resized, cropped and normalised, for timm.data.create_transform.
"""

import math
from pathlib import Path
from typing import Any

import timm

from bingo.export.contract import Loading, ReadBack, quoted
from bingo.export.rebuilding import timm_arguments
from bingo.export.stored import StoredNetwork
from bingo.export.to_timm import timm_arch, timm_module
from bingo.nets.checkpoint import save_network
from bingo.params import ImageParams
from bingo.runtime.artefacts import write_json
from bingo.runtime.errors import UserError, reason_of

SUFFIXES = ()
CLASSIFIES = True
FILES = ("README.md", "config.json", "model.safetensors")


def write(network: StoredNetwork, path: Path) -> None:
    """Write config.json and model.safetensors; README.md is the model card."""
    arguments, net = _arguments(network), timm_module(network)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", _config(network, net, arguments))
    save_network(path / "model.safetensors", net.state_dict(), {**network.described, "arch": timm_arch(network)})


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """The folder as timm builds and loads it."""
    return ReadBack(f"timm {timm.__version__}", timm.create_model(f"local-dir:{path}", pretrained=True).eval())


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """A call of timm's create_model, and the transform of an image."""
    lines = [
        "import timm",
        f'net = timm.create_model({quoted(f"local-dir:{file_name}")}, pretrained=True).eval()  # on the Hub: "hf-hub:OWNER/NAME"',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))  # of a PIL image to float32 (3, H, W)",
    ]
    return Loading("python", "\n".join(lines))


def check_push(repo_id: str) -> None:
    """Raises UserError unless `repo_id` is OWNER/NAME and the user has a token of the Hub."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        reason = "" if "/" in repo_id else "the owner is missing"
    except HFValidationError as error:
        reason = reason_of(error)
    if reason:
        raise UserError(f"--push = {repo_id}: allowed is OWNER/NAME of a model on the Hugging Face Hub ({reason})")
    if get_token() is None:
        raise UserError(f"--push = {repo_id}: no token of the Hugging Face Hub was found; run: hf auth login, or set HF_TOKEN")


def push(folder: Path, repo_id: str) -> str:
    """Upload the folder with the user's token, to a new private repository unless it exists; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="Export by BINGO")
    except Exception as error:  # of the network: their classes depend on what huggingface_hub is built on
        way_out = f"{folder} is complete, upload it with: hf upload {repo_id} {folder}"
        raise UserError(f"--push = {repo_id}: the upload failed ({reason_of(error)}); {way_out}") from None
    return str(address)


def _arguments(network: StoredNetwork) -> dict[str, Any]:
    """What config.json gives to timm.create_model. Raises UserError if arguments cannot describe the network."""
    arch, problem = timm_arch(network), ""
    arguments = timm_arguments(network.backbone, arch, network.width)
    if network.stem != "imagenet":
        problem = f"stem {network.stem}"
    elif "stem_type" in arguments:
        problem = f"width {network.width:g}, for which timm has no argument in {arch}, whose first convolution has 64 channels"
    if problem:
        raise UserError(f"--to = hub: the network has {problem}, which timm.create_model cannot build; export --to onnx or safetensors")
    return arguments


def _config(network: StoredNetwork, net: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    image, classes = network.image, list(network.classes)
    return {
        "architecture": timm_arch(network),
        "num_classes": len(classes),
        "num_features": net.num_features,
        **({"label_names": classes} if classes else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "input_size": [3, image.crop_px, image.crop_px],
            "fixed_input_size": False,
            "interpolation": image.interpolation,
            "crop_pct": _crop_pct(image),
            "crop_mode": "center",
            "mean": image.mean,
            "std": image.std,
            "num_classes": len(classes),
            "first_conv": net.pretrained_cfg.get("first_conv"),
            "classifier": net.pretrained_cfg.get("classifier"),
        },
    }


def _crop_pct(image: ImageParams) -> float:
    """The share that timm divides the crop's side by and rounds down, to get `resize_px` of the short side."""
    share = image.crop_px / image.resize_px
    return share if math.floor(image.crop_px / share) == image.resize_px else math.nextafter(share, 0)
