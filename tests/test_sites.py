"""Which tensors are made, where they lie, and how large they come out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from neumeta.manifold import roles
from neumeta.program import Program
from neumeta.sites import branch_ends, kept, made, measured, positive, sites
from neumeta.space import Space
from tests.support.modules import DEEP, MODULES, traced
from training.trace import trace

ALL = [*MODULES, *DEEP]


def space_of(name: str) -> Space:
    graph = traced(name)[1]
    return Space(name, graph, (0.25, 1.0), (1, 5) if graph.stages else None)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_made_kept_or_measured_and_only_one_of_them(name: str) -> None:
    graph = traced(name)[1]
    parts = [*made(graph), *kept(graph), *measured(graph)]
    assert sorted(parts) == sorted(graph.tensors)
    assert all(graph.owners[tensor].op == "batch_norm" for tensor in measured(graph))


def test_batch_norms_in_front_of_all_that_morphs_keep_the_sources_statistics() -> None:
    graph = traced("resnet")[1].morphing(["layer2.1.conv1"], depth=False)
    behind = [("layer2.1", 2), ("layer2.2", 2), ("layer3.0", 3), ("layer3.1", 2), ("layer3.2", 2)]
    assert {name.rpartition(".")[0] for name in measured(graph)} == {
        f"{block}.bn{k + 1}" for block, norms in behind for k in range(norms)
    }
    assert {"bn1.running_mean", "layer2.0.bn2.running_var"} <= set(kept(graph))


@pytest.mark.parametrize("name", ALL)
def test_shapes_of_sites_are_those_of_the_graph(name: str) -> None:
    space = space_of(name)
    for width in (0.25, 0.6, 1.0):
        architecture = space.architecture(width)
        graph, sizes = space.graph_of(architecture), space.sizes(architecture)
        for tensor, site in sites(space, architecture).items():
            assert site.shape == graph.shape(tensor, sizes)
            assert math.prod(site.shape) == (
                site.rows.count * site.columns.count * math.prod(site.spatial)
            )
            if width == 1.0:
                assert (site.gain, site.distance, site.growth, site.deeper) == (1, 0, 0, 0)


def test_a_sum_over_fewer_inputs_has_larger_terms_unless_batch_norm_gives_the_scale() -> None:
    space = space_of("flattened")
    found = sites(space, space.architecture(0.5))
    # 9 channels become 4 of 6 places each; 11 become 6 (5.5, to even).
    assert found["hidden.weight"].gain == pytest.approx(9 / 4)
    assert found["hidden.bias"].gain == found["conv.weight"].gain == 1
    assert found["head.weight"].gain == pytest.approx(11 / 6)
    normed = space_of("depthwise")
    found = sites(normed, normed.architecture(0.5))
    assert found["expand.weight"].gain == found["project.weight"].gain == 1
    assert found["head.weight"].gain == 1  # what it reads is a batch norm's scale too
    up = space_of("transposed")
    up = replace(up, graph=up.graph.folded)
    found = sites(up, up.architecture(0.5))
    assert found["up1.weight"].gain == pytest.approx(14 / 7)  # its inputs are its rows


def test_the_ends_of_residual_branches_are_found() -> None:
    resnet = branch_ends(traced("resnet")[1])
    assert {f"layer1.{n}.conv2.weight" for n in (0, 1)} <= resnet
    assert {"layer1.0.bn2.weight", "layer1.0.bn2.bias"} <= resnet
    assert not any("conv1" in name or "shortcut" in name for name in resnet)
    # The first block of a later stage is no alike one.
    assert not any(name.startswith("layer2.0.") for name in resnet)


class Nested(nn.Module):
    """A residual branch with a residual branch in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return x + self.c(torch.relu(y + self.b(y)))


def test_an_addition_inside_a_branch_is_no_end_of_it() -> None:
    net = nn.Sequential(nn.Sequential(Nested(), Nested()), nn.Conv2d(4, 3, 1))
    graph, _ = trace(net, torch.zeros(1, 4, 5, 5))
    assert graph.stages
    assert branch_ends(graph) == {f"0.{n}.c.{kind}" for n in (0, 1) for kind in ("weight", "bias")}


def test_deeper_branches_are_finer_steps() -> None:
    space = space_of("plain")
    for blocks in range(1, 8):
        architecture = space.architecture(1.0, [blocks, 3], extrapolate=True)
        ends = branch_ends(space.graph_of(architecture))
        gains = [
            site.gain
            for name, site in sites(space, architecture).items()
            if name in ends and name.startswith("stage1.") and name.endswith(".weight")
        ]
        assert len(gains) == blocks
        assert sum(gains) == pytest.approx(2)  # the source's two blocks


def test_blocks_share_roles_and_lie_side_by_side() -> None:
    space = space_of("plain")
    source = roles(space)
    assert "stage1.n.conv1.weight" in source and "stem.weight" in source
    for depth in ([1, 2], [3, 5]):
        found = sites(space, space.architecture(1.0, depth))
        assert {site.role for site in found.values()} == set(source)
        cells = [found[f"stage2.{block}.conv1.weight"].cell for block in range(depth[1])]
        assert cells == [(n / depth[1], (n + 1) / depth[1]) for n in range(depth[1])]
        assert (found["stem.weight"].cell, found["stem.weight"].length) == ((0, 1), 1)
        deeper = 2 * (depth[1] - 3) / (depth[1] + 3)
        assert found["stage2.0.conv1.bias"].deeper == pytest.approx(deeper)


def test_alike_blocks_share_their_stage_without_the_child_before_them() -> None:
    space = space_of("resnet")
    for depth, cells in (([2, 3, 3], [(0, 0.5), (0.5, 1)]), ([2, 2, 3], [(0, 1)])):
        found = sites(space, space.architecture(1.0, depth))
        names = [f"layer2.{n}.conv1.weight" for n in range(1, depth[1])]
        assert [found[name].cell for name in names] == cells
        assert [found[name].length for name in names] == [len(cells)] * len(cells)
        assert found["layer2.0.conv1.weight"].cell == (0, 1)


def test_cells_may_be_given() -> None:
    space = space_of("plain")
    found = sites(space, space.full, {"stage1": {0: (0.0, 0.2), 1: (0.2, 1.0)}})
    assert found["stage1.0.conv2.weight"].cell == (0.0, 0.2)
    assert found["stage1.1.conv2.weight"].gain == pytest.approx(2 * 0.8)
    assert found["stage2.0.conv2.weight"].gain == pytest.approx(1)


def test_only_the_scope_that_morphs_is_made() -> None:
    graph = traced("resnet")[1].morphing(["layer3.2.conv1"], depth=False)
    space = Space("resnet", graph, (0.5, 1.0))
    assert {name.rpartition(".")[0] for name in roles(space)} == {
        "layer3.2.conv1", "layer3.2.bn1", "layer3.2.conv2"
    }  # fmt: skip
    assert space.architecture(0.5).channels == (4,)
    assert "layer1.0.conv1.weight" in kept(graph)
    with pytest.raises(ValueError, match="'none' matches none of"):
        traced("resnet")[1].morphing(["none"])


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_what_stands_behind_a_relu_reads_nothing_negative(name: str) -> None:
    """And what reads a ReLU itself stands behind one, unless it is transposed or shared."""
    module, graph = traced(name)
    found = positive(graph)
    owners = {node.name: node for node in graph.nodes}
    shape = (MODULES | DEEP)[name][1]
    read: dict[str, list[bool]] = {}

    def watch(step: str, value: Tensor) -> None:
        node = owners[step]
        if node.op in ("conv", "linear"):
            read.setdefault(node.tensors["weight"], []).append(bool(value.min() >= 0))

    held = {n: v for n, v in module.state_dict().items() if v.is_floating_point()}
    held = {**held, **dict(module.named_parameters(remove_duplicate=False))}
    Program(graph, graph.full).run(held, torch.randn(4, *shape), watch=watch)
    assert all(all(read[weight]) for weight in found)
    makers = {n: [m for m in graph.nodes if m.tensors.get("weight") == n] for n in read}
    for weight, nodes in makers.items():
        if all(n.inputs[0] in owners and owners[n.inputs[0]].op == "relu" for n in nodes):
            assert weight in found
    for site in sites(space_of(name), space_of(name).full).values():
        assert site.positive == (site.name in found)


def test_the_scopes_of_the_paper_stand_behind_relus_and_the_first_layer_does_not() -> None:
    graph = traced("resnet")[1]
    found = positive(graph)
    assert {"layer3.2.conv1.weight", "layer3.2.conv2.weight", "linear.weight"} <= found
    assert "conv1.weight" not in found
    # A norm makes negative values of positive ones, a transposed convolution has other kernels.
    assert not positive(traced("norm first")[1]) & {"conv0.weight"}
    assert not any("up" in name for name in positive(traced("transposed")[1]))
