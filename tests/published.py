"""Networks in the layouts of published code, written down from that code and not from this project's: what its checkpoints hold."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode with running statistics and biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


class WideResNet50(ResNet):
    """torchvision's ResNet-50 with every channel count multiplied. `split_padding`: as in SwAV's src/resnet50.py and VICReg's
    resnet.py, a layer of its own pads the image by 1 before the first convolution pads by 2.
    """

    def __init__(self, widen: float, split_padding: bool = False):
        self.widen = widen
        super().__init__(Bottleneck, [3, 4, 6, 3])
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


class Swav(nn.Module):
    """main_swav.py: the network, `projection_head` (Linear, BatchNorm, ReLU, Linear) and `prototypes`, all in one module."""

    def __init__(self, widen: float, hidden: int, prototypes: int = 30):
        super().__init__()
        net, width = WideResNet50(widen, split_padding=True), int(2048 * widen)
        for name, child in net.named_children():
            self.add_module(name, child)
        self.trunk = [net]  # in a list, so that its names appear once
        head = nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 128))
        self.projection_head, self.prototypes = head, nn.Linear(128, prototypes, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk[0].eval()(x)
        return features, self.projection_head(features)
