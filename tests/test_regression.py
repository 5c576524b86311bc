"""Before any image: what the representation learns of the smoothed weights, and what it leaves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from neumeta.coordinates import coordinates
from neumeta.graph import Graph
from neumeta.manifold import Manifold, roles
from neumeta.program import Program, output
from neumeta.representation import Anchored, build
from neumeta.representation.mlp import _Mlp
from neumeta.sites import sites
from tests.support import runs
from training import data, pipeline, recipe, regression
from training.data import Dataset

OPTIONS = {"layers": 2, "hidden": 16, "num_freq": 4, "blur": 0.5}
CENTRED = recipe.load("tiny").changed(
    network={"train": {"epochs": 0}},
    order={"strategy": "none"},
    representation={
        "kind": "mlp",
        "options": OPTIONS,
        "corrected": None,
        "centred": {},
        "noise": 0.5,
    },
    fit={"regression_steps": 3},
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


@pytest.fixture(scope="module")
def own(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, nn.Module]:
    """The source network of all recipes here, untrained, and its graph."""
    net = runs.source(CENTRED, digits, tmp_path_factory.mktemp("source"))
    return pipeline.traced(CENTRED, digits, net).graph, net


def quiet(*logged: object) -> None:
    pass


def regressed(
    asked: recipe.Recipe, digits: Dataset, own: tuple[Graph, nn.Module]
) -> tuple[Manifold, dict[str, Tensor], dict[str, Tensor], float]:
    manifold, source = pipeline.prepare(asked, digits, *own)
    goal = regression.targets(manifold, source, digits, 0)
    return manifold, source, goal, regression.initialise(manifold, source, goal, asked, quiet)


def test_biases_take_what_the_sums_of_centred_filters_add_on_average(
    digits: Dataset, own: tuple[Graph, nn.Module]
) -> None:
    """So that on average over training images every layer's output is what it was."""
    manifold, source = pipeline.prepare(CENTRED, digits, *own)
    goal = regression.targets(manifold, source, digits, 0)
    space = manifold.space
    behind = [name for name, site in sites(space, space.full).items() if site.positive]
    assert behind == ["conv2.weight", "conv3.weight", "linear.weight"]
    for name in behind:
        assert source[name].flatten(1).mean(1).abs().max() > 1e-3
        # float32 sums of a few hundred weights
        assert goal[name].flatten(1).mean(1).abs().max() < 1e-7
        moved = (goal[name] - source[name]).flatten(1)
        torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), atol=1e-6, rtol=0)
    assert torch.equal(goal["conv1.weight"], source["conv1.weight"])
    assert torch.equal(goal["conv1.bias"], source["conv1.bias"])
    # One layer changed at a time: its mean output per channel stays.
    x = regression.training_images(digits, 256, regression.seed_of(0, "regression/images"))
    graph = space.graph
    readers = {node.tensors.get("weight"): node.name for node in graph.nodes}

    def mean_outputs(tensors: dict[str, Tensor], layer: str) -> Tensor:
        seen: dict[str, Tensor] = {}
        after = [node.name for node in graph.nodes if layer in node.inputs]
        made = Program(graph, graph.full).run(
            tensors, x, watch=lambda step, value: seen.update({step: value})
        )
        value = seen[after[0]] if after else output(made)
        return value.mean([d for d in range(value.ndim) if d != 1])

    with torch.no_grad():
        for name in behind:
            bias = name.replace("weight", "bias")
            changed = {**source, name: goal[name], bias: goal[bias]}
            layer = readers[name]
            torch.testing.assert_close(
                mean_outputs(changed, layer), mean_outputs(source, layer), atol=1e-3, rtol=1e-3
            )


def test_without_centred_filters_the_goal_is_the_source(
    digits: Dataset, own: tuple[Graph, nn.Module]
) -> None:
    asked = CENTRED.changed(representation={"centred": None})
    manifold, source = pipeline.prepare(asked, digits, *own)
    goal = regression.targets(manifold, source, digits, 0)
    assert goal.keys() == source.keys()
    assert all(goal[name] is source[name] for name in goal)


def test_regression_leaves_the_coordinates_of_size_alone(
    digits: Dataset, own: tuple[Graph, nn.Module]
) -> None:
    manifold, *_ = regressed(CENTRED, digits, own)
    fresh = build("mlp", manifold.options, roles(manifold.space))
    moved = 0
    for role, mlp in manifold.representation.inner.networks.items():
        assert isinstance(mlp, _Mlp)
        for columns in mlp.of_size(value=True):
            assert columns.numel() and not columns.any()
        moved += int(not torch.equal(mlp.last.weight, fresh.inner.networks[role].last.weight))
    assert moved == len(manifold.representation.inner.networks)


def test_regression_comes_nearer_with_every_step_and_is_the_same_again(
    digits: Dataset, own: tuple[Graph, nn.Module]
) -> None:
    less = CENTRED.changed(fit={"morph": ["conv3"], "regression_steps": 2})
    more = less.changed(fit={"regression_steps": 40}, representation={"noise": 0.0})
    first, *_, before = regressed(less, digits, own)
    manifold, _, goal, after = regressed(more, digits, own)
    assert after < 0.95 * before < 1
    assert after == regression.error(manifold, goal)
    again, *_ = regressed(less, digits, own)
    for name, value in first.representation.state_dict().items():
        assert torch.equal(value, again.representation.state_dict()[name]), name


def test_only_rows_that_were_drawn_are_made_and_they_are_those_of_the_whole(
    digits: Dataset, own: tuple[Graph, nn.Module]
) -> None:
    manifold, *_ = regressed(CENTRED, digits, own)
    for site in sites(manifold.space, manifold.space.full).values():
        at = coordinates(site, 64)
        rows = torch.tensor([0, site.rows.count - 1])
        with torch.no_grad():
            some = manifold.representation(site, regression._some(at, rows))
            whole = manifold.representation(site, at)
        # float32, the same sums in other blocks
        torch.testing.assert_close(some, whole[:, rows], atol=1e-5, rtol=1e-4)


def test_an_anchored_mlp_keeps_the_source_and_learns_inside(
    digits: Dataset, own: tuple[Graph, nn.Module]
) -> None:
    asked = CENTRED.changed(representation={"anchored": {"reach": 0.25}})
    manifold, source, goal, error = regressed(asked, digits, own)
    model = manifold.representation
    assert isinstance(model, Anchored) and error < 1.0
    for name, site in sites(manifold.space, manifold.space.full).items():
        at = coordinates(site, 64)
        with torch.no_grad():
            kept = model(site, at).view(site.shape)
            inside = model(replace(site, distance=math.inf), at).view(site.shape)
        torch.testing.assert_close(kept, source[name], atol=1e-6, rtol=2**-11)  # float16
        if site.positive:
            assert inside.flatten(1).sum(1).abs().max() < 1e-4 < kept.flatten(1).sum(1).abs().max()
