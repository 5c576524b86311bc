"""The built-in networks, as ordinary torch modules: what a user brings is made the same way.

Every one is traced whole by `torch.export.export(module.eval(), (example,))`. Inputs are float
images (N, C, H, W), already normalised. Knows nothing of manifolds, tracing or data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.grown, self.kind = stride, outputs - inputs, shortcut
        self.changes = stride != 1 or inputs != outputs
        if self.changes and shortcut == "conv":
            self.shortcut: nn.Module = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        elif self.changes and shortcut == "B":
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def _shortcut(self, x: Tensor) -> Tensor:
        if not self.changes:
            return x
        if self.kind == "conv":
            return self.bn3(self.shortcut(x))  # type: ignore[no-any-return]
        if self.kind == "B":
            return self.shortcut(x)  # type: ignore[no-any-return]
        before = self.grown // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.grown - before))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self._shortcut(x))


class ResNetCifar(nn.Module):
    """Stages of basic blocks behind one 3x3 convolution; a stage after the first halves its input."""

    def __init__(
        self,
        depth: Sequence[int],
        classes: int,
        widths: Sequence[int],
        channels: int,
        shortcut: str,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.depth, self.widths = tuple(depth), tuple(widths)
        before, stages = widths[0], []
        for stage, (blocks, width) in enumerate(zip(depth, widths, strict=True)):
            made = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                made.append(BasicBlock(before, width, stride, shortcut))
                before = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
            stages.append(f"layer{stage + 1}")
        self.stages = tuple(stages)
        self.linear = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet_cifar(
    depth: Sequence[int] = (3, 3, 3),
    classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    channels: int = 3,
    shortcut: str = "conv",
) -> ResNetCifar:
    """He et al.'s CIFAR ResNet (2016, section 4.2); ResNet-20 by default. Images of any size.

    `shortcut` is what a block that changes shape adds to its branch. "A": every second pixel, with
    channels of zeros before and after: no parameters, as in the published files. Zeros tie every
    channel to its place, so the importer turns it into the 1x1 convolution that computes the same
    (`convolved`), whose channels morph. "B": a 1x1 convolution and batch norm, `shortcut.0` and
    `shortcut.1`. "conv": the same, named `shortcut` and `bn3`.

    Raises ValueError for another `shortcut`, or unless there is one width per stage.
    """
    if shortcut not in ("A", "B", "conv"):
        raise ValueError(f"shortcut: {shortcut!r} is not allowed; 'A', 'B' or 'conv'")
    if len(depth) != len(widths):
        raise ValueError(f"widths: {list(widths)} is not one for each stage of depth {list(depth)}")
    if shortcut == "A" and list(widths) != sorted(widths):
        raise ValueError(f"widths: {list(widths)} shrink, and shortcut 'A' can only add channels")
    return ResNetCifar(depth, classes, widths, channels, shortcut)


@torch.no_grad()
def convolved(net: ResNetCifar) -> ResNetCifar:
    """The same network with 1x1 convolutions, named as in "conv", for the shortcuts of "A": what it
    computes stays, and its channels can morph. In eval mode.

    Each convolution carries channels to their places; its batch norm changes nothing.
    """
    made = resnet_cifar(net.depth, net.linear.out_features, net.widths, net.conv1.in_channels)
    state = net.state_dict()
    for name, block in net.named_modules():
        if isinstance(block, BasicBlock) and block.changes:
            before, inputs = block.grown // 2, block.conv1.in_channels
            moved = torch.zeros(inputs + block.grown, inputs, 1, 1)
            moved[torch.arange(inputs) + before, torch.arange(inputs)] = 1
            state[f"{name}.shortcut.weight"] = moved
            norm = nn.BatchNorm2d(inputs + block.grown)
            state |= {f"{name}.bn3.{key}": value for key, value in norm.state_dict().items()}
            state[f"{name}.bn3.running_var"] -= norm.eps
    made.load_state_dict(state)
    return made.eval()


class PlainBlock(nn.Module):
    """Two 3x3 convolutions with biases and an identity shortcut, no norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> the same shape."""
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


class ResNetMnist(nn.Module):
    """Two stages of plain blocks, each behind a convolution of stride 2."""

    def __init__(
        self, depth: Sequence[int], classes: int, widths: Sequence[int], channels: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, 2, padding=1)
        self.stage1 = nn.Sequential(*(PlainBlock(widths[0]) for _ in range(depth[0])))
        self.down = nn.Conv2d(widths[0], widths[1], 3, 2, padding=1)
        self.stage2 = nn.Sequential(*(PlainBlock(widths[1]) for _ in range(depth[1])))
        self.linear = nn.Linear(widths[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W)."""
        x = self.stage1(F.relu(self.stem(x)))
        x = self.stage2(F.relu(self.down(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet_mnist(
    depth: Sequence[int] = (2, 2),
    classes: int = 10,
    widths: Sequence[int] = (16, 32),
    channels: int = 1,
) -> ResNetMnist:
    """The depth network of the paper's supplement (section 4): no norm, identity shortcuts only.

    Raises ValueError unless depth and widths have two numbers each.
    """
    if len(depth) != 2 or len(widths) != 2:
        raise ValueError(f"depth {list(depth)} and widths {list(widths)}: two numbers each")
    return ResNetMnist(depth, classes, widths, channels)


class LeNet(nn.Module):
    """Three 3x3 convolutions, pooling after the first two, and a linear map."""

    def __init__(self, classes: int, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.conv3 = nn.Conv2d(widths[1], widths[2], 3, padding=1)
        self.linear = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W), at least 4 x 4 pixels."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def lenet(classes: int = 10, widths: Sequence[int] = (32, 64, 64), channels: int = 1) -> LeNet:
    """The width network of the paper's MNIST experiments.

    Raises ValueError unless there are three widths.
    """
    if len(widths) != 3:
        raise ValueError(f"widths: {list(widths)} is not allowed; three numbers")
    return LeNet(classes, widths, channels)


class DoubleConv(nn.Sequential):
    """Twice: a 3x3 convolution, its norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, groups: int | None) -> None:
        def norm() -> nn.Module:
            return nn.GroupNorm(groups, outputs) if groups else nn.BatchNorm2d(outputs)

        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm(),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, each level's maps concatenated on the way up."""

    def __init__(
        self, classes: int, widths: Sequence[int], channels: int, groups: int | None
    ) -> None:
        super().__init__()
        before = channels
        self.down = nn.ModuleList()
        for width in widths:
            self.down.append(DoubleConv(before, width, groups))
            before = width
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for width in reversed(widths[:-1]):
            self.up.append(nn.ConvTranspose2d(before, width, 2, 2))
            self.merge.append(DoubleConv(2 * width, width, groups))
            before = width
        self.head = nn.Conv2d(before, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes, H, W) of images (N, channels, H, W); H and W multiples of
        2 ** (levels - 1)."""
        kept = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((kept.pop(), up(x)), 1))
        return self.head(x)  # type: ignore[no-any-return]


def unet(
    classes: int = 11,
    widths: Sequence[int] = (16, 32, 64, 128),
    channels: int = 3,
    groups: int | None = None,
) -> UNet:
    """A small U-Net (Ronneberger et al. 2015) for segmentation: 0.48 million parameters by default.

    One width per level. Batch norm, or group norm of `groups` groups, which must divide each width.
    CamVid's 128x96 images are (N, 3, 96, 128).

    Raises ValueError for fewer than two levels, or a width that `groups` does not divide.
    """
    if len(widths) < 2:
        raise ValueError(f"widths: {list(widths)} is not allowed; two levels or more")
    if groups and any(width % groups for width in widths):
        raise ValueError(f"groups: {groups} does not divide each width of {list(widths)}")
    return UNet(classes, widths, channels, groups)


class Encoder(nn.Module):
    """Images -> the mean and log variance of each latent variable."""

    def __init__(self, latent: int, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 4, 2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 4, 2, padding=1)
        self.conv3 = nn.Conv2d(width, width, 4, 2, padding=1)
        self.lin1 = nn.Linear(width * 4 * 4, hidden)
        self.lin2 = nn.Linear(hidden, hidden)
        self.mu_logvar_gen = nn.Linear(hidden, 2 * latent)
        self.latent = latent

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, channels, 32, 32) -> mean and log variance, (N, latent) each."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x)).flatten(1)
        x = F.relu(self.lin1(x))
        x = self.mu_logvar_gen(F.relu(self.lin2(x))).view(-1, self.latent, 2)
        return x[..., 0], x[..., 1]


class Decoder(nn.Module):
    """Latent variables -> images."""

    def __init__(self, latent: int, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(latent, hidden)
        self.lin2 = nn.Linear(hidden, hidden)
        self.lin3 = nn.Linear(hidden, width * 4 * 4)
        self.convT1 = nn.ConvTranspose2d(width, width, 4, 2, padding=1)
        self.convT2 = nn.ConvTranspose2d(width, width, 4, 2, padding=1)
        self.convT3 = nn.ConvTranspose2d(width, channels, 4, 2, padding=1)
        self.width = width

    def forward(self, z: Tensor) -> Tensor:
        """(N, latent) -> pixels in [0, 1], (N, channels, 32, 32)."""
        z = F.relu(self.lin1(z))
        z = F.relu(self.lin2(z))
        x = F.relu(self.lin3(z)).view(-1, self.width, 4, 4)
        x = F.relu(self.convT1(x))
        x = F.relu(self.convT2(x))
        return self.convT3(x).sigmoid()  # type: ignore[no-any-return]


class VAE(nn.Module):
    """An encoder and a decoder; the decoder alone generates."""

    def __init__(self, latent: int, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        self.encoder = Encoder(latent, channels, width, hidden)
        self.decoder = Decoder(latent, channels, width, hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, channels, 32, 32) in [0, 1] -> (pixels in [0, 1] of the same shape, mean, log
        variance). What is decoded is drawn while the module trains, and the mean otherwise."""
        mean, logvar = self.encoder(x)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean) if self.training else mean
        return self.decoder(z), mean, logvar


def vae(latent: int = 10, channels: int = 1, width: int = 32, hidden: int = 256) -> VAE:
    """The VAE of Burgess et al. (2018) for 32x32 images, as YannDubs/disentangling-vae publishes it."""
    return VAE(latent, channels, width, hidden)


def _resnet(blocks: int) -> Callable[[int, int], nn.Module]:
    return lambda classes, channels: resnet_cifar((blocks,) * 3, classes, channels=channels)


BUILT_IN: dict[str, Callable[[int, int], nn.Module]] = {
    "lenet": lambda classes, channels: lenet(classes, channels=channels),
    "resnet-mnist": lambda classes, channels: resnet_mnist(classes=classes, channels=channels),
    **{f"resnet{6 * blocks + 2}": _resnet(blocks) for blocks in (3, 5, 7, 9)},
    "unet": lambda classes, channels: unet(classes, channels=channels),
    "vae": lambda classes, channels: vae(channels=channels),
}
"""The networks that a recipe knows by name, from the numbers of classes and of image channels."""
