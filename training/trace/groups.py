"""Names of axes and of the groups that widths resize. Knows the module tree, not the operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch


def name_axes(
    makers: Mapping[int, Sequence[str]],
    patterns: Sequence[str] = (),
    *,
    containers: Collection[str] = (),
    positions: Mapping[str, int] | None = None,
) -> dict[int, tuple[str, str]]:
    """Each axis' (name, group), from the paths of the modules that make it.

    An axis is called after the first module that makes it. Its group is the first of `patterns` that
    the name matches; without patterns, the block of the module tree that most of its makers are in.
    Blocks are the children of the network. A child among the `containers`, which run a list of
    others, is divided where its children end at several resolutions: numbered ones side by side that
    end at the same one are a block together. `positions` is at how many places of an image each maker
    has channels, in the order of the forward pass.

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
    given = {path for each in makers.values() for path in each}
    places = positions or {}
    ordered = [*(path for path in places if path in given), *sorted(given - set(places))]
    blocks: dict[str, str] = {}
    _divide("", ordered, containers, places, True, blocks)
    return {
        axis: (names[axis], _most([blocks[path] for path in paths]))
        for axis, paths in makers.items()
    }


def _divide(
    name: str,
    paths: Sequence[str],
    containers: Collection[str],
    positions: Mapping[str, int],
    whole: bool,
    blocks: dict[str, str],
) -> None:
    """Give every path in the module `name` its block; `whole` if the module is all of the network."""
    within: dict[str, list[str]] = {}
    for path in paths:
        inner = path.removeprefix(f"{name}.") if name else path
        child = f"{name}.{inner.partition('.')[0]}" if name else inner.partition(".")[0]
        within.setdefault(path if path == name else child, []).append(path)
    ends = {child: _end(child, positions) for child in within}
    if not whole and (name not in containers or len(set(ends.values())) == 1):
        blocks.update(dict.fromkeys(paths, name))
        return
    if whole and len(within) == 1 and paths != list(within):
        # A module that is all of the network: a wrapper around it, or its only list of layers.
        (child,) = within
        _divide(child, paths, containers, positions, child not in containers, blocks)
        return
    runs: list[list[str]] = []
    for child in within:
        numbered = child.rpartition(".")[2].isdigit()
        if runs and numbered and ends[child] == ends[runs[-1][-1]]:
            runs[-1].append(child)
        else:
            runs.append([child])
    for run in runs:
        if len(run) == 1:
            _divide(run[0], within[run[0]], containers, positions, False, blocks)
        else:
            blocks.update({path: run[0] for child in run for path in within[child]})


def _end(module: str, positions: Mapping[str, int]) -> int:
    """At how many places the last layer of this module has channels, whether they morph or not."""
    inside = [n for path, n in positions.items() if f"{path}.".startswith(f"{module}.")]
    return inside[-1] if inside else 0


def _most(blocks: Sequence[str]) -> str:
    """The block that most of these are; of two with as many, the later one."""
    counts = Counter(blocks)
    most = max(counts.values())
    return [block for block in blocks if counts[block] == most][-1]
