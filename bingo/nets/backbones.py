"""Build backbones by name: modules of timm or torchvision without the classifier, at any width, optionally with a stem for small images.

The returned module is the library's, so its state dict has the library's keys and the library can load it.
Shape letters: B images of a batch, D feature width.
"""

import copy
import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import timm
import torch
import torchvision
from timm.layers import DropPath
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torchvision import models as vision

from bingo.params.arch_names import OWN
from bingo.runtime import distributed
from bingo.runtime.errors import UserError, reason_of

_RANDOM_UNITS = (nn.Dropout, nn.Dropout2d, torchvision.ops.StochasticDepth)
RATES = ("drop_path_rate", "drop_rate")  # timm's names
# As in torchvision, and therefore in all released code, residual branches are not initialised to zero, as timm does by default.
_RESNET_INIT: dict[str, Any] = {"zero_init_last": False}
_TWO_HEADED = ("googlenet", "inception_v3")
_OPTIONS = ("num_heads", "global_pool", "dynamic_img_size", "img_size", "pooling")
_MOST_CHANNELS = 2**16
_TRANSFORMERS = tuple(f"timm.models.{module}" for module in ("vision_transformer", "vision_transformer_hybrid", "deit", "eva"))
_TIERED = 4  # a tiered stem has a quarter of its width in the first layer
_USUAL_PX = (*range(8, 65, 8), 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512, 518)
Built = TypeVar("Built")


class Backbone(nn.Module):
    """The type of `build_backbone`'s result, for annotations; at run time it is the library's module with two additional attributes.

    `forward(x)` maps float (B, 3, H, W) to pooled features (B, D), and `feature_width` is D. `classifier_names` are the prefixes, in
    the library's files, of the parameters of the classifier, which is left out here.
    """

    feature_width: int
    classifier_names: tuple[str, ...]


def build_backbone(arch: str, width: float, stem: str, seed_value: int, options: Mapping[str, Any] | None = None) -> Backbone:
    """The network `arch` with seeded initial weights and no classifier; torch's global generator does not change.

    `arch` is a timm name, torchvision/NAME or FILE.py:FUNCTION of bingo/nets/own.
    `width` multiplies all channels of a plain ResNet of timm (resnet50 with width 2.0 is SwAV's R50x2: Caron et al. 2020, src/resnet50.py,
    `widen`). `stem` is `imagenet` (the standard stem) or `small`: a first convolution with stride 1, which in ResNets is 3x3 and not
    followed by max pooling. A timm vision transformer accepts images of any whole number of patches: its position embedding is resampled.
    `options` are settings that differ from the library's defaults, as some published weights require: arguments of timm's model
    (`num_heads`, `global_pool`, `img_size` of the position embedding), `pooling` of a vision transformer (`token`: class token, `patches`:
    mean of the patches, `both`: concatenated, 2 D values), and `padding: same` for TensorFlow's padding of strided layers; and settings for
    training: `drop_rate`, `drop_path_rate` (timm's; 0 by default, whatever the library's default) and `batchnorm_momentum`.

    Raises UserError for an unknown name, and for a width, stem or option that the network does not support.
    """
    arguments = dict(options or {})
    padding, momentum = arguments.pop("padding", None), arguments.pop("batchnorm_momentum", None)
    rates = {name: arguments.pop(name) for name in RATES if arguments.get(name)}
    if unknown := [name for name in arguments if name not in _OPTIONS]:
        raise UserError(f"arch = {arch}: {unknown[0]} is not an option of weights, allowed are {', '.join(_OPTIONS)}")
    if arguments and not is_transformer(arch):
        if arguments.keys() == {"pooling"}:
            raise UserError(f"pooling = {arguments['pooling']}: {arch} is not a vision transformer of timm; set pooling: null")
        raise UserError(f"arch = {arch}: these are the weights of a vision transformer; set arch to timm's name of theirs")
    pooling = arguments.pop("pooling", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_value)
        if ".py:" in arch:
            net = _own(arch, width, rates)
        else:
            net = _torchvision(arch, width, rates) if arch.startswith("torchvision/") else _timm(arch, width, stem, arguments, rates)
        if momentum is not None:
            _set_momentum(net, arch, momentum)
        if padding == "same":
            _pad_as_tensorflow(net)
        if pooling is not None:
            _set_pooling(net, arch, pooling)
        if stem == "small":
            _make_stem_small(net, arch)
    return cast(Backbone, net)


def without_numbers(build: Callable[[], Built]) -> Built:
    """The result of `build` on torch's meta device, which takes no memory, or on the CPU if it cannot be built there (RegNets of timm
    1.0.28 with torch 2.11, networks that read a number of a tensor)."""
    with suppress(NotImplementedError, RuntimeError, TypeError, ValueError), torch.device("meta"):
        return build()
    return build()


def made_by_factory(arch: str) -> tuple[Any, ...]:
    """The result of the function FILE.py:FUNCTION in bingo/nets/own: a module and its feature width, and for a teacher mean, std and image
    size. Raises UserError if the call fails, or returns something else."""
    file, function = arch.rsplit(":", 1)
    try:
        spec: Any = importlib.util.spec_from_file_location(f"bingo.nets.own.{Path(file).stem}", OWN / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = getattr(module, function)()
    except Exception as error:  # the user's own code may raise anything
        reason = reason_of(f"{type(error).__name__}: {error}")
        raise UserError(f"factory = {arch}: the call in bingo/nets/own/{file} fails ({reason}); correct the file") from None
    if not (isinstance(made, tuple) and len(made) in (2, 5) and isinstance(made[0], nn.Module) and isinstance(made[1], int)):
        raise UserError(f"factory = {arch}: returns {type(made).__name__}, not a module and its width; see bingo/nets/own/example.py")
    return made


def _own(arch: str, width: float, rates: dict[str, float]) -> nn.Module:
    for rate, value in rates.items():
        raise UserError(f"{rate} = {value}: is not passed to {arch}; set {rate}: 0.0, and set the rate in the file")
    if width != 1:
        raise UserError(f"width = {width}: {arch} cannot be scaled; set width: 1.0")
    made = made_by_factory(arch)
    net: Any = made[0]
    net.feature_width, net.classifier_names = made[1], ()
    return net


def is_transformer(arch: str) -> bool:
    """Whether this is a timm vision transformer that accepts images of any number of patches and the arguments in `options`."""
    return timm.is_model(arch) and timm.model_entrypoint(arch).__module__ in _TRANSFORMERS


def check_images(backbone: Backbone, arch: str, crop_px: int, key: str = "image.crop_px") -> None:
    """Run one black image of `crop_px` (the parameter `key`) through the network; print a line on stderr if a position embedding is
    resampled for it.

    Raises UserError if the network does not accept the image (and lists sizes that it does) or does not return a pooled feature.
    """
    try:
        shape = _output_shape(backbone, crop_px)
    except (RuntimeError, AssertionError, ValueError) as error:
        fitting = " or ".join(map(str, sizes_near(backbone, crop_px)))
        way_out = f"set {key} to {fitting}, or another arch" if fitting else "take another arch"
        raise UserError(f"{key} = {crop_px}: {arch} does not accept this size ({reason_of(error)}); {way_out}") from None
    if shape != (1, backbone.feature_width):
        raise UserError(f"arch = {arch}: gives {shape} for one image instead of one pooled feature row; choose another network")
    if (grids := resampled_grids(backbone, crop_px)) and distributed.rank() == 0:
        trained, seen = ("x".join(map(str, grid)) for grid in grids)
        say_once(f"arch = {arch}: its position embedding of {trained} patches is resampled to {seen} for images of {crop_px} px")


@cache
def say_once(line: str) -> None:
    """Print a line on stderr, unless this process has printed it before."""
    print(line, file=sys.stderr, flush=True)


def resampled_grids(backbone: nn.Module, crop_px: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The grids (rows, columns) of a vision transformer's position embedding and of an image's patches, if they differ."""
    patches: Any = getattr(backbone, "patch_embed", None)
    if getattr(backbone, "pos_embed", None) is None or not getattr(backbone, "dynamic_img_size", False):
        return None
    trained, seen = tuple(patches.grid_size), tuple(patches.dynamic_feat_size((crop_px, crop_px)))
    return None if trained == seen else (trained, seen)  # type: ignore[return-value]


@torch.no_grad()
def _output_shape(backbone: nn.Module, crop_px: int) -> tuple[int, ...]:
    parameter, was_training = next(backbone.parameters()), backbone.training
    try:
        return tuple(backbone.eval()(parameter.new_zeros(1, 3, crop_px, crop_px)).shape)
    finally:
        backbone.train(was_training)


def sizes_near(backbone: Backbone, crop_px: int) -> list[int]:
    """The nearest image sizes below and above `crop_px` that the network accepts, among usual sizes and whole numbers of patches."""
    patch_px: Any = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    sizes = {*_USUAL_PX, *getattr(backbone, "pretrained_cfg", {}).get("input_size", ())[1:]}
    if patch_px:
        patch = max(patch_px)
        sizes |= {patch * max(1, crop_px // patch), patch * (crop_px // patch + 1)}
    below = next((size for size in sorted(sizes, reverse=True) if size < crop_px and takes(backbone, size)), None)
    above = next((size for size in sorted(sizes) if size > crop_px and takes(backbone, size)), None)
    return [size for size in (below, above) if size is not None]


def takes(backbone: Backbone, crop_px: int) -> bool:
    """Whether the network computes a pooled feature from an image of `crop_px`."""
    try:
        return _output_shape(backbone, crop_px) == (1, backbone.feature_width)
    except (RuntimeError, AssertionError, ValueError):
        return False


def _timm(arch: str, width: float, stem: str, arguments: dict[str, Any], rates: dict[str, float]) -> nn.Module:
    if not timm.is_model(arch):
        raise UserError(f"arch = {arch}: timm {timm.__version__} has no such network; see timm.list_models()")
    if width != 1:
        net: Any = _scaled_resnet(arch, width, stem, rates)
    else:
        arguments = ({"dynamic_img_size": True} if is_transformer(arch) else {}) | arguments
        net = _created(arch, (_RESNET_INIT if _is_resnet(arch) else {}) | arguments, rates)
    _draw_as_asked(net, rates)
    names = net.pretrained_cfg.get("classifier") or ()
    net.feature_width, net.classifier_names = net.head_hidden_size, (names,) if isinstance(names, str) else tuple(names)
    return net


def _created(arch: str, arguments: dict[str, Any], rates: dict[str, Any]) -> nn.Module:
    """timm's module. Raises UserError for a rate that it does not accept or would ignore."""
    try:
        net = timm.create_model(arch, num_classes=0, **arguments, **rates)
        ignored = [name for name in rates if not _ACTS[name](net)]
    except TypeError as error:  # timm's models raise an error for an unknown argument
        ignored = [name for name in rates if f"'{name}'" in str(error)]
        if not ignored:
            raise
    if ignored:
        raise UserError([f"{name} = {rates[name]}: {arch} does not use it; set {name}: 0.0" for name in ignored])
    return net


def _drops_branches(net: nn.Module) -> bool:
    return any(isinstance(module, DropPath) and module.drop_prob for module in net.modules())


def _drops_features(net: nn.Module) -> bool:
    """Whether a forward pass draws random numbers other than for branches: some networks use the rate only in the classifier, which is
    left out."""
    copied: Any = copy.deepcopy(net).train()
    for module in copied.modules():
        if isinstance(module, DropPath):
            module.eval()
    before = torch.random.get_rng_state()
    with torch.no_grad():
        copied(torch.zeros(2, *copied.pretrained_cfg["input_size"]))
    return not torch.equal(before, torch.random.get_rng_state())


_ACTS = {"drop_path_rate": _drops_branches, "drop_rate": _drops_features}


def _draw_as_asked(net: nn.Module, rates: Mapping[str, float]) -> None:
    """Switch off what was not requested: a few networks have dropout by default."""
    for module in net.modules():
        if "drop_path_rate" not in rates and isinstance(module, DropPath):
            module.drop_prob = 0.0
        if "drop_rate" not in rates and hasattr(module, "drop_rate"):
            module.drop_rate = 0.0  # type: ignore[assignment]
        if "drop_rate" not in rates and isinstance(module, _RANDOM_UNITS):
            module.p = 0.0


def _set_momentum(net: nn.Module, arch: str, momentum: float) -> None:
    layers = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise UserError(f"batchnorm_momentum = {momentum}: {arch} has no batch normalisation; set batchnorm_momentum: null")
    for layer in layers:
        layer.momentum = momentum


def _set_pooling(built: nn.Module, arch: str, pooling: str) -> None:
    """Set how a vision transformer pools its tokens. Raises UserError if it has no class token."""
    net: Any = built
    if pooling != "patches" and getattr(net, "cls_token", None) is None:
        raise UserError(f"pooling = {pooling}: {arch} has no class token; set pooling: patches, or null")
    net.forward_head = partial(_pooled_tokens, net, pooling)
    net.feature_width *= 2 if pooling == "both" else 1


def _pooled_tokens(net: Any, pooling: str, tokens_BLD: Tensor, pre_logits: bool = True) -> Tensor:
    """A replacement of `forward_head`: the class token, the mean of the patches, or both, (B, D) or (B, 2 D), each normalised if the
    network normalises after pooling."""
    parts = {"token": tokens_BLD[:, 0], "patches": tokens_BLD[:, net.num_prefix_tokens :].mean(dim=1)}
    return torch.cat([net.fc_norm(part_BD) for name, part_BD in parts.items() if pooling in (name, "both")], dim=1)


def _is_resnet(arch: str) -> bool:
    return timm.model_entrypoint(arch).__module__ == "timm.models.resnet"


def _scaled_resnet(arch: str, width: float, stem: str, rates: dict[str, float]) -> nn.Module:
    """A timm ResNet with every channel count multiplied by `width`, with the same stages as the unscaled network."""
    if not _is_resnet(arch):
        raise UserError(f"width = {width}: {arch} is not a timm ResNet and cannot be scaled; set width: 1.0")
    with torch.device("meta"):
        plan: Any = timm.create_model(arch, num_classes=0)
    stages = [getattr(plan, f"layer{i}")[0] for i in (1, 2, 3, 4)]
    grouped = any(type(block) not in (BasicBlock, Bottleneck) or block.conv2.groups > 1 for block in stages)
    if grouped or not isinstance(plan.bn1, nn.BatchNorm2d):
        raise UserError(f"width = {width}: {arch} has grouped convolutions or no batch normalisation; set width: 1.0")
    stem_width = _times(plan.feature_info[0]["num_chs"], width)
    planes = (info["num_chs"] // block.expansion for info, block in zip(plan.feature_info[1:], stages, strict=True))
    # timm hard-codes 64 channels after a single-convolution stem, but not after a deep one.
    changes: dict = {"channels": tuple(_times(channels, width) for channels in planes), "stem_width": stem_width // 2}
    changes |= _RESNET_INIT | rates
    if isinstance(plan.conv1, nn.Sequential):
        if plan.conv1[0].out_channels != plan.conv1[3].out_channels and changes["stem_width"] < _TIERED:
            if stem != "small":  # a small stem is a plain one, whose first layer is replaced anyway
                least = 2 * _TIERED / plan.feature_info[0]["num_chs"]
                raise UserError(f"width = {width}: the first layer of {arch} would have no channel; set width: {least:g}, or stem: small")
            changes["stem_type"] = "deep"
        return timm.create_model(arch, num_classes=0, **changes)
    net: Any = timm.create_model(arch, num_classes=0, stem_type="deep", **changes)
    net.conv1 = _first_conv(stem_width, kernel=7, stride=2)
    return net


def _times(channels: int, width: float) -> int:
    scaled = channels * width
    if scaled < 2 or scaled % 2:
        raise UserError(f"width = {width}: {channels} channels become {scaled:g}, not an even number; set a multiple of 1/32")
    if scaled > _MOST_CHANNELS:
        raise UserError(f"width = {width}: {channels} channels become {scaled:g}, allowed are {_MOST_CHANNELS}; lower width")
    return int(scaled)


def _first_conv(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    """A ResNet's first convolution, initialised like the others (He et al. 2015, fan out)."""
    conv = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _torchvision(arch: str, width: float, rates: dict[str, float]) -> nn.Module:
    name = arch.removeprefix("torchvision/")
    for rate, value in rates.items():
        raise UserError(f"{rate} = {value}: {arch} does not support it; set {rate}: 0.0, or use a timm network")
    if name not in vision.list_models(module=vision):
        raise UserError(f"arch = {arch}: torchvision {torchvision.__version__} has no such network; see its list_models()")
    if name in _TWO_HEADED:
        raise UserError(f"arch = {arch}: contains auxiliary classifiers; use timm's network instead (inception_v3)")
    if width != 1:
        raise UserError(f"width = {width}: {arch} cannot be scaled; set width: 1.0, or use timm's ResNet by its plain name")
    net: Any = vision.get_model(name, weights=None)
    # the classifier's last layer is registered last in every network
    path, layer = [(path, m) for path, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    net.feature_width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    net.classifier_names = (path,)
    net.set_submodule(path, nn.Identity())
    for module in net.modules():
        if isinstance(module, _RANDOM_UNITS):
            module.p = 0.0
    return net


def _pad_as_tensorflow(net: nn.Module) -> None:
    """Give strided layers TensorFlow's padding (SAME), one pixel less at the left and top; at stride 1 the two are equal."""
    for path, layer in list(net.named_modules()):
        if isinstance(layer, nn.MaxPool2d):
            net.set_submodule(path, MaxPool2dSame(layer.kernel_size, layer.stride))  # type: ignore[arg-type]
        elif isinstance(layer, nn.Conv2d) and layer.stride != (1, 1) and layer.kernel_size != (1, 1):
            old: Any = layer
            same: Any = Conv2dSame(old.in_channels, old.out_channels, old.kernel_size, old.stride, 0, old.dilation, old.groups)
            same.weight, same.bias = old.weight, old.bias
            net.set_submodule(path, same)


def _make_stem_small(built: nn.Module, arch: str) -> None:
    """Change the stem in place; a ResNet's deep stem becomes a single layer. Raises UserError for families with other kinds of stems."""
    net: Any = built
    first: Any = getattr(built, "conv1", None)
    if isinstance(built, ResNet | vision.ResNet):
        last = first if isinstance(first, nn.Conv2d) else first[-1]
        net.conv1 = _first_conv(last.out_channels, kernel=3, stride=1)
        net.maxpool = nn.Identity()
    elif isinstance(built, EfficientNet | MobileNetV3):
        net.conv_stem.stride = 1, 1
    elif isinstance(built, vision.EfficientNet | vision.MobileNetV2 | vision.MobileNetV3):
        net.features[0][0].stride = 1, 1
    else:
        raise UserError(f"stem = small: {arch} has no such stem; ResNets, EfficientNets and MobileNets do; set stem: imagenet")
