"""The plain torch.nn.Module a device runs, and loading one from a pulled file.

Knows nothing of manifolds, INRs or the service: a pulled safetensors file and this module are all
a device needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from neumeta.family import FAMILIES, Family, Layer, shape

Segment = tuple[str, Callable[[Tensor], Tensor]]

MAX_SIZE = 1 << 20
"""Channels or classes that an axis may have: beyond it a file's metadata is not believed."""


class Network(nn.Module):
    """A network of one family at given axis sizes.

    `norm=False` is what devices run: every convolution carries a bias, batch norm folded in.
    `norm=True` keeps batch norm after each convolution that has one in the table; that form exists
    for training only. The input is (N, C, H, W): floats, raw pixels in [0, 1] when `normalise` was
    set, else already normalised; or uint8 pixels, which become [0, 1] first. The output is (N,
    classes) logits.

    The normalisation is part of `state_dict()`. Tensors without one (a pulled file's) load too, and
    leave the module's own as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, family: str, depth: tuple[int, ...], sizes: Mapping[str, int], *, norm: bool = False
    ) -> None:
        super().__init__()
        self.family, self.depth, self.norm = family, depth, norm
        self.channels = sizes["image"]
        self.register_buffer("mean", torch.zeros(self.channels, 1, 1))
        self.register_buffer("std", torch.ones(self.channels, 1, 1))
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("mean", "std"):
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take raw pixels in [0, 1] from now on: subtract `mean`, divide by `std`, per channel.

        Raises ValueError unless there is one finite number per channel, those of `std` above 0.
        """
        for name, given in (("mean", mean), ("std", std)):
            if len(given) != self.channels or not all(map(math.isfinite, given)):
                raise ValueError(f"{name}: {list(given)} is not {self.channels} finite numbers")
        if min(std) <= 0:
            raise ValueError(f"std: {list(std)} is not above 0")
        self.mean = self.mean.new_tensor(mean).view(-1, 1, 1)
        self.std = self.std.new_tensor(std).view(-1, 1, 1)

    def pixels(self, x: Tensor) -> Tensor:
        """Images in the module's own precision; uint8 ones scaled to [0, 1].

        Raises ValueError for what is no batch of images with the module's number of channels.
        """
        # A trace holds what one example did: these questions would only be asked while it is made.
        if not torch._C._is_tracing():
            wanted = f"images (N, {self.channels}, height, width), floats in [0, 1] or uint8"
            if not isinstance(x, Tensor):
                raise ValueError(f"expected a tensor of {wanted}, got {type(x).__name__}")
            if not x.is_floating_point() and x.dtype != torch.uint8:
                raise ValueError(f"expected {wanted}, got {x.dtype}")
            if x.dim() == 3 and x.shape[0] == self.channels:
                raise ValueError(
                    f"expected {wanted}, got one image {tuple(x.shape)}: the batch dimension is"
                    " missing, images[None] adds it"
                )
            if x.dim() != 4 or x.shape[1] != self.channels:
                raise ValueError(f"expected {wanted}, got shape {tuple(x.shape)}")
        scaled = x.dtype == torch.uint8
        x = x.to(next(self.parameters()).dtype)
        return x / 255 if scaled else x

    def segments(self) -> list[Segment]:
        """The forward pass in order: (name prefix, function); their composition is the network."""
        return _SEGMENTS[self.family](self)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W), or of what segment `first` takes.

        Raises ValueError for what is no batch of images (see `pixels`).
        """
        if first == 0:
            x = (self.pixels(x) - self.mean) / self.std
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
    so the module takes raw pixels in [0, 1], or uint8 ones.

    Raises ValueError, naming the file and what is wrong, if it is no whole network; FileNotFoundError
    if it is not there.
    """
    about, weights = _read(Path(path))
    try:
        family, depth, sizes = _architecture(about)
        _fitting(weights, family, depth, sizes)
        with torch.device("meta"):
            net = Network(family.name, depth, sizes)
        kind = next(iter(weights.values())).dtype
        net.mean = torch.zeros(net.channels, 1, 1, dtype=kind)
        net.std = torch.ones(net.channels, 1, 1, dtype=kind)
        normalisation = _dict(about, "normalisation")
        net.normalise(_numbers(normalisation, "mean"), _numbers(normalisation, "std"))
    except ValueError as error:
        raise ValueError(f"{path}: not a network this version can run: {error}") from None
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `neumeta` metadata and the tensors of a file."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a network's file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no regular file")
    with path.open("rb") as raw:
        head = raw.read(9)
    # safetensors has its header's length first, which may look like either, and then the header.
    if head[8:] != b"{" and head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path}: a torch or pickle file; a network is a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            odd = [name for name in names if kinds[name] not in ("F16", "BF16", "F32", "F64")]
            if odd or len(set(kinds.values())) > 1:
                raise ValueError(
                    f"{path}: not a network: its tensors are not all of one float type"
                )
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: empty, cut short or damaged: {error}") from None
    if "neumeta" not in metadata:
        raise ValueError(f"{path}: no NeuMeta network (its metadata has no 'neumeta' key)")
    try:
        about = json.loads(metadata["neumeta"])
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: its metadata 'neumeta' is not JSON") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path}: its metadata 'neumeta' is not a JSON object")
    if "representation" in about:
        raise ValueError(f"{path}: a manifold, not a network: neumeta-serve makes networks of it")
    return about, weights


def _architecture(about: dict[str, Any]) -> tuple[Family, tuple[int, ...], dict[str, int]]:
    """The family, depth and axis sizes that metadata names, each checked."""
    name, depth, sizes = about.get("family"), about.get("depth"), _dict(about, "sizes")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"family: {name!r} is unknown; this version has {sorted(FAMILIES)}")
    family = FAMILIES[name]
    stages = len(next(iter(family.architectures.values())))
    if (
        not isinstance(depth, list)
        or len(depth) != stages
        or not all(_whole(blocks, family.max_blocks) for blocks in depth)
    ):
        allowed = f"{stages} whole numbers from 1 to {family.max_blocks}"
        raise ValueError(f"depth: {str(depth)[:80]} is not {allowed}")
    for axis in family.full_sizes(tuple(depth), 1):
        if not _whole(sizes.get(axis), MAX_SIZE):
            given = str(sizes.get(axis))[:80]
            raise ValueError(f"sizes: {axis} is {given}, not a whole number from 1 to {MAX_SIZE}")
    return family, tuple(depth), sizes


def _fitting(
    weights: Mapping[str, Tensor],
    family: Family,
    depth: tuple[int, ...],
    sizes: Mapping[str, int],
) -> None:
    """Refuse tensors that are not those of this architecture, before any of it is made."""
    planned = {tensor.name: shape(tensor, sizes) for tensor in family.tensors(depth)}
    for name, dimensions in planned.items():
        if name not in weights:
            raise ValueError(f"tensor {name} is missing")
        if tuple(weights[name].shape) != dimensions:
            given = tuple(weights[name].shape)
            raise ValueError(f"tensor {name} is {given} where {dimensions} is expected")
    if extra := sorted(set(weights) - set(planned)):
        raise ValueError(f"tensor {extra[0]} is no part of it")


def _dict(about: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(about.get(key), dict):
        raise ValueError(f"{key}: {str(about.get(key))[:80]} is not an object")
    return about[key]  # type: ignore[no-any-return]


def _numbers(about: dict[str, Any], key: str) -> list[float]:
    given = about.get(key)
    if not isinstance(given, list) or not all(type(each) in (int, float) for each in given):
        raise ValueError(f"{key}: {str(given)[:80]} is not a list of numbers")
    return given


def _whole(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most
