"""The plain torch.nn.Module a device runs, and loading one from a pulled file.

Knows nothing of manifolds, INRs or the service: a pulled safetensors file and this module are all
a device needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from neumeta.family import FAMILIES, Layer

Segment = tuple[str, Callable[[Tensor], Tensor]]


class Network(nn.Module):
    """A network of one family at given axis sizes.

    `norm=False` is what devices run: every convolution carries a bias, batch norm folded in.
    `norm=True` keeps batch norm after each convolution that has one in the table; that form exists
    for training only. The input is (N, C, H, W) float, raw pixels in [0, 1] when `normalise` was
    set, else already normalised; the output is (N, classes) logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, family: str, depth: tuple[int, ...], sizes: Mapping[str, int], *, norm: bool = False
    ) -> None:
        super().__init__()
        self.family, self.depth, self.norm = family, depth, norm
        channels = sizes["image"]
        self.register_buffer("mean", torch.zeros(channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(channels, 1, 1), persistent=False)
        for layer in FAMILIES[family].layers(depth):
            self._add(layer, sizes)

    def _add(self, layer: Layer, sizes: Mapping[str, int]) -> None:
        outputs, inputs = sizes[layer.output_axis], sizes[layer.input_axis]
        normed = self.norm and layer.norm is not None
        made: nn.Module
        if layer.kernel:
            made = nn.Conv2d(
                inputs, outputs, layer.kernel, padding=layer.kernel // 2, bias=not normed
            )
        else:
            made = nn.Linear(inputs, outputs)
        _put(self, layer.name, made)
        if normed and layer.norm is not None:
            _put(self, layer.norm, nn.BatchNorm2d(outputs))

    def normalise(self, mean: list[float], std: list[float]) -> None:
        """Take raw pixels in [0, 1] from now on: subtract `mean`, divide by `std`, per channel."""
        self.mean = torch.tensor(mean, device=self.mean.device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=self.std.device).view(-1, 1, 1)

    def segments(self) -> list[Segment]:
        """The forward pass in order: (name prefix, function); their composition is the network."""
        return _SEGMENTS[self.family](self)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W), or of what segment `first` takes."""
        if first == 0:
            x = (x - self.mean) / self.std
        for _, segment in self.segments()[first:]:
            x = segment(x)
        return x

    def unit(self, name: str, norm: str | None, x: Tensor, stride: int = 1) -> Tensor:
        """Convolution `name` followed by its batch norm, where there is one."""
        conv = self.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        x = F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=conv.padding)
        return self.get_submodule(norm)(x) if self.norm and norm else x


def _put(module: nn.Module, dotted: str, child: nn.Module) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.add_module(last, child)


def _block(net: Network, at: str, norms: tuple[str | None, ...], stride: int, x: Tensor) -> Tensor:
    """A basic residual block; a block that changes shape has a 1x1 shortcut."""
    y = F.relu(net.unit(f"{at}.conv1", norms[0], x, stride))
    y = net.unit(f"{at}.conv2", norms[1], y)
    if "shortcut" in net.get_submodule(at)._modules:
        x = net.unit(f"{at}.shortcut", norms[2], x, stride)
    return F.relu(y + x)


def _classifier(net: Network, x: Tensor) -> Tensor:
    linear = net.get_submodule("linear")
    assert isinstance(linear, nn.Linear)
    return linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stem(net: Network, name: str, norm: str | None, stride: int, pool: bool, x: Tensor) -> Tensor:
    x = F.relu(net.unit(name, norm, x, stride))
    return F.max_pool2d(x, 2) if pool else x


def _resnet_cifar(net: Network) -> list[Segment]:
    found: list[Segment] = [("conv1", partial(_stem, net, "conv1", "bn1", 1, False))]
    for stage, blocks in enumerate(net.depth):
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            norms = tuple(f"{at}.bn{i}" for i in (1, 2, 3))
            stride = 2 if stage > 0 and block == 0 else 1
            found.append((at, partial(_block, net, at, norms, stride)))
    return [*found, ("linear", partial(_classifier, net))]


def _resnet_mnist(net: Network) -> list[Segment]:
    found: list[Segment] = []
    for stage, blocks in enumerate(net.depth):
        entry = "down" if stage else "stem"
        found.append((entry, partial(_stem, net, entry, None, 2, False)))
        for block in range(blocks):
            at = f"stage{stage + 1}.{block}"
            found.append((at, partial(_block, net, at, (None, None, None), 1)))
    return [*found, ("linear", partial(_classifier, net))]


def _lenet_mnist(net: Network) -> list[Segment]:
    convs: list[Segment] = [
        (f"conv{i}", partial(_stem, net, f"conv{i}", None, 1, i < 3)) for i in (1, 2, 3)
    ]
    return [*convs, ("linear", partial(_classifier, net))]


_SEGMENTS = {
    "resnet-cifar": _resnet_cifar,
    "resnet-mnist": _resnet_mnist,
    "lenet-mnist": _lenet_mnist,
}


def load(path: str | Path) -> Network:
    """A ready network in eval mode from a file pulled from the service.

    The file's metadata names the family and the architecture, and carries the input normalisation,
    so the module takes raw pixels in [0, 1].

    Raises ValueError if the file is no NeuMeta network, RuntimeError if a tensor is missing or has
    the wrong shape.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "neumeta" not in metadata:
            raise ValueError(f"{path}: no NeuMeta network (its metadata has no 'neumeta' key)")
        about = json.loads(metadata["neumeta"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        net = Network(about["family"], tuple(about["depth"]), about["sizes"])
    net.load_state_dict(weights, assign=True)
    net.mean = torch.tensor(about["normalisation"]["mean"]).view(-1, 1, 1)
    net.std = torch.tensor(about["normalisation"]["std"]).view(-1, 1, 1)
    dtype = next(iter(weights.values())).dtype
    net.mean, net.std = net.mean.to(dtype), net.std.to(dtype)
    return net.eval().requires_grad_(False)
