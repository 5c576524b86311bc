"""ResNet-18 and ResNet-50 in torchvision's shapes and names, with random weights: large networks to
measure on without torchvision. Knows no benchmark.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A residual branch of convolutions with batch norm, ReLU between them, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        plan = [(width, 3, stride), (width, 3, 1)]
        if bottleneck:
            plan = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        before = inputs
        for number, (outputs, kernel, step) in enumerate(plan, 1):
            conv = nn.Conv2d(before, outputs, kernel, step, kernel // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
            before = outputs
        self.count = len(plan)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != before:
            conv = nn.Conv2d(inputs, before, 1, stride, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(before))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = x
        for number in range(1, self.count + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            if number < self.count:
                y = F.relu(y)
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """Four stages behind a 7x7 convolution and pooling (He et al. 2016, table 1)."""

    def __init__(self, depth: tuple[int, ...], bottleneck: bool, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(64)
        before = 64
        for stage, blocks in enumerate(depth):
            made, width = [], 64 << stage
            for block in range(blocks):
                made.append(Block(before, width, 2 if stage and not block else 1, bottleneck))
                before = 4 * width if bottleneck else width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
        self.count = len(depth)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, self.count + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet18(classes: int = 1000) -> ResNet:
    """11.7 million random parameters."""
    return ResNet((2, 2, 2, 2), False, classes)


def resnet50(classes: int = 1000) -> ResNet:
    """25.6 million random parameters."""
    return ResNet((3, 4, 6, 3), True, classes)
