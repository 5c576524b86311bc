"""Dimensions as parts of axes: joined, flattened, divided and cut."""

from __future__ import annotations

import pytest

from training.trace.axes import Axes, Dim


def test_constants_side_by_side_are_one_part() -> None:
    axes = Axes(2)
    axis = axes.new(5, "a")
    assert axes.now(((None, 2), (None, 3))) == ((None, 5),)
    assert axes.now(((None, 2), *axis, (None, 3), (None, 4))) == ((None, 2), *axis, (None, 7))


def test_flattening_keeps_an_axis_whose_channels_are_repeated_or_side_by_side() -> None:
    axes = Axes(2)
    axis = axes.new(5, "a")
    index = axis[0][0] or 0
    assert axes.merge([axis, ((None, 3),), ((None, 4),)], "") == ((index, 12),)
    assert axes.merge([((None, 3),), axis], "") == axis * 3
    assert axes.fixed(index) == ""
    assert axes.merge([axis, axis], "a product") == ((None, 25),)
    assert axes.fixed(index) == "a product"


@pytest.mark.parametrize("sizes", [[6, 1], [6, 1, 1], [1, 6], [1, 6, 1]])
def test_dividing_by_ones_keeps_the_axis_where_its_size_is(sizes: list[int]) -> None:
    axes = Axes(2)
    axis = axes.new(6, "a")
    one: Dim = ((None, 1),)
    assert axes.split(axis, sizes, "") == [axis if size == 6 else one for size in sizes]


def test_a_part_of_a_concatenation_is_taken_whole_or_not_at_all() -> None:
    axes = Axes(2)
    first, second = axes.new(6, "a"), axes.new(4, "b")
    both: Dim = (*first, (None, 3), *second)
    assert axes.take(both, 0, 6, "") == ((), first)
    assert axes.take(both, 6, 13, "") == (first, ((None, 3), *second))
    assert axes.take(both, 7, 9, "") == ((*first, (None, 1)), ((None, 2),))
    assert axes.fixed(first[0][0] or 0) == axes.fixed(second[0][0] or 0) == ""
    assert axes.take(both, 5, 13, "is cut") == (((None, 5),), ((None, 8),))
    assert axes.fixed(first[0][0] or 0) == axes.fixed(second[0][0] or 0) == "is cut"


@pytest.mark.parametrize(("groups", "morphs"), [(3, False), (4, True)])
def test_fewer_than_four_groups_of_channels_keep_their_number(groups: int, morphs: bool) -> None:
    axes = Axes(2)
    made = axes.blocks(axes.new(8 * groups, "a"), 8)
    assert made is not None
    ((axis, repeat),) = made
    assert axis is not None and (axes.length(axis), repeat) == (groups, 8)
    assert (axes.fixed(axis) == "") == morphs
