"""Names of axes and of the groups that widths resize. Knows the module tree, not the operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch


def name_axes(
    makers: Mapping[int, Sequence[str]], patterns: Sequence[str] = ()
) -> dict[int, tuple[str, str]]:
    """Each axis' (name, group), from the paths of the modules that make it.

    An axis is called after the first module that makes it. Its group is the first of `patterns` that
    the name matches; without patterns, the block of the module tree that most of its makers are in.

    Raises ValueError for a pattern that matches no axis, and for an axis that matches none.
    """
    names = {axis: paths[0] for axis, paths in makers.items()}
    if patterns:
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names.values()):
                raise ValueError(f"groups: {pattern!r} matches none of {', '.join(names.values())}")
        found = {}
        for axis, name in names.items():
            group = next((p for p in patterns if fnmatch(name, p)), None)
            if group is None:
                raise ValueError(f"groups: axis {name!r} matches none of {', '.join(patterns)}")
            found[axis] = (name, group)
        return found
    shared = _shared([path.split(".") for paths in makers.values() for path in paths])
    return {axis: (names[axis], _block(paths, shared)) for axis, paths in makers.items()}


def _shared(paths: list[list[str]]) -> int:
    """How many leading names all paths have in common, leaving each at least one of its own."""
    if not paths:
        return 0
    count = 0
    most = min(len(path) for path in paths) - 1
    while count < most and len({path[count] for path in paths}) == 1:
        count += 1
    return count


def _block(paths: Sequence[str], shared: int) -> str:
    """The block that holds most of these modules; of two with as many, the later one."""
    blocks = [".".join(path.split(".")[: shared + 1]) for path in paths]
    counts = Counter(blocks)
    most = max(counts.values())
    return [block for block in blocks if counts[block] == most][-1]
