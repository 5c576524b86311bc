"""A plain chain of convolutions (after Simonyan and Zisserman 2015), for `cifar10-vgg.toml`.

Nothing in the package knows it: the recipe names it as a user would name their own.
"""

from collections.abc import Sequence

from torch import Tensor, nn


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """Three stages of so many channels with a maximum pool between them, and one linear layer."""

    def __init__(self, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        first, second, third = widths
        self.stage1, self.stage2 = stage(3, first), stage(first, second)
        self.stage3 = stage(second, third)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        x = self.pool(self.stage1(x))
        x = self.pool(self.stage2(x))
        return self.classifier(self.stage3(x).mean((2, 3)))  # type: ignore[no-any-return]


def build(classes: int = 10, widths: Sequence[int] = (32, 64, 128)) -> VGG:
    """The network, untrained."""
    return VGG(classes, widths)
