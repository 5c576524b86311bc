"""Short paths: as short as an exhaustive search finds, never above their starts; a bound that holds."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from training import tour as tours
from training.tour import STRATEGIES, length, prices

SEEDS = st.integers(0, 2**32 - 1)


def matrix(seed: int, n: int) -> np.ndarray:
    """L1 distances between n random points: symmetric, with a zero diagonal."""
    points = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(points, points, p=1).numpy()


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_local_search_finds_the_optimum_of_cliques_that_can_be_solved_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(5):
        distance = matrix(seed, 12)
        exact = length(STRATEGIES["mshp"](distance, distance, _rng()), distance)
        with monkeypatch.context() as patch:
            patch.setattr(tours, "EXACT", 0)
            searched = STRATEGIES["mshp"](distance, distance, _rng())
        assert length(searched, distance) == pytest.approx(exact, rel=1e-9)


def test_the_search_is_never_above_layer_2opt_or_the_present_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tours, "STARTS", 0)
    monkeypatch.setattr(tours, "KICKS", 0)
    monkeypatch.setattr(tours, "FEWEST", 0)
    # Without a neighbour to try nothing is improved: the best start comes out as it is.
    monkeypatch.setattr(tours, "NEAR", 0)
    best = set()
    for seed in range(20):
        whole, layer = matrix(seed, 24), matrix(seed + seed % 2, 24)
        if seed % 5 == 0:  # the present order is short
            first = whole[0].argsort()
            whole = whole[np.ix_(first, first)] + np.abs(np.subtract.outer(*[np.arange(24)] * 2))
        paths = {name: STRATEGIES[name](whole, layer, _rng()) for name in STRATEGIES}
        along = {name: length(path, whole) for name, path in paths.items()}
        names = ("none", "layer-greedy", "layer-2opt")
        assert along["mshp"] <= min(along[name] for name in names)
        best.add(min(names, key=lambda name: along[name]))
    assert best >= {"none", "layer-2opt"}  # else the others would not have been needed


@example(1866, 9, 0)
@given(SEEDS, st.integers(2, 9), st.sampled_from([0, 3]))
@settings(max_examples=100, deadline=None)
def test_descents_end_where_no_turned_stretch_shortens_the_path(
    seed: int, n: int, longest: int
) -> None:
    rng = np.random.default_rng(seed)
    distance, start, price = matrix(seed, n), rng.permutation(n), rng.normal(size=n)
    tour = tours._Tour(start, distance, price, near=n)
    gained = 0.0
    while more := tour.descend(range(n + 1), longest):  # a second round is rarely needed
        assert more > 0
        gained += more
    path = tour.path()
    reached = length(path, distance)
    assert sorted(path) == list(range(n))
    # Prices and the closing node are part of every tour: what is gained is the path's own.
    assert gained == pytest.approx(length(start, distance) - reached, abs=1e-9)
    for a in range(n):
        for b in range(a + 1, n + 1):
            turned = [*path[:a], *path[a:b][::-1], *path[b:]]
            assert reached <= length(np.array(turned), distance) + 1e-9


@given(SEEDS, st.integers(2, 40))
@settings(max_examples=50, deadline=None)
def test_a_kick_and_what_followed_can_be_taken_back(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    distance, start = matrix(seed, n), rng.permutation(n)
    tour = tours._Tour(start, distance, np.zeros(n), near=5)
    size = max(1, n // 3)
    low = int(rng.integers(0, n + 2 - 2 * size))
    first, second = (int(k) for k in rng.integers(1, size + 1, 2))
    lengths = [length(start, distance)]
    for change in (lambda: tour.kick(low, first, second), lambda: tour.descend(tour.cut, 3)):
        gained = change()
        lengths.append(length(tour.path(), distance))
        assert sorted(tour.path()) == list(range(n))
        assert lengths[-2] - gained == pytest.approx(lengths[-1], abs=1e-9)
    tour.back()
    assert tour.path().tolist() == start.tolist()
    assert [tour.nodes[k] for k in tour.at] == list(range(n + 1))


@pytest.mark.parametrize("longest", [1, 3])
def test_or_opt_moves_a_stretch_that_turning_alone_cannot(longest: int) -> None:
    shorter = 0
    for seed in range(20):
        distance, start = matrix(seed, 30), np.random.default_rng(seed).permutation(30)
        turned = tours._Tour(start, distance, np.zeros(30), near=30)
        turned.descend(range(31), 0)
        once = length(turned.path(), distance)
        turned.descend(range(31), longest)
        shorter += length(turned.path(), distance) < once - 1e-9
    assert shorter > 5


@given(SEEDS, st.integers(2, 7))
@settings(max_examples=50, deadline=None)
def test_no_path_is_below_the_bound_of_prices(seed: int, n: int) -> None:
    distance = matrix(seed, n)
    shortest = min(length(np.array(path), distance) for path in permutations(range(n)))
    _, bound = prices(distance, 1.1 * shortest, rounds=100)
    assert 0.9 * shortest <= bound <= shortest * (1 + 1e-12)


def planted(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances of points on a noisy curve in 50 dimensions, shuffled, and the order along it."""
    rng = np.random.default_rng(0)
    along = rng.permutation(n)[:, None] / n
    points = np.sin(along * rng.normal(size=50) * 6 + rng.uniform(0, 6, 50))
    noisy = torch.from_numpy(points + 0.01 * rng.normal(size=points.shape))
    return torch.cdist(noisy, noisy, p=1).numpy(), along[:, 0].argsort()


@pytest.mark.parametrize("n", [64, 600])
def test_a_planted_path_is_found_again(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tours, "KICKS", 1)
    distance, curve = planted(n)
    found = STRATEGIES["mshp"](distance, distance, _rng())
    assert sorted(found) == list(range(n))
    assert length(found, distance) <= length(curve, distance)
    # Neighbours on the path are near along the curve: it was followed, not only made short.
    place = np.argsort(curve)
    assert np.abs(np.diff(place[found])).max() <= 0.1 * n
    again = STRATEGIES["mshp"](distance, distance, _rng())
    assert again.tolist() == found.tolist()
