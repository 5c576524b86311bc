"""Sizes in integers: a request's canonical point, its factors, its cost, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neumeta.graph import BATCH, Axis, Graph, constant
from neumeta.space import BadArchitecture, Space
from tests.conftest import lenet
from tests.support.modules import DEEP, MODULES, traced

RESNET = Space("resnet", traced("resnet")[1], (0.25, 1.0), (2, 4))
ALL = {
    name: Space(name, traced(name)[1], (0.25, 1.0))
    for name in (*MODULES, *DEEP)
    if traced(name)[1].axes
}


@given(st.sampled_from(list(ALL)), st.lists(st.floats(0.25, 1.0), min_size=9, max_size=9))
@settings(max_examples=100, deadline=None)
def test_factors_of_an_architecture_ask_for_the_same_one(name: str, widths: list[float]) -> None:
    space = ALL[name]
    asked = (widths * 9)[: len(space.groups)]
    architecture = space.architecture(asked)
    factors = space.factors(architecture)
    assert len(factors) == len(space.groups)
    assert space.architecture(factors) == architecture
    assert space.architecture(dict(zip(space.groups, asked, strict=True))) == architecture
    assert all(0.25 <= factor <= 1 for factor in factors)


def of_sizes(*groups: list[int], width: tuple[float, float] = (0.25, 1.0)) -> Space:
    """A space of axes of these sizes, without a network: for what it says of sizes alone."""
    axes = {
        f"{group}.{place}": Axis(size, f"g{group}")
        for group, sizes in enumerate(groups)
        for place, size in enumerate(sizes)
    }
    image = (((BATCH, 1),), constant(3), constant(4), constant(4))
    return Space("sizes", Graph(image, axes, {}, (), (("", "input"),)), width)


@given(st.lists(st.integers(1, 48), min_size=1, max_size=4), st.floats(0.02, 1.0))
@example([2, 24, 40], 0.112)  # of 40 there are 4, and a tenth of 24 would be too few
@settings(max_examples=200, deadline=None)
def test_one_factor_gives_every_size_of_a_group_again(sizes: list[int], width: float) -> None:
    space = of_sizes(sizes, [7], width=(0.02, 1.0))
    architecture = space.architecture([width, 0.5])
    assert space.architecture(space.factors(architecture)) == architecture


@pytest.mark.parametrize("width", [(0.5, 1.5), (0.25, 2.0), (1.0, 1.0)])
def test_scaled_are_all_sizes_beyond_the_source_too(width: tuple[float, float]) -> None:
    space = of_sizes([3, 5], [4], width=width)
    asked = {space.architecture(width[0] + (width[1] - width[0]) * i / 1000) for i in range(1001)}
    assert set(space.scaled()) == asked


def test_what_is_not_said_is_the_source_and_a_width_is_checked_where_none_morphs() -> None:
    space = of_sizes([8], [4])
    assert space.architecture() == space.full
    assert space.architecture({"g1": 0.5}).channels == (8, 2)
    with pytest.raises(BadArchitecture, match="width: 5.0 is not allowed"):
        of_sizes().architecture(5.0)
    assert of_sizes().architecture(0.5).channels == ()


def test_a_list_is_offered_where_there_are_several_groups() -> None:
    with pytest.raises(BadArchitecture) as one:
        of_sizes([8]).architecture(0.1)
    assert one.value.allowed == 'a number from 0.25 to 1 unless "extrapolate" is true'
    with pytest.raises(BadArchitecture, match=r"or a list of 2 of them, one per group \(g0, g1\)"):
        of_sizes([8], [4]).architecture(0.1)


def test_a_group_that_is_not_named_is_whole_and_an_unknown_one_refused() -> None:
    group = RESNET.groups[0]
    assert RESNET.architecture({group: 0.5}) == RESNET.architecture(
        [0.5, *[1.0] * (len(RESNET.groups) - 1)]
    )
    with pytest.raises(BadArchitecture, match="width: nothing is not allowed; names of groups"):
        RESNET.architecture({"nothing": 0.5})


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf"), 10**9, 0.1, [0.5], [0.5] * 9])
def test_widths_outside_are_refused(width: Any) -> None:
    with pytest.raises(BadArchitecture, match="width"):
        RESNET.architecture(width)


@pytest.mark.parametrize("depth", [[], [2, 3], [2, 3, 5], [1, 3, 3], [2, 3, 10], [2, 3, 3, 3]])
def test_depths_outside_are_refused(depth: list[int]) -> None:
    with pytest.raises(BadArchitecture, match="depth"):
        RESNET.architecture(1.0, depth)


def test_what_is_outside_and_asked_for_is_marked() -> None:
    assert RESNET.architecture(1.5, extrapolate=True).extrapolated
    assert RESNET.architecture(1.0, [2, 9, 3], extrapolate=True).extrapolated
    assert not RESNET.architecture(0.5, [2, 4, 3], extrapolate=True).extrapolated
    with pytest.raises(BadArchitecture, match="width"):
        RESNET.architecture(2.1, extrapolate=True)
    with pytest.raises(BadArchitecture, match="depth"):
        RESNET.architecture(1.0, [2, 10, 3], extrapolate=True)


def test_a_space_without_depth_refuses_another() -> None:
    space = Space("resnet", traced("resnet")[1], (0.25, 1.0))
    assert space.architecture(0.5, [2, 3, 3]).depth == (2, 3, 3)
    with pytest.raises(BadArchitecture, match=r"depth.*only \[2, 3, 3\]"):
        space.architecture(0.5, [2, 3, 4])


def test_every_width_between_is_one_channel_apart() -> None:
    space = lenet().space
    assert space.full.channels == (32, 64, 64)
    counts = [space.architecture(0.25 + 0.75 * i / 300).channels[-1] for i in range(301)]
    assert all(0 <= b - a <= 1 for a, b in pairwise(counts))
    assert counts[0] == 16 and counts[-1] == 64


def test_scaled_are_all_that_a_scalar_width_can_ask_for() -> None:
    found = RESNET.scaled()
    asked = {RESNET.architecture(0.25 + 0.75 * i / 5000) for i in range(5001)}
    assert set(found) == asked and len(set(found)) == len(found)
    cost = [RESNET.cost(each)["parameters"] for each in found]
    assert cost == sorted(cost)
    assert {each.depth for each in RESNET.scaled([3, 2, 4])} == {(3, 2, 4)}


def test_distance_is_the_largest_relative_change() -> None:
    assert RESNET.distance(RESNET.full) == (0, 0)
    half = [1.0] * (len(RESNET.groups) - 1) + [0.5]
    assert RESNET.distance(RESNET.architecture(half)) == (0.5, 0)
    assert RESNET.distance(RESNET.architecture(1.0, [4, 3, 3])) == (0, pytest.approx(1))
    assert RESNET.distance(RESNET.architecture(1.0, [3, 2, 3])) == pytest.approx((1 / 3, 1 / 2))
    assert RESNET.distance(RESNET.architecture(1.5, extrapolate=True)) == (0.5, 0)


def test_cost_is_that_of_the_folded_network() -> None:
    architecture = RESNET.architecture(0.5, [2, 4, 3])
    graph, sizes = RESNET.graph_of(architecture), RESNET.sizes(architecture)
    cost = RESNET.cost(architecture)
    assert cost["parameters"] == graph.folded.parameters(sizes) < graph.parameters(sizes)
    assert cost["macs"] == graph.macs(sizes) == graph.folded.macs(sizes)
    # 3x3 convolutions at full, half and quarter sides, and the linear map.
    space = lenet().space
    expected = 9 * 784 * (32 + 32 * 64 // 4) + 9 * 64 * 64 * 49 + 640
    assert space.cost(space.full)["macs"] == expected == 5_645_440
