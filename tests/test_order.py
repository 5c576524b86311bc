"""Channel orders: axis alignment, optimality on small cliques, and an unchanged function."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neumeta.program import Program, output
from training import networks, tour
from training import order as channels
from training.order import Side, cliques, order, total_variation, tv_in, tv_out
from training.tour import STRATEGIES, length
from training.trace import trace

SEEDS = st.integers(0, 2**32 - 1)
GRAPH = trace(networks.resnet_cifar(), torch.zeros(1, 3, 32, 32))[0].folded
PROGRAM = Program(GRAPH, GRAPH.full)


def resnet20(seed: int) -> dict[str, Tensor]:
    """Random folded weights, biases included, scaled so that logits are of order one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in GRAPH.tensors:
        drawn = torch.randn(GRAPH.shape(name, GRAPH.full), generator=generator)
        weights[name] = drawn * (2 / max(1, drawn[0].numel())) ** 0.5 * 0.7
    return weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return resnet20(0)


@pytest.fixture(scope="module")
def orders(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The orders of every strategy, from fewer kicks than a real run's for the tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tour, "KICKS", 1)
        patch.setattr(tour, "FEWEST", 30)
        return {name: order(weights, cliques(GRAPH), name, seed=1) for name in STRATEGIES}


@pytest.mark.parametrize("shape", [(5,), (4, 3), (4, 3, 1, 1), (3, 5, 3, 3)])
def test_total_variation_equals_a_plain_loop(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = weight.reshape(shape[0], shape[1] if len(shape) > 1 else 1, -1).tolist()
    out = along = 0.0
    for o, row in enumerate(rows):
        for i, kernel in enumerate(row):
            for k, value in enumerate(kernel):
                if o + 1 < len(rows):
                    out += abs(rows[o + 1][i][k] - value)
                if i + 1 < len(row):
                    along += abs(row[i + 1][k] - value)
    assert out > 0
    assert tv_out(weight) == pytest.approx(out, rel=1e-12)
    assert tv_in(weight) == pytest.approx(along, rel=1e-12)
    assert total_variation({"a": weight, "b": weight}) == pytest.approx(2 * (out + along))


@given(SEEDS, st.integers(1, 6), st.integers(1, 6), st.sampled_from([(), (1, 1), (3, 3)]))
@settings(max_examples=50, deadline=None)
def test_total_variation_is_axis_aligned(
    seed: int, outputs: int, inputs: int, spatial: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, *spatial, generator=generator)
    rows = torch.randperm(outputs, generator=generator)
    columns = torch.randperm(inputs, generator=generator)
    assert tv_in(weight[rows]) == pytest.approx(tv_in(weight), rel=1e-12)
    assert tv_out(weight[:, columns]) == pytest.approx(tv_out(weight), rel=1e-12)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_variation_along_a_clique_is_the_length_of_its_path(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a.weight": torch.randn(6, 2, 3, 3, generator=generator),
        "a.bias": torch.randn(6, generator=generator),
        "b.weight": torch.randn(4, 6, generator=generator),
    }
    sides = (Side("a.weight", 0), Side("a.bias", 0), Side("b.weight", 1))
    new = torch.randperm(6, generator=generator)
    permuted = channels.apply(weights, {"axis": sides}, {"axis": new})
    along = tv_out(permuted["a.weight"]) + tv_out(permuted["a.bias"]) + tv_in(permuted["b.weight"])
    distance = channels.distances(weights, sides)
    assert length(new.numpy(), distance) == pytest.approx(along, rel=1e-6)


@given(SEEDS, st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_mshp_equals_exhaustive_search_on_small_cliques(seed: int, n: int) -> None:
    weights = {"a.weight": torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 3)))}
    sides = {"axis": (Side("a.weight", 0),)}
    found = order(weights, sides, "mshp")["axis"].numpy()
    distance = channels.distances(weights, sides["axis"])
    shortest = min(length(np.array(path), distance) for path in permutations(range(n)))
    assert sorted(found) == list(range(n))
    assert length(found, distance) == pytest.approx(shortest, rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 17, 40])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_channels_that_are_all_alike_have_an_order(strategy: str, n: int) -> None:
    weights = {"a": torch.ones(n, 3)}
    found = order(weights, {"axis": (Side("a", 0),)}, strategy)["axis"]
    assert sorted(found.tolist()) == list(range(n))


# --- sides with an offset and a repeat --------------------------------------------------------------

LAYOUTS = st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 1))


def laid_out(
    seed: int, n: int, layouts: list[tuple[int, int, int, int]]
) -> tuple[dict[str, Tensor], tuple[Side, ...]]:
    """One tensor per (offset, repeat, indices after the axis, dimension), and a bias (n,)."""
    generator = torch.Generator().manual_seed(seed)
    weights, sides = {"bias": torch.randn(n, generator=generator)}, [Side("bias", 0)]
    for k, (offset, repeat, after, dimension) in enumerate(layouts):
        shape = [3, 2]
        shape.insert(dimension, offset + n * repeat + after)
        weights[f"{k}"] = torch.randn(shape, generator=generator)
        sides.append(Side(f"{k}", dimension, offset, repeat))
    return weights, tuple(sides)


@given(SEEDS, st.integers(1, 6), st.lists(LAYOUTS, max_size=3))
@settings(max_examples=50, deadline=None)
def test_distances_and_new_orders_equal_plain_loops(
    seed: int, n: int, layouts: list[tuple[int, int, int, int]]
) -> None:
    weights, sides = laid_out(seed, n, layouts)
    expected = np.zeros((n, n))
    new = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = channels.apply(weights, {"axis": sides}, {"axis": new})
    for tensor, dimension, offset, repeat in sides:
        old = weights[tensor].double()
        rows = [
            [old.select(dimension, offset + c * repeat + r) for r in range(repeat)]
            for c in range(n)
        ]
        for a in range(n):
            for b in range(n):
                for r in range(repeat):
                    expected[a, b] += float((rows[a][r] - rows[b][r]).abs().sum())
        moved = weights[tensor].clone()
        for c in range(n):
            for r in range(repeat):
                moved.select(dimension, offset + c * repeat + r).copy_(
                    weights[tensor].select(dimension, offset + int(new[c]) * repeat + r)
                )
        assert torch.equal(permuted[tensor], moved)
    np.testing.assert_allclose(channels.distances(weights, sides), expected, rtol=1e-12)
    back = channels.apply(permuted, {"axis": sides}, {"axis": new.argsort()})
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@given(SEEDS, st.integers(1, 9), st.lists(st.integers(0, 1), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_a_paths_length_is_the_variation_along_sides_that_are_the_axis_alone(
    seed: int, n: int, dimensions: list[int]
) -> None:
    weights, sides = laid_out(seed, n, [(0, 1, 0, dimension) for dimension in dimensions])
    found = order(weights, {"axis": sides}, "mshp")
    permuted = channels.apply(weights, {"axis": sides}, found)
    along = sum((tv_out if side.dimension == 0 else tv_in)(permuted[side.tensor]) for side in sides)
    reached = length(found["axis"].numpy(), channels.distances(weights, sides))
    assert reached == pytest.approx(along, rel=1e-9)


def test_a_side_without_room_for_the_channels_is_named() -> None:
    weights = {"a": torch.ones(4, 2), "b": torch.ones(3, 9)}
    sides = [Side("a", 0), Side("b", 1, offset=2, repeat=2)]
    assert channels.distances(weights, sides).shape == (3, 3)
    with pytest.raises(ValueError, match="b: dimension 1 has room for 3 channels, not 4"):
        channels.distances(weights, sides, 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_network_computes_the_same(
    strategy: str, weights: dict[str, Tensor], orders: dict[str, dict[str, Tensor]]
) -> None:
    groups = cliques(GRAPH)
    assert set(orders[strategy]) == set(groups)
    permuted = channels.apply(weights, groups, orders[strategy])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = output(PROGRAM.run(weights, images))
        after = output(PROGRAM.run(permuted, images))
    assert before.std() > 0.1  # else agreement would say nothing
    assert (after - before).abs().max() < 1e-4
    # Every layer really has a new order, unless nothing was asked for.
    same = [torch.equal(permuted[name], weights[name]) for name in weights if "conv" in name]
    assert all(same) if strategy == "none" else not any(same)


def test_total_variation_falls_from_strategy_to_strategy(
    weights: dict[str, Tensor], orders: dict[str, dict[str, Tensor]]
) -> None:
    groups = cliques(GRAPH)
    reached = {
        name: total_variation(channels.apply(weights, groups, found))
        for name, found in orders.items()
    }
    assert reached["none"] == total_variation(weights)
    assert reached["mshp"] < reached["layer-2opt"]
    assert reached["mshp"] < reached["none"]
    for axis, sides in groups.items():
        distance = channels.distances(weights, sides)
        along = {name: length(orders[name][axis].numpy(), distance) for name in orders}
        assert along["mshp"] <= min(along.values()) + 1e-9


def test_layer_2opt_is_no_longer_than_greedy_along_its_own_layer(
    weights: dict[str, Tensor], orders: dict[str, dict[str, Tensor]]
) -> None:
    shorter = 0
    for axis, sides in cliques(GRAPH).items():
        distance = channels.distances(weights, sides[:1])
        assert sides[0].dimension == 0
        greedy, improved = (
            length(orders[name][axis].numpy(), distance) for name in ("layer-greedy", "layer-2opt")
        )
        assert improved <= greedy + 1e-9
        shorter += improved < greedy - 1e-9
    assert shorter > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_seeds_give_equal_orders_whichever_axes_are_asked_for(
    strategy: str, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Tensor]
) -> None:
    monkeypatch.setattr(tour, "KICKS", 1)
    monkeypatch.setattr(tour, "FEWEST", 30)
    groups = cliques(GRAPH)
    pair = order(weights, groups, strategy, 5, axes=["layer1.0.conv1", "layer2.1.conv1"])
    alone = order(weights, groups, strategy, 5, axes=["layer2.1.conv1"])
    assert set(pair) == {"layer1.0.conv1", "layer2.1.conv1"}
    assert set(alone) == {"layer2.1.conv1"}
    assert torch.equal(pair["layer2.1.conv1"], alone["layer2.1.conv1"])


def test_another_seed_gives_another_random_order(weights: dict[str, Tensor]) -> None:
    groups = cliques(GRAPH)
    first, second = (order(weights, groups, "random", seed, ["layer3.0.conv2"]) for seed in (0, 1))
    assert not torch.equal(first["layer3.0.conv2"], second["layer3.0.conv2"])


def test_axes_not_asked_for_keep_their_order(weights: dict[str, Tensor]) -> None:
    groups = cliques(GRAPH)
    found = order(weights, groups, "random", axes=["layer3.2.conv1"])
    permuted = channels.apply(weights, groups, found)
    changed = {name for name in weights if not torch.equal(weights[name], permuted[name])}
    assert changed == {"layer3.2.conv1.weight", "layer3.2.conv1.bias", "layer3.2.conv2.weight"}
    assert order(weights, groups, "random", axes=[]) == {}


def test_unknown_strategies_and_axes_are_named(weights: dict[str, Tensor]) -> None:
    groups = cliques(GRAPH)
    with pytest.raises(ValueError, match="'best'.*layer-2opt"):
        order(weights, groups, "best")
    with pytest.raises(ValueError, match=r"'classes'.*layer1\.0\.conv1"):
        order(weights, groups, "mshp", axes=["classes"])
