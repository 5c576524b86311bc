"""Cliques from the axis table against the dependency graph torch-pruning traces."""

from collections import defaultdict

import pytest
import torch
import torch_pruning
from torch import Tensor, nn

from neumeta.family import FAMILIES, Family
from neumeta.network import Network
from training.cliques import Side, cliques


class Traced(Network):
    """The same network calling its convolutions as modules: torch-pruning hooks modules only."""

    def unit(self, name: str, norm: str | None, x: Tensor, stride: int = 1) -> Tensor:
        conv = self.get_submodule(name)
        conv.stride = (stride, stride)
        return conv(x)


def traced_cliques(net: Network, image: Tensor) -> set[frozenset[Side]]:
    """The tensor sides of every group torch-pruning would prune together, but for the classes."""
    graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=image)
    names = {module: name for name, module in net.named_modules()}
    outputs = (
        torch_pruning.prune_conv_out_channels,
        torch_pruning.prune_linear_out_channels,
    )
    inputs = (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)
    found = set()
    for group in graph.get_all_groups(ignored_layers=[net.linear]):
        sides = set()
        for item in group:
            module, handler = item.dep.layer, item.dep.pruning_fn
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                name = names[module]
                if handler in outputs:
                    sides |= {Side(f"{name}.weight", 0), Side(f"{name}.bias", 0)}
                else:
                    assert handler in inputs
                    sides.add(Side(f"{name}.weight", 1))
        found.add(frozenset(sides))
    return found


CASES = [("resnet-cifar", (3, 3, 3)), ("resnet-mnist", (2, 2)), ("lenet-mnist", ())]


@pytest.mark.parametrize(("name", "depth"), CASES)
def test_cliques_are_those_of_the_traced_dependency_graph(
    name: str, depth: tuple[int, ...]
) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    plain = Network(name, depth, family.full_sizes(depth, 10)).eval()
    net = Traced(name, depth, family.full_sizes(depth, 10)).eval()
    net.load_state_dict(plain.state_dict())
    image = torch.randn(1, family.input_channels, family.input_size, family.input_size)
    assert torch.equal(net(image), plain(image))  # what is traced is what is served
    table = {frozenset(sides) for sides in cliques(family, depth).values()}
    assert table == traced_cliques(net, image)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_each_side_is_in_one_clique_but_for_image_and_classes(family: Family) -> None:
    for depth in family.architectures.values():
        members: dict[Side, list[str]] = defaultdict(list)
        for axis, sides in cliques(family, depth).items():
            for side in sides:
                members[side].append(axis)
        sizes = family.full_sizes(depth, 10)
        fixed = {Side("linear.weight", 0), Side("linear.bias", 0)}
        first = family.layers(depth)[0].name
        fixed.add(Side(f"{first}.weight", 1))
        net = Network(family.name, depth, sizes)
        every = {
            Side(name, dimension)
            for name, value in net.named_parameters()
            for dimension in range(min(value.ndim, 2))
        }
        assert set(members) == every - fixed
        for side, axes in members.items():
            assert len(axes) == 1
            assert net.state_dict()[side.tensor].shape[side.dimension] == sizes[axes[0]]
