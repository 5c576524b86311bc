"""Channel orders: axis alignment, optimality on small cliques, and an unchanged function."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neumeta.family import FAMILIES
from neumeta.network import Network
from training import permute
from training.cliques import Side, cliques
from training.folded import network_from
from training.permute import STRATEGIES, order, total_variation, tv_in, tv_out

SEEDS = st.integers(0, 2**32 - 1)
CIFAR, DEPTH = FAMILIES["resnet-cifar"], (3, 3, 3)


def resnet20(seed: int) -> dict[str, Tensor]:
    """Random folded weights, biases included, scaled so that logits are of order one."""
    net = Network(CIFAR.name, DEPTH, CIFAR.full_sizes(DEPTH, 10))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in net.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        weights[name] = drawn * (2 / max(1, value[0].numel())) ** 0.5 * 0.7
    return weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return resnet20(0)


@pytest.fixture(scope="module")
def orders(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The orders of every strategy, from fewer kicks than a real run's for the tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "KICKS", 3)
        return {name: order(weights, cliques(CIFAR, DEPTH), name, seed=1) for name in STRATEGIES}


def matrix(seed: int, n: int) -> np.ndarray:
    """L1 distances between n random points: symmetric, with a zero diagonal."""
    points = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(points, points, p=1).numpy()


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
    permuted = permute.apply(weights, {"axis": sides}, {"axis": new})
    along = tv_out(permuted["a.weight"]) + tv_out(permuted["a.bias"]) + tv_in(permuted["b.weight"])
    distance = permute.distances(weights, sides)
    assert permute.length(new.numpy(), distance) == pytest.approx(along, rel=1e-6)


@given(SEEDS, st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_mshp_equals_exhaustive_search_on_small_cliques(seed: int, n: int) -> None:
    weights = {"a.weight": torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 3)))}
    sides = {"axis": (Side("a.weight", 0),)}
    found = order(weights, sides, "mshp")["axis"].numpy()
    distance = permute.distances(weights, sides["axis"])
    shortest = min(permute.length(np.array(path), distance) for path in permutations(range(n)))
    assert sorted(found) == list(range(n))
    assert permute.length(found, distance) == pytest.approx(shortest, rel=1e-12)


def test_local_search_finds_the_optimum_of_cliques_that_can_be_solved_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(5):
        distance = matrix(seed, 12)
        exact = permute.length(STRATEGIES["mshp"](distance, distance, _rng()), distance)
        with monkeypatch.context() as patch:
            patch.setattr(permute, "EXACT", 0)
            searched = STRATEGIES["mshp"](distance, distance, _rng())
        assert permute.length(searched, distance) == pytest.approx(exact, rel=1e-9)


def test_the_search_is_never_above_layer_2opt_or_the_present_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(permute, "STARTS", 0)
    monkeypatch.setattr(permute, "KICKS", 0)
    for seed in range(20):
        distance = matrix(seed, 24)
        paths = {name: STRATEGIES[name](distance, distance, _rng()) for name in STRATEGIES}
        along = {name: permute.length(path, distance) for name, path in paths.items()}
        assert along["mshp"] <= min(along["layer-2opt"], along["none"]) + 1e-9


@given(SEEDS, st.integers(2, 9), st.sampled_from([0, 3]))
@settings(max_examples=50, deadline=None)
def test_descent_ends_where_no_move_shortens_the_path(seed: int, n: int, longest: int) -> None:
    distance, start = matrix(seed, n), np.random.default_rng(seed).permutation(n)
    path = permute._descend(start[None], distance, longest)[0]
    reached = permute.length(path, distance)
    assert sorted(path) == list(range(n))
    assert reached <= permute.length(start, distance) + 1e-9
    for a in range(n):
        for b in range(a + 1, n + 1):
            turned = [*path[:a], *path[a:b][::-1], *path[b:]]
            assert reached <= permute.length(np.array(turned), distance) + 1e-9
            rest = [*path[:a], *path[b:]]
            if b - a > longest:
                continue
            for k in range(len(rest) + 1):
                for stretch in (path[a:b], path[a:b][::-1]):
                    moved = np.array([*rest[:k], *stretch, *rest[k:]])
                    assert reached <= permute.length(moved, distance) + 1e-9


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_network_computes_the_same(
    strategy: str, weights: dict[str, Tensor], orders: dict[str, dict[str, Tensor]]
) -> None:
    groups = cliques(CIFAR, DEPTH)
    assert set(orders[strategy]) == set(groups)
    permuted = permute.apply(weights, groups, orders[strategy])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = network_from(weights, CIFAR.name, DEPTH)(images)
        after = network_from(permuted, CIFAR.name, DEPTH)(images)
    assert before.std() > 0.1  # else agreement would say nothing
    assert (after - before).abs().max() < 1e-4
    # Every layer really has a new order, unless nothing was asked for.
    same = [torch.equal(permuted[name], weights[name]) for name in weights if "conv" in name]
    assert all(same) if strategy == "none" else not any(same)


def test_total_variation_falls_from_strategy_to_strategy(
    weights: dict[str, Tensor], orders: dict[str, dict[str, Tensor]]
) -> None:
    groups = cliques(CIFAR, DEPTH)
    reached = {
        name: total_variation(permute.apply(weights, groups, found))
        for name, found in orders.items()
    }
    assert reached["none"] == total_variation(weights)
    assert reached["mshp"] < reached["layer-2opt"]
    assert reached["mshp"] < reached["none"]
    for axis, sides in groups.items():
        distance = permute.distances(weights, sides)
        along = {name: permute.length(orders[name][axis].numpy(), distance) for name in orders}
        assert along["mshp"] <= min(along.values()) + 1e-9


def test_layer_2opt_is_no_longer_than_greedy_along_its_own_layer(
    weights: dict[str, Tensor], orders: dict[str, dict[str, Tensor]]
) -> None:
    shorter = 0
    for axis, sides in cliques(CIFAR, DEPTH).items():
        distance = permute.distances(weights, sides[:1])
        assert sides[0].dimension == 0
        greedy, improved = (
            permute.length(orders[name][axis].numpy(), distance)
            for name in ("layer-greedy", "layer-2opt")
        )
        assert improved <= greedy + 1e-9
        shorter += improved < greedy - 1e-9
    assert shorter > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_seeds_give_equal_orders_whichever_axes_are_asked_for(
    strategy: str, monkeypatch: pytest.MonkeyPatch, weights: dict[str, Tensor]
) -> None:
    monkeypatch.setattr(permute, "KICKS", 1)
    groups = cliques(CIFAR, DEPTH)
    pair = order(weights, groups, strategy, 5, axes=["layer1.0.inner", "layer2.1.inner"])
    alone = order(weights, groups, strategy, 5, axes=["layer2.1.inner"])
    assert set(pair) == {"layer1.0.inner", "layer2.1.inner"}
    assert set(alone) == {"layer2.1.inner"}
    assert torch.equal(pair["layer2.1.inner"], alone["layer2.1.inner"])


def test_another_seed_gives_another_random_order(weights: dict[str, Tensor]) -> None:
    groups = cliques(CIFAR, DEPTH)
    first, second = (order(weights, groups, "random", seed, ["layer3"]) for seed in (0, 1))
    assert not torch.equal(first["layer3"], second["layer3"])


def test_axes_not_asked_for_keep_their_order(weights: dict[str, Tensor]) -> None:
    groups = cliques(CIFAR, DEPTH)
    found = order(weights, groups, "random", axes=["layer3.2.inner"])
    permuted = permute.apply(weights, groups, found)
    changed = {name for name in weights if not torch.equal(weights[name], permuted[name])}
    assert changed == {"layer3.2.conv1.weight", "layer3.2.conv1.bias", "layer3.2.conv2.weight"}
    assert order(weights, groups, "random", axes=[]) == {}


def test_unknown_strategies_and_axes_are_named(weights: dict[str, Tensor]) -> None:
    groups = cliques(CIFAR, DEPTH)
    with pytest.raises(ValueError, match="'best'.*layer-2opt"):
        order(weights, groups, "best")
    with pytest.raises(ValueError, match=r"'classes'.*layer1\.0\.inner"):
        order(weights, groups, "mshp", axes=["classes"])
