"""The networks that are timed: VGG-16, ResNets and MobileNetV2, as their papers give them. Nothing is downloaded.

They have the layers and the number of parameters of torchvision's models of the same names, with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from torch_frame.errors import SettingError

_VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""(expansion, channels, blocks, stride of the first block): table 2 of arXiv:1801.04381."""


def build(name: str, num_classes: int = 1000) -> nn.Module:
    """A network of (N, 3, H, W) images to (N, num_classes) scores, in training mode.

    Raises:
        SettingError: for a name that is not in `MODELS`.

    >>> sum(parameter.numel() for parameter in build("resnet50").parameters())
    25557032
    """
    if name not in MODELS:
        raise SettingError(f"model_type is {name!r}; it has to be one of {', '.join(map(repr, MODELS))}.")
    return MODELS[name](num_classes)


# ---------------------------------------------------------------- VGG


def vgg16(num_classes: int = 1000) -> nn.Module:
    """Configuration D of "Very Deep Convolutional Networks" (Simonyan and Zisserman, arXiv:1409.1556)."""
    layers: list[nn.Module] = []
    width_in = 3
    for widths in _VGG16_WIDTHS:
        for width in widths:
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU(inplace=True)]
            width_in = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    head += [nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    head += [nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4096, num_classes)]
    return nn.Sequential(*layers, *head)


# ---------------------------------------------------------------- ResNet


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same_shape = stride == 1 and width_in == width_out
        self.shortcut = nn.Identity() if same_shape else conv_norm(width_in, width_out, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, width_in, H, W); returns (N, width_out, H / stride, W / stride)."""
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def conv_norm(
    width_in: int,
    width_out: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    """A convolution without bias, batch norm and, if one is given, an activation."""
    conv = nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    active = [] if activation is None else [activation(inplace=True)]
    return nn.Sequential(conv, nn.BatchNorm2d(width_out), *active)


def basic_block(width_in: int, width: int, stride: int) -> Residual:
    body = nn.Sequential(conv_norm(width_in, width, 3, stride, activation=nn.ReLU), conv_norm(width, width, 3))
    return Residual(body, width_in, width, stride)


def bottleneck(width_in: int, width: int, stride: int) -> Residual:
    """The stride is in the 3x3 convolution, as in torchvision ("ResNet V1.5"); the paper has it in the first 1x1."""
    body = nn.Sequential(
        conv_norm(width_in, width, 1, activation=nn.ReLU),
        conv_norm(width, width, 3, stride, activation=nn.ReLU),
        conv_norm(width, 4 * width, 1),
    )
    return Residual(body, width_in, 4 * width, stride)


def resnet(
    block: Callable[[int, int, int], Residual], expansion: int, depths: Iterable[int], num_classes: int = 1000
) -> nn.Module:
    """Table 1 of "Deep Residual Learning for Image Recognition" (He et al., arXiv:1512.03385).

    Args:
        block: (width_in, width, stride) -> a block of width `expansion * width`.
        depths: blocks in each of the four stages.
    """
    stem = nn.Sequential(conv_norm(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, padding=1))
    stages: list[nn.Module] = []
    width_in = 64
    for number, depth in enumerate(depths):
        width = 64 * 2**number
        for index in range(depth):
            stages.append(block(width_in, width, 2 if number > 0 and index == 0 else 1))
            width_in = expansion * width
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, num_classes))


# ---------------------------------------------------------------- MobileNet


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the width, 3x3 depthwise, 1x1 back, without an activation behind it."""

    def __init__(self, width_in: int, width_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = width_in * expansion
        widen = [] if expansion == 1 else [conv_norm(width_in, width, 1, activation=nn.ReLU6)]
        depthwise = conv_norm(width, width, 3, stride, groups=width, activation=nn.ReLU6)
        self.body = nn.Sequential(*widen, depthwise, conv_norm(width, width_out, 1))
        self.adds_input = stride == 1 and width_in == width_out

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, width_in, H, W); returns (N, width_out, H / stride, W / stride)."""
        out: Tensor = self.body(x)
        return x + out if self.adds_input else out


def mobilenet_v2(num_classes: int = 1000) -> nn.Module:
    """Table 2 of "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (Sandler et al., arXiv:1801.04381)."""
    layers: list[nn.Module] = [conv_norm(3, 32, 3, 2, activation=nn.ReLU6)]
    width_in = 32
    for expansion, width, depth, stride in _MOBILENET_V2_STAGES:
        for index in range(depth):
            layers.append(InvertedResidual(width_in, width, stride if index == 0 else 1, expansion))
            width_in = width
    layers.append(conv_norm(width_in, 1280, 1, activation=nn.ReLU6))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, num_classes)]
    return nn.Sequential(*layers, *head)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "vgg16": vgg16,
    "resnet18": lambda num_classes: resnet(basic_block, 1, (2, 2, 2, 2), num_classes),
    "resnet50": lambda num_classes: resnet(bottleneck, 4, (3, 4, 6, 3), num_classes),
    "resnet101": lambda num_classes: resnet(bottleneck, 4, (3, 4, 23, 3), num_classes),
    "resnet152": lambda num_classes: resnet(bottleneck, 4, (3, 8, 36, 3), num_classes),
    "mobilenet_v2": mobilenet_v2,
}
"""name -> (number of classes) -> the network."""
