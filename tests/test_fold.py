"""Folded networks compute the same; batch norm is gone, or a scale and a shift."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neumeta.fold import fold
from neumeta.program import Program
from neumeta.statistics import measure
from tests.support.modules import DEEP, MODULES, drawn, error, halved, images_of, traced
from training.trace import trace

ALL = [*MODULES, *DEEP]


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items() if value.is_floating_point()}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_a_folded_graph_computes_the_same(name: str, half: bool) -> None:
    module, graph = traced(name)
    sizes = halved(graph) if half else graph.full
    tensors = double(drawn(graph, sizes) if half else module.state_dict())
    x = images_of(name).double()
    made = fold(graph, tensors)
    assert {n: tuple(t.shape) for n, t in made.items()} == {
        n: graph.folded.shape(n, sizes) for n in graph.folded.tensors
    }
    wanted = Program(graph, sizes).run(tensors, x)
    # float64: products in another order
    assert error(Program(graph.folded, sizes).run(made, x), wanted) <= 1e-9
    assert not any(node.op == "batch_norm" for node in graph.folded.nodes)


@torch.no_grad()
def test_given_moments_take_the_place_of_those_among_the_tensors() -> None:
    module, graph = traced("resnet")
    tensors, x = double(module.state_dict()), images_of("resnet").double()
    unmeasured = {name: value for name, value in tensors.items() if "running" not in name}
    moments = measure(graph, graph.full, unmeasured, images_of("resnet", 8).double())
    replaced = dict(tensors)
    for node in graph.nodes:
        if node.op == "batch_norm":
            replaced[node.tensors["mean"]], replaced[node.tensors["variance"]] = moments[node.name]
    made = Program(graph.folded, graph.full).run(fold(graph, tensors, moments), x)
    assert error(made, Program(graph, graph.full).run(replaced, x)) <= 1e-9
    assert error(made, module.double()(x)) > 1e-3
    module.float()


def test_what_folds_and_what_becomes_a_scale() -> None:
    ops = {
        name: {node.name: node.op for node in traced(name)[1].folded.nodes}
        for name in ("resnet", "concatenated", "norm first", "shared", "transposed groups")
    }
    assert "bn1" not in ops["resnet"] and "affine" not in ops["resnet"].values()
    # In front of a convolution, and behind a concatenation.
    assert [ops["concatenated"][name] for name in ("norm1", "norm2", "last")] == ["affine"] * 3
    assert list(ops["norm first"].values()).count("affine") == 2
    # A convolution that runs twice cannot take up two batch norms.
    assert list(ops["shared"].values()).count("affine") == 2
    assert "norm" not in ops["transposed groups"]


class Both(nn.Module):
    """A convolution that is read with and without its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y + self.norm(y)).mean((2, 3))


def test_a_value_that_others_read_too_keeps_its_batch_norm_apart() -> None:
    torch.manual_seed(0)
    module = Both().eval()
    graph, _ = trace(module, torch.zeros(1, 3, 4, 4))
    assert [node.op for node in graph.folded.nodes][:2] == ["conv", "affine"]
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        made = Program(graph.folded, graph.full).run(fold(graph, module.state_dict()), x)
        assert error(made, module(x)) <= 1e-5
