"""Before any image: what the representation learns of the smoothed weights, and what it leaves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from neumeta.coordinates import coordinates
from neumeta.graph import Graph
from neumeta.manifold import Contract, Manifold, roles
from neumeta.program import Program, output
from neumeta.representation import Anchored, build
from neumeta.representation.mlp import _Mlp
from neumeta.sites import made, sites
from neumeta.space import Space
from tests.support import runs
from tests.support.modules import images_of, traced
from training import basis, data, pipeline, recipe, recipe_file, regression
from training.copied import Copied, free_scales
from training.data import Dataset
from training.statistics import raw

OPTIONS = {"layers": 2, "hidden": 16, "num_freq": 4, "blur": 0.5}
CENTRED = recipe_file.load("tiny").changed(
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
    return basis.traced(CENTRED, digits, net).graph, net


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


COPY = CENTRED.changed(
    representation={
        "centred": None,
        "noise": 0.0,
        "options": {"layers": 2, "hidden": 32, "num_freq": 6, "nested": True},
    },
    fit={
        "copied": "m",
        "regression_steps": 60,
        "regression_lr": 0.03,
        "sandwich": False,
        "widths": (1.0, 0.5),
    },
    network={"train": None},
)


def shifted(digits: Dataset, own: tuple[Graph, nn.Module]) -> tuple[Manifold, dict[str, Tensor]]:
    """A grid whose weights are larger in smaller networks, and the source that it is of."""
    asked = CENTRED.changed(representation={"kind": "grid", "options": {}, "centred": None,
                                            "noise": 0.0, "expanded": {}})  # fmt: skip
    manifold, source = pipeline.prepare(asked, digits, *own)
    regression.initialise(manifold, source, source, asked, quiet)
    grids = zip(
        manifold.representation.inner.parameters(),
        manifold.representation.terms.parameters(),
        strict=True,
    )
    for grid, term in grids:
        term.data.fill_(6 * float(grid.detach().square().mean().sqrt()))
    return manifold, source


def error_at(width: float, manifold: Manifold, copied: Manifold) -> float:
    found, wanted = (raw(each, each.space.architecture(width)) for each in (manifold, copied))
    return float(regression.relative(found, wanted))


def test_what_is_copied_is_learned_at_the_sizes_that_are_drawn(
    digits: Dataset, own: tuple[Graph, nn.Module]
) -> None:
    copied, source = shifted(digits, own)
    left = {}
    for name, model in {"copied": copied, "the source alone": None}.items():
        manifold, _ = pipeline.prepare(COPY, digits, *own)
        example = model and Copied(model, manifold.space, source)
        regression.initialise(manifold, source, source, COPY, quiet, example)
        left[name] = error_at(0.5, manifold, copied)
    # At half width the manifold's weights are not the source's: only who saw them comes near.
    assert left["copied"] < 0.4 < 0.7 < left["the source alone"]


def random_grid(name: str, blocks: tuple[int, int] | None = None) -> Manifold:
    """A manifold of a traced module with random weights that change with the size."""
    torch.manual_seed(0)
    space = Space(name, traced(name)[1], (0.25, 1.0), blocks)
    options = {"expanded": {}}
    model = build("grid", options, roles(space)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    contract = Contract((0.0,), (1.0,))
    return Manifold(space, model, "grid", options, 0.0, 1, 64, contract)


def test_a_weight_in_front_of_a_batch_norm_is_copied_at_the_sources_scale() -> None:
    """Which changes nothing about the network, as its own statistics follow."""
    manifold = random_grid("depthwise")
    space = manifold.space
    free = free_scales(space.graph)
    assert len(free) == sum(node.op == "batch_norm" for node in space.graph.nodes) == 3
    goal = {n: torch.randn(space.graph.shape(n, space.graph.full)) for n in made(space.graph)}
    size = space.architecture(0.5)
    plain, found = raw(manifold, size), Copied(manifold, space, goal).at(size)
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        if name in free:
            assert found[name].square().mean().item() == pytest.approx(
                goal[name].square().mean().item(), rel=1e-5
            )
            assert not torch.allclose(found[name], value)
        else:
            assert torch.equal(found[name], value)
    x = images_of("depthwise")
    program = Program(space.graph_of(size), space.sizes(size))
    # What a norm adds to a variance, 1e-5, is nothing to these.
    torch.testing.assert_close(program.run(found, x), program.run(plain, x), rtol=1e-3, atol=1e-3)


def test_a_scale_that_something_else_reads_is_not_free() -> None:
    assert free_scales(traced("shared")[1]) == free_scales(traced("two outputs")[1]) == set()
    assert free_scales(traced("plain")[1]) == set()  # which has no batch norm


def test_at_the_sources_size_a_copy_is_the_source() -> None:
    """Blocks of a stage, which share a role, may be of different scales."""
    manifold = random_grid("resnet", (1, 5))
    space = manifold.space
    goal = raw(manifold, space.full)
    for name in free_scales(space.graph):
        goal[name] = goal[name] * (1 + len(name) % 3 + int("1." in name))
    found = Copied(manifold, space, goal).at(space.full)
    for name, value in goal.items():
        torch.testing.assert_close(found[name], value)


def test_depths_are_copied_with_every_blocks_step() -> None:
    """More blocks than the source's are smaller steps: the representation, whose output is times the
    step, makes weights of the size that it makes at the source's depth."""
    manifold = random_grid("resnet", (1, 5))
    space = manifold.space
    goal = {n: torch.randn(space.graph.shape(n, space.graph.full)) for n in made(space.graph)}
    deep = space.architecture(1.0, [4, 5, 5])
    found = Copied(manifold, space, goal).at(deep)
    steps = sites(space, deep)
    smaller = [name for name in free_scales(space.graph_of(deep)) if steps[name].gain < 1]
    assert len(smaller) > 8
    for name in smaller:
        assert (found[name] / steps[name].gain).square().mean().item() == pytest.approx(1, rel=0.3)


def test_what_does_not_morph_is_not_copied() -> None:
    manifold = random_grid("concatenated")
    graph = manifold.space.graph.morphing(("conv1",), depth=False)
    space = Space("some", graph, (0.5, 1.0))
    goal = {n: torch.randn(graph.shape(n, graph.full)) for n in made(graph)}
    found = Copied(replace(manifold, space=Space("x", graph, (0.25, 1.0))), space, goal)
    size = space.architecture(0.5)
    assert found.at(size).keys() == sites(space, size).keys() < manifold.space.graph.tensors.keys()
    again = found.at(size)
    assert all(again[name] is value for name, value in found.at(size).items())


def test_a_regression_that_was_killed_goes_on_to_the_same_result(
    digits: Dataset,
    own: tuple[Graph, nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regression, "SAVE_EVERY", 2)
    asked = CENTRED.changed(fit={"regression_steps": 5}, representation={"centred": None})
    state = tmp_path / "regression.pt"
    whole, source = pipeline.prepare(asked, digits, *own)
    regression.initialise(whole, source, source, asked, quiet)

    def killed(name: str, value: float, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(regression, "LOG_EVERY", 3)
    again, _ = pipeline.prepare(asked, digits, *own)
    with pytest.raises(KeyboardInterrupt):
        regression.initialise(again, source, source, asked, killed, state=state)
    assert torch.load(state, weights_only=True)["step"] == 2
    again, _ = pipeline.prepare(asked, digits, *own)
    seen: list[int] = []
    regression.initialise(
        again, source, source, asked, lambda name, value, step: seen.append(step), state=state,
        resume=True,
    )  # fmt: skip
    assert seen == [3]
    for name, value in whole.representation.state_dict().items():
        assert torch.equal(value, again.representation.state_dict()[name]), name


def test_a_regression_whose_time_is_up_keeps_what_it_did(
    digits: Dataset, own: tuple[Graph, nn.Module], tmp_path: Path
) -> None:
    asked = CENTRED.changed(fit={"regression_steps": 3}, representation={"centred": None})
    state = tmp_path / "regression.pt"
    whole, source = pipeline.prepare(asked, digits, *own)
    regression.initialise(whole, source, source, asked, quiet)
    for done in (1, 2, None):
        brief, _ = pipeline.prepare(asked, digits, *own)
        found = regression.initialise(
            brief, source, source, asked, quiet, state=state, resume=True, deadline=0.0
        )
        assert (found is None) == (done is not None)
        if done:
            assert torch.load(state, weights_only=True)["step"] == done
    for name, value in whole.representation.state_dict().items():
        assert torch.equal(value, brief.representation.state_dict()[name]), name
