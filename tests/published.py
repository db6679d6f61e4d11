"""Networks and checkpoints in the layouts of published code, written from that code and not from this project's.

For each format, a function returns the checkpoint of a backbone (`trunk`, of feature width `width`) and the module that maps features to
keys before normalisation. Weights other than the teacher's have the right names, and are empty if nothing depends on them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

Published = tuple[dict, nn.Module]


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode, with running statistics and biases that change its output."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


def under(prefix: str, *nets: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for net in nets for name, tensor in net.state_dict().items()}


def empty(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names with a prefix and the same shapes, without storage."""
    return {f"{prefix}{name}": torch.zeros(()).expand(tensor.shape) for name, tensor in state.items()}


def has_batchnorm(net: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


class WideResNet(ResNet):
    """torchvision's ResNet-50 (or 18) with every channel count multiplied and no classifier.

    `split_padding`: as in SwAV's src/resnet50.py and VICReg's resnet.py, a separate layer pads the image by 1 before the first convolution,
    which pads by 2.
    """

    def __init__(self, widen: float, split_padding: bool = False, blocks: tuple[int, ...] = (3, 4, 6, 3)):
        self.widen = widen
        super().__init__(BasicBlock if sum(blocks) == 8 else Bottleneck, list(blocks))
        channels = int(64 * widen)
        self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=2 if split_padding else 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.padding = nn.ConstantPad2d(1, 0.0) if split_padding else nn.Identity()
        self.fc = nn.Identity()

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        if planes == 64:
            self.inplanes = int(64 * self.widen)
        return super()._make_layer(block, int(planes * self.widen), *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.padding(x))


class Vit(nn.Module):
    """A vision transformer with DINO's names (vision_transformer.py), which MoCo-v3 and DINOv2 share; `scaled`: DINOv2's layer scale.

    The position embedding is for images of `side_px`. The output is the normalised class token.
    """

    def __init__(self, width: int, heads: int, patch_px: int, side_px: int, scaled: bool = False):
        super().__init__()
        self.heads, self.grid = heads, side_px // patch_px
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid**2 + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch_px, patch_px)
        self.blocks = nn.ModuleList(self._block(width, scaled) for _ in range(12))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @staticmethod
    def _block(width: int, scaled: bool) -> nn.Module:
        block = nn.Module()
        block.norm1, block.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        block.attn, block.mlp = nn.Module(), nn.Module()
        block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for name in ("ls1", "ls2") if scaled else ():
            block.add_module(name, nn.Module())
            getattr(block, name).gamma = nn.Parameter(torch.rand(width))
        return block

    def _attend(self, attn: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in attn.qkv(x).chunk(3, dim=2))
        weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3)
        return attn.proj((weights @ v).transpose(1, 2).flatten(2))

    def _positions(self, grid: int) -> Tensor:
        token, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid))
        resized = F.interpolate(patches.permute(0, 3, 1, 2), (grid, grid), mode="bicubic", antialias=True)
        return torch.cat([token, patches.flatten(1, 2) if grid == self.grid else resized.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed.proj(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        x = x + self._positions(patches.shape[2])
        for block in self.blocks:
            scale = [getattr(block, name).gamma if hasattr(block, name) else 1.0 for name in ("ls1", "ls2")]
            x = x + scale[0] * self._attend(block.attn, block.norm1(x))
            x = x + scale[1] * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
        return self.norm(x)[:, 0]


def moco(trunk: nn.Module, width: int) -> Published:
    """main_moco.py, moco/builder.py of MoCo-v2."""
    head = lively(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)))
    query = under("", trunk) | under("fc.", head)
    queue = {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    state = {f"module.encoder_q.{name}": tensor for name, tensor in query.items()} | empty("module.encoder_k.", query) | queue
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}}, head


def moco_v3(trunk: nn.Module, width: int) -> Published:
    """moco/builder.py: `fc` with two layers after a ResNet, `head` with three after a vision transformer."""
    name, hidden = ("head", 2) if isinstance(trunk, Vit) else ("fc", 1)
    layers: list[nn.Module] = []
    for i in range(hidden):
        layers += [nn.Linear(40 if i else width, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU(inplace=True)]
    head = lively(nn.Sequential(*layers, nn.Linear(40, 24, bias=False), nn.BatchNorm1d(24, affine=False)))
    base = under("", trunk) | under(f"{name}.", head)
    state = {f"module.base_encoder.{name}": tensor for name, tensor in base.items()} | empty("module.momentum_encoder.", base)
    return {"epoch": 300, "state_dict": state | empty("module.predictor.", head.state_dict()), "scaler": {}}, head


def swav(trunk: nn.Module, width: int) -> Published:
    """src/resnet50.py: projection_head and prototypes are modules of the network itself."""
    head = lively(nn.Sequential(nn.Linear(width, 48), nn.BatchNorm1d(48), nn.ReLU(inplace=True), nn.Linear(48, 128)))
    prototypes = {"module.prototypes.weight": torch.zeros(30, 128)}
    return under("module.", trunk) | under("module.projection_head.", head) | prototypes, head


def dino(trunk: nn.Module, width: int) -> Published:
    """main_dino.py: utils.MultiCropWrapper of the network and a DINOHead; the student in DDP, and the teacher too if it has BatchNorm."""
    mlp = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 24))
    last = {"head.last_layer.weight_g": torch.ones(50, 1), "head.last_layer.weight_v": torch.zeros(50, 24)}
    state = under("backbone.", trunk) | under("head.mlp.", lively(mlp)) | last
    ddp = "module." if has_batchnorm(trunk) else ""
    teacher = {f"{ddp}{name}": tensor for name, tensor in state.items()}
    return {"student": empty("module.", state), "teacher": teacher, "epoch": 800, "dino_loss": {"center": torch.zeros(1, 50)}}, mlp


def simsiam(trunk: nn.Module, width: int) -> Published:
    """simsiam/builder.py."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    head = lively(nn.Sequential(*layers, nn.Linear(width, 40), nn.BatchNorm1d(40, affine=False)))
    state = under("module.encoder.", trunk) | under("module.encoder.fc.", head)
    predictor = {"module.predictor.0.weight": torch.zeros(8, 40), "module.predictor.3.bias": torch.zeros(40)}
    return {"epoch": 100, "arch": "resnet50", "state_dict": state | predictor}, head


def barlow(trunk: nn.Module, width: int) -> Published:
    """main.py: the loss standardises the projector's output by `bn`."""
    layers = [nn.Linear(width, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU(inplace=True)]
    layers += [nn.Linear(40, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU(inplace=True), nn.Linear(40, 24, bias=False)]
    projector, bn = lively(nn.Sequential(*layers)), lively(nn.BatchNorm1d(24, affine=False))
    state = under("module.backbone.", trunk) | under("module.projector.", projector) | under("module.bn.", bn)
    return {"epoch": 1000, "model": state, "optimizer": {}}, nn.Sequential(projector, bn)


def vicreg(trunk: nn.Module, width: int) -> Published:
    """main_vicreg.py: `Projector`."""
    layers = [nn.Linear(width, 40), nn.BatchNorm1d(40), nn.ReLU(True), nn.Linear(40, 40), nn.BatchNorm1d(40), nn.ReLU(True)]
    projector = lively(nn.Sequential(*layers, nn.Linear(40, 24, bias=False)))
    return {"epoch": 1000, "model": under("module.backbone.", trunk) | under("module.projector.", projector)}, projector


def seed(trunk: nn.Module, width: int) -> Published:
    """main.py, seed/builder.py: the student of a SwAV teacher."""
    head = lively(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)))
    state = under("module.student.", trunk) | under("module.student.fc.", head)
    others = {"module.teacher.conv1.weight": torch.zeros(1), "module.teacher.projection_head.0.weight": torch.zeros(1)}
    queue = {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state | others | queue, "optimizer": {}}, head


def disco(trunk: nn.Module, width: int, name: str = "fc") -> Published:
    """DisCo/moco/builder_kq_mse_largeembedding_2048.py: the head is called `classifier` after an EfficientNet."""
    head = lively(nn.Sequential(nn.Linear(width, 56), nn.ReLU(), nn.Linear(56, 128)))
    student = under("", trunk) | under(f"{name}.", head)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in student.items()} | empty("module.encoder_k.", student)
    state |= {f"module.teacher_encoder_{which}.fc.0.weight": torch.zeros(1) for which in "qk"}
    return {"state_dict": state | {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}}, head


def simclr(trunk: nn.Module, width: int) -> Published:
    """convert.py of tonylins/simclr-converter (v1): a ResNet with its classifier."""
    return {"state_dict": under("", trunk) | under("fc.", nn.Linear(width, 10))}, nn.Identity()


def byol(trunk: nn.Module, width: int) -> Published:
    """convert.py of ajtejankar/byol-convert: a ResNet with its classifier, without counters."""
    state = under("", trunk) | under("fc.", nn.Linear(width, 10))
    return {name: tensor for name, tensor in state.items() if "tracked" not in name}, nn.Identity()


def pad_as_tensorflow(net: nn.Module) -> nn.Module:
    """resnet.py of ajtejankar/byol-convert, `pad_same`: layers do not pad; their inputs are padded with zeros."""

    def pad(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        kernel, stride = (size if isinstance(size, int) else size[0] for size in (layer.kernel_size, layer.stride))
        side = inputs[0].shape[2]
        missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        return F.pad(inputs[0], [missing // 2, missing - missing // 2] * 2)

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            layer.padding = 0
            layer.register_forward_pre_hook(pad)
    return net


class SimclrV2(nn.Module):
    """resnet.py of Separius/SimCLRv2-Pytorch, without selective kernels."""

    def __init__(self, widen: float):
        super().__init__()
        before, stages = (
            int(64 * widen),
            [nn.Sequential(self._conv(3, int(64 * widen), 7, 2), self._norm(int(64 * widen)), nn.MaxPool2d(3, 2, 1))],
        )
        for stage, blocks in enumerate((3, 4, 6, 3)):
            inner = int(64 * widen) * 2**stage
            holder = nn.Module()
            holder.blocks = nn.ModuleList()
            for block in range(blocks):
                holder.blocks.append(self._block(before, inner, stride=2 if stage and not block else 1, first=not block))
                before = 4 * inner
            stages.append(holder)
        self.net, self.fc = nn.Sequential(*stages), nn.Linear(before, 10)

    @staticmethod
    def _conv(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(before, after, kernel, stride, padding=(kernel - 1) // 2, bias=False)

    @staticmethod
    def _norm(channels: int, relu: bool = True) -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU() if relu else nn.Identity())

    def _block(self, before: int, inner: int, stride: int, first: bool) -> nn.Module:
        block = nn.Module()
        if first:
            block.projection = nn.Module()
            block.projection.shortcut = self._conv(before, 4 * inner, 1, stride)
            block.projection.bn = self._norm(4 * inner, relu=False)
        layers = [self._conv(before, inner, 1), self._norm(inner), self._conv(inner, inner, 3, stride), self._norm(inner)]
        block.net = nn.Sequential(*layers, self._conv(inner, 4 * inner, 1), self._norm(4 * inner, relu=False))
        return block

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[0](x)
        for stage in self.net[1:]:
            for block in stage.blocks:
                shortcut = block.projection.bn(block.projection.shortcut(x)) if hasattr(block, "projection") else x
                x = F.relu(shortcut + block.net(x))
        return x.mean(dim=[2, 3])


def simclr_v2(trunk: SimclrV2, width: int) -> Published:
    """convert.py of Separius/SimCLRv2-Pytorch: `resnet` with its classifier, and the contrastive head."""
    layers: list[nn.Module] = []
    for after in (width, width, 24):
        layers += [nn.Linear(width, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    head = lively(nn.Sequential(*layers[:-1]))
    return {"resnet": trunk.state_dict(), "head": under("layers.", head)}, head


WITH_A_HEAD = {f.__name__: f for f in (barlow, dino, disco, moco, moco_v3, seed, simsiam, swav, vicreg)}
