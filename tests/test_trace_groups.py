"""Which block of the module tree an axis is in, and which children can be repeated: small networks of
each kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neumeta.notation import pack, unpack
from neumeta.program import Program
from training import modules, networks, recipe_file
from training.trace import trace


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


class Residual(nn.Module):
    """A block whose second convolution may halve the image."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.a, self.b = conv(inputs, 2 * outputs), conv(2 * outputs, outputs, stride)
        self.same = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return x + y if self.same else y


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return made


class Net(nn.Module):
    """Named children run one after the other, and a head."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.order = list(children)
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def groups(module: nn.Module, *shape: int) -> dict[str, list[str]]:
    graph, _ = trace(module, torch.zeros(1, *shape))
    found: dict[str, list[str]] = {}
    for name, axis in graph.axes.items():
        found.setdefault(axis.group, []).append(name)
    return found


def test_numbered_children_that_end_at_one_resolution_are_a_group() -> None:
    body = nn.Sequential(
        conv(3, 8),
        conv(8, 9),
        nn.ReLU(),
        conv(9, 10, 2),
        Residual(10, 11),
        Residual(11, 12, 2),
        conv(12, 13),
    )
    wanted = {
        "features.0": ["features.0", "features.1"],
        "features.3": ["features.3", "features.4.a", "features.4.b"],
        "features.5": ["features.5.a", "features.5.b", "features.6"],
    }
    net = Net(features=body, head=nn.Conv2d(13, 2, 1))
    assert groups(net, 3, 16, 16) == wanted
    # Whether a head that does not morph stands beside it or not, and whatever is around it.
    inner = {f"inner.{k}": [f"inner.{name}" for name in names] for k, names in wanted.items()}
    assert groups(Wrapped(net), 3, 16, 16) == inner


def test_a_container_at_one_resolution_is_one_group_and_so_is_a_block() -> None:
    net = Net(
        stem=conv(3, 6),
        stage=nn.Sequential(Residual(6, 7, 2), Residual(7, 7)),
        single=Residual(7, 5, 2),
        head=nn.Conv2d(5, 2, 1),
    )
    assert groups(net, 3, 16, 16) == {
        "stem": ["stem"],
        "stage": ["stage.0.a", "stage.0.b", "stage.1.a"],
        "single": ["single.a", "single.b"],
    }


def test_named_children_of_a_container_are_groups_of_their_own() -> None:
    from collections import OrderedDict

    body = nn.Sequential(
        OrderedDict(
            first=conv(3, 8), block=nn.Sequential(conv(8, 9), conv(9, 9)), last=conv(9, 9, 2)
        )
    )
    assert list(groups(Net(body=body, head=conv(9, 2)), 3, 16, 16)) == [
        "body.first",
        "body.block",
        "body.last",
    ]


def test_layers_that_see_no_image_are_one_group() -> None:
    classifier = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 30), nn.Linear(30, 2))
    net = nn.Sequential(conv(3, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
    assert groups(net, 3, 8, 8) == {"0": ["0"], "3": ["3.0", "3.2"]}


@pytest.mark.parametrize(
    ("module", "shape", "wanted"),
    [
        (networks.lenet(), (1, 8, 8), ("conv1", "conv2", "conv3")),
        (networks.resnet_cifar(shortcut="conv"), (3, 32, 32), ("layer1", "layer2", "layer3")),
        (networks.resnet_cifar(shortcut="B"), (3, 32, 32), ("layer1", "layer2", "layer3")),
        (networks.resnet_mnist(), (1, 28, 28), ("stage1", "stage2")),
        (networks.unet(), (3, 32, 32), ("down", "up", "merge")),
        (networks.vae(), (1, 32, 32), ("encoder", "decoder")),
    ],
    ids=["lenet", "resnet-conv", "resnet-B", "resnet-mnist", "unet", "vae"],
)
def test_built_in_networks_keep_their_groups(
    module: nn.Module, shape: tuple[int, ...], wanted: tuple[str, ...]
) -> None:
    assert trace(module, torch.zeros(1, *shape))[0].groups == wanted


class Numbered(nn.Sequential):
    """Blocks called by a name and a number, as torchvision's RegNet does."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Residual(6, 6))


@torch.no_grad()
def check_depth(net: nn.Module, deeper: nn.Module, depth: tuple[int, ...]) -> None:
    """The graph of `net` at this depth computes what the module of that depth does."""
    x = torch.randn(2, 3, 8, 8)
    graph, _ = trace(net, x)
    for each in (graph, unpack(pack(graph))):
        here = each.at(depth)
        made = Program(here, here.full).run(deeper.state_dict(), x)
        assert isinstance(made, Tensor)
        torch.testing.assert_close(made, deeper(x))
        assert set(here.axes) == set(trace(deeper, x)[0].axes)


def test_an_axis_called_as_the_layer_before_a_stage_leaves_its_first_block_alike() -> None:
    # The convolution `down` makes both the value that the first block reads and the axis of all.
    def net(blocks: int) -> nn.Module:
        torch.manual_seed(0)
        body = nn.Sequential(*(Residual(6, 6) for _ in range(blocks)))
        return Net(down=conv(3, 6), body=body, head=conv(6, 2))

    (stage,) = trace(net(3), torch.zeros(1, 3, 8, 8))[0].stages
    assert (stage.name, stage.first, stage.blocks) == ("body", 0, 3)
    for blocks in (1, 2, 5):
        check_depth(net(3), net(blocks), (blocks,))


def test_children_may_be_numbered_behind_a_prefix() -> None:
    def net(blocks: int) -> nn.Module:
        torch.manual_seed(0)
        body = Numbered([f"block1-{n}" for n in range(blocks)])
        return Net(down=conv(3, 6), body=body, head=conv(6, 2))

    (stage,) = trace(net(3), torch.zeros(1, 3, 8, 8))[0].stages
    assert (stage.name, stage.prefix, stage.blocks) == ("body", "block1-", 3)
    for blocks in (1, 2, 12):
        check_depth(net(3), net(blocks), (blocks,))


@pytest.mark.parametrize(
    "names",
    [
        ["block1", "block2", "block3"],
        ["a0", "b1", "a2"],
        ["one", "two", "three"],
    ],
)
def test_children_whose_names_no_number_from_0_on_gives_are_no_stage(names: list[str]) -> None:
    net = Net(down=conv(3, 6), body=Numbered(names), head=conv(6, 2))
    assert trace(net, torch.zeros(1, 3, 8, 8))[0].stages == ()


def test_a_container_has_one_stage() -> None:
    net = Net(down=conv(3, 6), body=Numbered(["a0", "a1", "b0", "b1", "b2"]), head=conv(6, 2))
    stages = trace(net, torch.zeros(1, 3, 8, 8))[0].stages
    assert [(stage.name, stage.prefix) for stage in stages] == [("body", "a")]


def test_the_second_source_is_traced_as_a_users_own_network_is() -> None:
    build = f"{recipe_file.BUILT_IN}/vgg.py:build"
    graph, _ = trace(modules.resolve(build), torch.zeros(1, 3, 32, 32))
    assert graph.groups == ("stage1", "stage2", "stage3") and not graph.stages
    assert len(graph.axes) == 6
    half = modules.resolve(build, {"widths": [16, 32, 64]})
    sizes = {axis: size // 2 for axis, size in graph.full.items()}
    shapes = {name: tuple(value.shape) for name, value in half.named_parameters()}
    assert shapes == {name: graph.shape(name, sizes) for name in shapes}
