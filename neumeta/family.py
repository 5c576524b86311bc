"""A network family as one table: each layer, the named axes it spans, where it sits in depth.

From the table follow every shape, the parameter and MAC counts, the permutation cliques and the
coordinates. This module knows no weights, no INR and no request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

IMAGE, CLASSES = "image", "classes"
"""The two axes no family may resize: input channels and output classes."""


@dataclass(frozen=True)
class Layer:
    """One convolution (`kernel` >= 1) or linear map (`kernel` == 0) of a network.

    `block` of `blocks` is its place among the repeated blocks of its stage (0 of 1 if it is not
    repeated), and repeated layers share a `role`; `branch_end` marks the last convolution of a
    residual branch; `resolution` is the factor by which the output is smaller than the image, per
    side (0 for a linear map).
    """

    name: str
    output_axis: str
    input_axis: str
    kernel: int
    norm: str | None
    stage: int
    block: int
    blocks: int
    resolution: int
    role: str
    branch_end: bool = False

    @property
    def spatial(self) -> tuple[int, ...]:
        """The kernel's own dimensions: (k, k), or () for a linear map."""
        return (self.kernel, self.kernel) if self.kernel else ()


@dataclass(frozen=True)
class Tensor:
    """One tensor a device receives: its name in the torch module and the axes it spans."""

    name: str
    layer: Layer
    kind: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True, eq=False)  # a handful of constants, each its own cache key
class Family:
    """A family of networks that share one axis table.

    `stages` are the stage widths at full size; `architectures` names points of the family by
    depth; `table(depth)` lists the layers; `stage_of(axis)` says which stage's width sizes an axis.
    `pools`: sides shrink by pooling, which drops an odd row; a strided convolution keeps it.
    """

    name: str
    stages: tuple[int, ...]
    architectures: Mapping[str, tuple[int, ...]]
    max_blocks: int
    input_channels: int
    input_size: int
    table: Callable[[tuple[int, ...]], tuple[Layer, ...]]
    stage_of: Callable[[str], int | None]
    pools: bool = False

    @cache  # noqa: B019 (families live as long as the module)
    def layers(self, depth: tuple[int, ...]) -> tuple[Layer, ...]:
        """The layers of the network of this depth, in the order of the forward pass."""
        return self.table(depth)

    @cache  # noqa: B019 (families live as long as the module)
    def tensors(self, depth: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The folded tensors (weight and bias per layer) of the network of this depth."""
        found = []
        for layer in self.layers(depth):
            axes: tuple[str | int, ...] = (layer.output_axis, layer.input_axis, *layer.spatial)
            found.append(Tensor(f"{layer.name}.weight", layer, "weight", axes))
            found.append(Tensor(f"{layer.name}.bias", layer, "bias", (layer.output_axis,)))
        return tuple(found)

    @cache  # noqa: B019 (families live as long as the module)
    def axes(self, depth: tuple[int, ...]) -> tuple[str, ...]:
        """Every named axis of the network that belongs to a stage, in order of appearance."""
        names = dict.fromkeys(layer.output_axis for layer in self.layers(depth))
        return tuple(name for name in names if self.stage_of(name) is not None)

    def full_sizes(self, depth: tuple[int, ...], classes: int) -> dict[str, int]:
        """The size of every axis at full width."""
        sizes = {IMAGE: self.input_channels, CLASSES: classes}
        for axis in self.axes(depth):
            stage = self.stage_of(axis)
            assert stage is not None
            sizes[axis] = self.stages[stage]
        return sizes


def shape(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor where its axes have these sizes."""
    return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in tensor.axes)


def parameters(tensors: tuple[Tensor, ...], sizes: Mapping[str, int]) -> int:
    """The number of parameters of the folded network."""
    return sum(math.prod(shape(tensor, sizes)) for tensor in tensors)


def macs(
    family: Family, depth: tuple[int, ...], sizes: Mapping[str, int], image: tuple[int, int]
) -> int:
    """Multiply-accumulates for one image of this height and width in pixels."""
    total = 0
    for layer in family.layers(depth):
        positions = 1
        if layer.kernel:
            for side in image:
                # Halving again and again rounds as dividing once does, up or down.
                down, up = side // layer.resolution, -(-side // layer.resolution)
                positions *= down if family.pools else up
        per_position = (
            sizes[layer.output_axis] * sizes[layer.input_axis] * max(layer.kernel, 1) ** 2
        )
        total += positions * per_position
    return total


# --- resnet-cifar: He et al. 2016, section 4.2; three stages of n basic blocks --------------------


def _resnet_cifar(depth: tuple[int, ...]) -> tuple[Layer, ...]:
    layers = [Layer("conv1", "layer1", IMAGE, 3, "bn1", 0, 0, 1, 1, "conv1")]
    before = "layer1"
    for stage, blocks in enumerate(depth):
        axis, resolution = f"layer{stage + 1}", 2**stage
        for block in range(blocks):
            at, inner = f"{axis}.{block}", f"{axis}.{block}.inner"
            # A block that changes shape is there once, whatever the depth; the others are repeated.
            once, single = before != axis, int(stage > 0)
            turn = (0, 1) if once else (block - single, blocks - single)
            place = (stage, *turn, resolution)
            role = at if once else f"{axis}.n"
            layers.append(
                Layer(f"{at}.conv1", inner, before, 3, f"{at}.bn1", *place, f"{role}.conv1")
            )
            layers.append(
                Layer(f"{at}.conv2", axis, inner, 3, f"{at}.bn2", *place, f"{role}.conv2", True)
            )
            if once:
                name = f"{at}.shortcut"
                layers.append(Layer(name, axis, before, 1, f"{at}.bn3", *place, name))
            before = axis
    layers.append(Layer("linear", CLASSES, before, 0, None, len(depth) - 1, 0, 1, 0, "linear"))
    return tuple(layers)


def _resnet_cifar_stage(axis: str) -> int | None:
    return int(axis[5]) - 1 if axis.startswith("layer") else None


# --- resnet-mnist: the supplement's depth network (section 4) --------------------------------------


def _resnet_mnist(depth: tuple[int, ...]) -> tuple[Layer, ...]:
    layers = []
    for stage, blocks in enumerate(depth):
        axis, resolution = f"stage{stage + 1}", 2 ** (stage + 1)
        entry, before = ("stem", IMAGE) if stage == 0 else ("down", "stage1")
        layers.append(Layer(entry, axis, before, 3, None, stage, 0, 1, resolution, entry))
        for block in range(blocks):
            at, inner = f"{axis}.{block}", f"{axis}.{block}.inner"
            place = (stage, block, blocks, resolution)
            layers.append(Layer(f"{at}.conv1", inner, axis, 3, None, *place, f"{axis}.conv1"))
            layers.append(Layer(f"{at}.conv2", axis, inner, 3, None, *place, f"{axis}.conv2", True))
    layers.append(Layer("linear", CLASSES, "stage2", 0, None, 1, 0, 1, 0, "linear"))
    return tuple(layers)


def _resnet_mnist_stage(axis: str) -> int | None:
    return int(axis[5]) - 1 if axis.startswith("stage") else None


# --- lenet-mnist: the three-convolution width network of the paper's MNIST experiments -----------


def _lenet_mnist(depth: tuple[int, ...]) -> tuple[Layer, ...]:
    return (
        Layer("conv1", "conv1", IMAGE, 3, None, 0, 0, 1, 1, "conv1"),
        Layer("conv2", "conv2", "conv1", 3, None, 1, 0, 1, 2, "conv2"),
        Layer("conv3", "conv3", "conv2", 3, None, 2, 0, 1, 4, "conv3"),
        Layer("linear", CLASSES, "conv3", 0, None, 2, 0, 1, 0, "linear"),
    )


def _lenet_mnist_stage(axis: str) -> int | None:
    return int(axis[4]) - 1 if axis.startswith("conv") else None


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "resnet-cifar",
            (16, 32, 64),
            {f"resnet{6 * n + 2}": (n, n, n) for n in (3, 5, 7, 9)},
            9,
            3,
            32,
            _resnet_cifar,
            _resnet_cifar_stage,
        ),
        Family(
            "resnet-mnist",
            (16, 32),
            {"resnet-mnist": (2, 2)},
            9,
            1,
            28,
            _resnet_mnist,
            _resnet_mnist_stage,
        ),
        Family(
            "lenet-mnist",
            (32, 64, 64),
            {"lenet": ()},
            1,
            1,
            28,
            _lenet_mnist,
            _lenet_mnist_stage,
            pools=True,
        ),
    )
}
