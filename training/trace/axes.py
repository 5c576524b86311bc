"""Which dimensions are one axis: union-find over the dimensions of every tensor of a network.

An axis may turn out to be made of whole blocks of channels (a flattened feature map, a group of a
grouped convolution): it is then a coarser axis with a `repeat`, so links carry a factor. Knows no
operations and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

Part = tuple[int | None, int]
"""(axis, repeat), or (None, n) for n constant indices."""
Dim = tuple[Part, ...]
BATCH = 0
FEWEST = 4
"""An axis of fewer blocks of channels has no widths worth choosing from: it keeps its size."""
MOST_PARTS = 64


class BatchMixed(Exception):
    """An operation mixes the images of a batch with each other."""


@dataclass
class _Axis:
    size: int
    makers: list[tuple[int, str]] = field(default_factory=list)
    reason: str = ""
    coarse: bool = False


class Axes:
    """The axes found so far. Dimensions are tuples of parts; sizes are those of the source network."""

    def __init__(self, batch: int) -> None:
        self._axes = [_Axis(batch)]
        self._parent: list[tuple[int, int]] = [(0, 1)]

    def new(self, size: int, maker: str) -> Dim:
        """A new axis that the module or tensor `maker` makes; a size of 1 is a constant."""
        if size == 1:
            return ((None, 1),)
        return ((self._add(_Axis(size, [(len(self._axes), maker)])), 1),)

    def _add(self, axis: _Axis) -> int:
        self._axes.append(axis)
        self._parent.append((len(self._axes) - 1, 1))
        return len(self._axes) - 1

    def _root(self, axis: int) -> tuple[int, int]:
        """The axis that this one has become, and how many channels each of its blocks has."""
        factor = 1
        while self._parent[axis][0] != axis:
            axis, more = self._parent[axis]
            factor *= more
        return axis, factor

    def now(self, dim: Dim) -> Dim:
        """A dimension in terms of the axes as they are known by now; constants side by side are one."""
        found: list[Part] = []
        for axis, repeat in dim:
            if axis is not None:
                root, factor = self._root(axis)
                found.append((root, repeat * factor))
            elif found and found[-1][0] is None:
                found[-1] = (None, found[-1][1] + repeat)
            else:
                found.append((None, repeat))
        return tuple(found)

    def count(self, part: Part) -> int:
        """How many indices a part has."""
        axis, repeat = part
        return repeat if axis is None else self._axes[axis].size * repeat

    def size(self, dim: Dim) -> int:
        """How many indices a dimension has."""
        return sum(self.count(part) for part in self.now(dim))

    def fix(self, dim: Dim, reason: str) -> None:
        """Every axis of this dimension keeps its full size, for this reason (the first one counts)."""
        for axis, _ in self.now(dim):
            if axis == BATCH:
                raise BatchMixed
            if axis is not None and not self._axes[axis].reason:
                self._axes[axis].reason = reason

    def coarsen(self, axis: int, blocks_of: int) -> bool:
        """Make this root axis one of blocks of so many of its units; whether its size allows that."""
        if blocks_of == 1:
            return True
        old = self._axes[axis]
        if axis == BATCH or old.size % blocks_of:
            return False
        new = self._add(_Axis(old.size // blocks_of, old.makers, old.reason, True))
        self._parent[axis] = (new, blocks_of)
        return True

    def blocks(self, dim: Dim, size: int) -> Dim | None:
        """The dimension with every part's repeat a multiple of `size`, or None if it cannot be."""
        offset = 0
        for part in self.now(dim):
            if offset % size or self.count(part) % size:
                return None
            offset += self.count(part)
        for place in range(len(self.now(dim))):
            axis, repeat = self.now(dim)[place]
            if axis is not None and not self.coarsen(axis, size // math.gcd(size, repeat)):
                return None
        return self.now(dim)

    def unite(self, one: Dim, other: Dim, reason: str) -> Dim:
        """Make two dimensions of equal size the same; what cannot be made so keeps its full size."""
        one, other = self.now(one), self.now(other)
        if one == other:
            return one
        counts = [[self.count(part) for part in dim] for dim in (one, other)]
        if counts[0] != counts[1]:
            for dim in (one, other):
                self.fix(dim, reason)
            return self.now(one)
        for first, second in zip(one, other, strict=True):
            self._unite_parts(first, second, reason)
        return self.now(one)

    def _unite_parts(self, one: Part, other: Part, reason: str) -> None:
        if one[0] is None or other[0] is None:
            for part in (one, other):
                if part[0] is not None:
                    self.fix((part,), reason)
            return
        (a, repeat_a), (b, repeat_b) = self.now((one, other))
        assert a is not None and b is not None
        if a == b and repeat_a == repeat_b:
            return
        if BATCH in (a, b):
            raise BatchMixed
        common = math.lcm(repeat_a, repeat_b)
        fits = all(
            self._axes[axis].size % (common // repeat) == 0
            for axis, repeat in ((a, repeat_a), (b, repeat_b))
        )
        if not fits or a == b:
            self.fix((one, other), reason)
            return
        self.coarsen(a, common // repeat_a)
        self.coarsen(b, common // repeat_b)
        (a, _), (b, _) = self.now((one, other))
        assert a is not None and b is not None
        kept, gone = sorted((a, b))
        self._axes[kept].makers = sorted({*self._axes[a].makers, *self._axes[b].makers})
        self._axes[kept].reason = self._axes[kept].reason or self._axes[gone].reason
        self._axes[kept].coarse |= self._axes[gone].coarse
        self._parent[gone] = (kept, 1)

    def merge(self, dims: Iterable[Dim], reason: str) -> Dim:
        """Several dimensions flattened into one, the last of them running fastest."""
        merged: Dim = ((None, 1),)
        for dim in map(self.now, dims):
            if dim == ((None, 1),):
                continue
            outer = merged
            if outer == ((None, 1),):
                merged = dim
            elif len(dim) == 1 and dim[0][0] is None:
                merged = tuple((axis, repeat * dim[0][1]) for axis, repeat in outer)
            elif len(outer) == 1 and outer[0][0] is None and outer[0][1] * len(dim) <= MOST_PARTS:
                merged = dim * outer[0][1]
            else:
                for each in (outer, dim):
                    self.fix(each, reason)
                merged = ((None, self.size(outer) * self.size(dim)),)
        return merged

    def split(self, dim: Dim, sizes: list[int], reason: str) -> list[Dim]:
        """One dimension unflattened into several of these sizes, the last running fastest."""
        inner = math.prod(sizes[1:])
        constants: list[Dim] = [((None, size),) for size in sizes]
        if inner == 1:
            return [self.now(dim), *constants[1:]]
        if sizes[0] == 1:
            return [constants[0], *self.split(dim, sizes[1:], reason)]
        if all(axis is None for axis, _ in self.now(dim)):
            return constants
        whole = self.blocks(dim, inner)
        if whole is None:
            self.fix(dim, reason)
            return constants
        outer = tuple((axis, repeat // inner) for axis, repeat in whole)
        return [outer, *constants[1:]]

    def take(self, dim: Dim, start: int, end: int, reason: str) -> tuple[Dim, Dim]:
        """What lies before `start`, and from there to `end`; a cut through a part fixes all."""
        dim, offset = self.now(dim), 0
        before: list[Part] = []
        inside: list[Part] = []
        for part in dim:
            following = offset + self.count(part)
            if part[0] is None:
                for low, high, where in ((0, start, before), (start, end, inside)):
                    count = min(high, following) - max(low, offset)
                    if count > 0:
                        where.append((None, count))
            elif following <= start:
                before.append(part)
            elif offset >= start and following <= end:
                inside.append(part)
            elif offset < end and following > start:
                self.fix(dim, reason)
                return ((None, start),), ((None, end - start),)
            offset = following
        return tuple(before), tuple(inside) or ((None, 0),)

    def fixed(self, axis: int) -> str:
        """Why a root axis keeps its full size, or ''."""
        found = self._axes[axis]
        if found.coarse and found.size < FEWEST and not found.reason:
            found.reason = f"has only {found.size} groups of channels"
        return found.reason

    def makers(self, axis: int) -> tuple[str, ...]:
        """The modules and tensors that make an axis, in the order of the forward pass."""
        return tuple(maker for _, maker in self._axes[self._root(axis)[0]].makers)

    def length(self, axis: int) -> int:
        """The size of a root axis."""
        return self._axes[axis].size
