"""Small networks that nobody's family table would hold, each with the images it reads.

All are as deep as they must be to show one thing; every channel count is its own, so that a mixed-up
axis cannot have the right size by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neumeta.graph import Graph
from training import networks
from training.trace import trace

Images = tuple[int, ...]


class Depthwise(nn.Module):
    """Expansion, depthwise convolution, projection, and a shortcut around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, 2, padding=1)
        self.expand = nn.Conv2d(10, 30, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(30)
        self.depthwise = nn.Conv2d(30, 30, 3, padding=1, groups=30, bias=False)
        self.norm2 = nn.BatchNorm2d(30)
        self.project = nn.Conv2d(30, 10, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        y = F.relu6(self.norm1(self.expand(x)))
        y = F.relu6(self.norm2(self.depthwise(y)))
        x = x + self.norm3(self.project(y))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Concatenated(nn.Module):
    """Dense blocks: batch norm and ReLU before each convolution, over all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(14), nn.Conv2d(14, 5, 3, padding=1)
        self.last = nn.BatchNorm2d(19)
        self.head = nn.Linear(19, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat((x, self.conv1(F.relu(self.norm1(x)))), 1)
        x = torch.cat((x, self.conv2(F.relu(self.norm2(x)))), 1)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.last(x)), 1).flatten(1))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    """A convolution of 6 groups of 2 channels; whole groups morph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=6)
        self.head = nn.Conv2d(18, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.grouped(F.elu(self.stem(x))))).mean((2, 3))  # type: ignore[no-any-return]


class Flattened(nn.Module):
    """A linear map of flattened features: 2 x 3 places for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3, 2, padding=1)
        self.hidden = nn.Linear(9 * 6, 11)
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.leaky_relu(self.conv(x), 0.1), 2)
        return self.head(torch.tanh(self.hidden(x.flatten(1))))  # type: ignore[no-any-return]


class NormFirst(nn.Module):
    """Batch norm in front of a convolution, and on the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.BatchNorm2d(3, affine=False)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.before = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(self.input(x)))
        return self.head(F.relu(self.conv(self.before(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Squeezed(nn.Module):
    """Squeeze-and-excitation: a factor for each channel, broadcast over the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.down, self.up = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        x = x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.hardswish(x).mean((2, 3)))  # type: ignore[no-any-return]


class GroupNormed(nn.Module):
    """Group norm of 5 groups, instance norm, and a PReLU for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 15, 3, padding=1), nn.GroupNorm(5, 15)
        self.conv2, self.norm2 = nn.Conv2d(15, 7, 3), nn.InstanceNorm2d(7, affine=True)
        self.act = nn.PReLU(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(self.act(self.norm2(self.conv2(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Transposed(nn.Module):
    """Down and up again, batch norm behind transposed convolutions, a skip concatenated: a map out."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.norm1 = nn.Conv2d(3, 6, 3, 2, padding=1), nn.BatchNorm2d(6)
        self.down2 = nn.Conv2d(6, 10, 3, 2, padding=1)
        self.up2, self.norm2 = nn.ConvTranspose2d(10, 8, 2, 2, bias=False), nn.BatchNorm2d(8)
        self.up1 = nn.ConvTranspose2d(14, 5, 4, 2, padding=1)
        self.head = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = F.relu(self.norm1(self.down1(x)))
        x = F.relu(self.down2(kept))
        x = F.relu(self.norm2(self.up2(x)))
        return self.head(F.relu(self.up1(torch.cat((kept, x), 1))))  # type: ignore[no-any-return]


class TransposedGroups(nn.Module):
    """Batch norm behind a transposed convolution of 4 groups, in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 12, 3, padding=1)
        self.up = nn.ConvTranspose1d(12, 8, 2, 2, groups=4)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool1d(self.norm(self.up(F.relu(self.stem(x)))), 2)
        return self.head(x.mean(2))  # type: ignore[no-any-return]


class Shared(nn.Module):
    """One convolution run twice, and one batch norm behind each of its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, padding=1)
        self.conv = nn.Conv2d(9, 9, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(9), nn.BatchNorm2d(9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm1(self.conv(x)))
        x = F.relu(self.norm2(self.conv(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """Operations that change what they read, and a dropout that does nothing in use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv1(x)))
        y = self.conv2(x)
        y += x
        y.mul_(0.5).sigmoid_()
        return self.head(self.drop(y.mean((2, 3))))  # type: ignore[no-any-return]


class TwoOutputs(nn.Module):
    """A dict of two heads on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 4, 1)
        self.aux = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.softplus(self.trunk(x))
        return {"out": self.out(x), "aux": F.log_softmax(self.aux(x.mean((2, 3))), 1)}


class Heads(nn.Module):
    """A tuple of several heads, one of them behind layers of its own: a VAE's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.mean = nn.Linear(8, 4)
        self.hidden, self.std = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.trunk(x)).mean((2, 3))
        return self.mean(x), torch.exp(0.5 * self.std(torch.tanh(self.hidden(x))))


class Sliced(nn.Module):
    """Two branches concatenated and cut apart again where they were joined."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 9, 1)
        self.after = nn.Conv2d(9, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((self.left(x), self.right(x)), 1).relu()
        left, right = both[:, :6], both[:, 6:]
        x = left - self.after(right)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Chunked(nn.Module):
    """A gate made by chunking channels: the halves cannot tell where they would be cut, and stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.after = nn.Conv2d(6, 10, 1)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv(x).chunk(2, 1)
        return self.head(F.relu(self.after(value * gate.sigmoid())).mean((2, 3)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """ConvNeXt's block: NHWC, layer norm, linear maps, a learned factor per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 2, 2)
        self.mix = nn.Conv2d(9, 9, 3, padding=1, groups=9)
        self.norm = nn.LayerNorm(9)
        self.up, self.down = nn.Linear(9, 18), nn.Linear(18, 9)
        self.scale = nn.Parameter(torch.full((9, 1, 1), 0.5))
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        x = x + self.scale * y
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Resized(nn.Module):
    """A pyramid: maps of several sizes, padded, resized, pooled and added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 7, 3, 2)
        self.head = nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.mish(self.one(F.pad(x, (1, 1, 2, 0), mode="reflect")))
        small = F.max_pool2d(F.hardtanh(self.two(x)), 3, 2, padding=1, ceil_mode=True)
        large = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.head(x + large + F.avg_pool2d(x, 3, 1, padding=1))  # type: ignore[no-any-return]


class PaddedChannels(nn.Module):
    """A shortcut that adds channels of zeros: it ties channels to their places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.conv(x))
        return self.head((F.pad(x, (0, 0, 0, 0, 2, 2)) + y).mean((2, 3)))  # type: ignore[no-any-return]


MODULES: dict[str, tuple[Callable[[], nn.Module], Images]] = {
    "depthwise": (Depthwise, (3, 8, 10)),
    "concatenated": (Concatenated, (3, 6, 6)),
    "grouped": (Grouped, (3, 6, 5)),
    "flattened": (Flattened, (3, 8, 12)),
    "norm first": (NormFirst, (3, 6, 6)),
    "squeezed": (Squeezed, (3, 6, 6)),
    "group normed": (GroupNormed, (3, 7, 6)),
    "transposed": (Transposed, (3, 8, 12)),
    "transposed groups": (TransposedGroups, (2, 10)),
    "shared": (Shared, (3, 6, 6)),
    "in place": (InPlace, (3, 6, 6)),
    "two outputs": (TwoOutputs, (3, 6, 6)),
    "heads": (Heads, (3, 8, 8)),
    "sliced": (Sliced, (3, 6, 6)),
    "chunked": (Chunked, (3, 6, 6)),
    "layer scale": (LayerScale, (3, 8, 8)),
    "resized": (Resized, (3, 9, 8)),
    "padded channels": (PaddedChannels, (3, 6, 6)),
}


DEEP: dict[str, tuple[Callable[[], nn.Module], Images]] = {
    "resnet": (lambda: networks.resnet_cifar((2, 3, 3), 10, (4, 6, 8)), (3, 8, 8)),
    "plain": (lambda: networks.resnet_mnist((2, 3), 10, (5, 7)), (1, 8, 8)),
}
"""Networks with stages."""


@cache
def traced(name: str) -> tuple[nn.Module, Graph]:
    """A module of MODULES or DEEP, and its graph. Not to be changed."""
    make, images = (MODULES | DEEP)[name]
    module = seeded(make)
    return module, trace(module, torch.zeros(1, *images))[0]


def images_of(name: str, count: int = 3) -> Tensor:
    """Random images that this module reads."""
    return torch.randn(count, *(MODULES | DEEP)[name][1])


def flat(outputs: object) -> list[Tensor]:
    """Every tensor of a module's outputs, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return list(values)  # type: ignore[call-overload, no-any-return]


def error(found: object, wanted: object) -> float:
    """The largest difference of two networks' outputs, relative to the largest of each tensor."""
    pairs = zip(flat(found), flat(wanted), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def halved(graph: Graph) -> dict[str, int]:
    """Every axis at half its size."""
    return {name: max(1, size // 2) for name, size in graph.full.items()}


def drawn(graph: Graph, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these sizes, variances above zero."""
    torch.manual_seed(seed)
    variances = {n.tensors["variance"] for n in graph.nodes if n.op == "batch_norm"}
    return {
        name: 0.5 + torch.rand(graph.shape(name, sizes))
        if name in variances
        else 0.5 * torch.randn(graph.shape(name, sizes))
        for name in graph.tensors
    }


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in eval mode, its parameters and batch statistics random: none may be left out."""
    torch.manual_seed(seed)
    module = make().eval()
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                assert each.running_mean is not None and each.running_var is not None
                each.running_mean.normal_(0, 0.3)
                each.running_var.uniform_(0.5, 2.0)
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            if "norm" in name and parameter.ndim == 1:
                parameter.mul_(torch.where(torch.rand(parameter.shape) < 0.2, -1.0, 1.0))
    return module
