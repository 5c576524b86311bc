"""Manifolds of one network that were trained apart, each for its own sizes, put together into one, and
taken out again.

Knows no recipe and no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from neumeta.manifold import Manifold, roles
from neumeta.notation import pack
from neumeta.representation import (
    MOST_STEPS,
    Anchored,
    Charts,
    Corrected,
    Expanded,
    Grid,
    Representation,
    Sizes,
    build,
    build_chart,
    check_sizes,
)
from neumeta.space import Space


def mean(cycles: Sequence[Manifold]) -> Manifold:
    """The mean of a manifold's weights after several cycles of its training, or several trainings from
    one start, which is often better than each (Izmailov et al., "Averaging weights leads to wider
    optima", 2018; Wortsman et al., "Model soups", 2022).

    Raises ValueError if the cycles are not of one representation and one source, or are charts.
    """
    last = cycles[-1]
    if len(cycles) == 1:
        return last
    for each in cycles:
        _check_alike(each, cycles[0])
        if (each.kind, each.options) != (last.kind, last.options):
            there = {"kind": each.kind, **each.options}
            told = {"kind": last.kind, **last.options}
            raise ValueError(f"no mean: one manifold has {there}, another {told}")
        pairs = zip(_sources(each), _sources(last), strict=True)
        # One that went on from a chart of a file has rounded the source to sixteen bits once more.
        if not all(torch.equal(mine.half(), own.half()) for mine, own in pairs):
            raise ValueError("no mean: the manifolds keep the weights of different sources")
    if last.kind == "charts":
        raise ValueError("no mean: of several charts the numbers are held in eight bits")
    states = [each.representation.state_dict() for each in cycles]
    made = deepcopy(last.representation)
    made.load_state_dict(
        {
            name: torch.stack([state[name].double() for state in states]).mean(0)
            for name in states[-1]
        }
    )
    return replace(last, representation=made, digest="")


def joined(
    parts: Sequence[Manifold],
    sizes: Sequence[Sizes],
    covered: Space,
    steps: Sequence[int] | None = None,
) -> Manifold:
    """One manifold over `covered`: a size is drawn from the first part whose sizes it is of, or
    from the last one. `steps` are those of each part's numbers, up to a row's largest (None: all that
    eight bits have room for); the source has all. Its statistics are still to be measured.

    Raises ValueError if the parts are not of one network or differ in what they share, or if a part is
    for no size.
    """
    check_sizes(sizes, len(covered.groups), len(covered.depth))
    first = parts[0]
    for part in parts:
        if pack(part.space.graph) != pack(covered.graph):
            raise ValueError("it is a manifold of another network, or of other axes (fit.morph)")
        _check_alike(part, first)
    # Sizes that the first chart does not take are at least so far from the source.
    away = 0.0
    if not sizes[0].bounded:
        away = min(1 - sizes[0].least, _lost(sizes[0].blocks, first.space))
    held = []
    for part, own, few in zip(parts, sizes, steps or [MOST_STEPS] * len(parts), strict=True):
        options, model = dict(part.options), deepcopy(part.representation)
        anchored = options.get("anchored")
        if part is not first and anchored and anchored["reach"] <= away:
            # The source is never near: what is kept of it is left out.
            del options["anchored"]
            model = _free(model)
        if own.bounded:
            if part.noise:
                told = "only a grid without noise can be for narrow or shallow sizes alone"
                raise ValueError(f"{told} (most, most_blocks)")
            model = _cut(model, build_chart(part.kind, options, roles(covered), own))
        _compact(model, few)
        bounds: dict[str, Any] = {"least": own.least, "blocks": own.blocks}
        for key in ("most", "most_blocks"):
            each = getattr(own, key)
            if each != getattr(Sizes, key):
                bounds[key] = list(each) if len(each) > 1 else each[0]
        held.append((model, {"kind": part.kind, "options": options, **bounds}))
    charts = Charts([model for model, _ in held], sizes)
    return replace(
        first,
        space=covered,
        representation=charts.eval().requires_grad_(False),
        kind="charts",
        options={"charts": [told for _, told in held]},
        about={"permutation": first.about.get("permutation", {})},
        digest="",
    )


def taken(manifold: Manifold, index: int) -> Manifold:
    """One chart of a manifold as it was before it was put together, but for the rounding of its
    numbers; where channels or blocks were cut off there are zeros. The source that the manifold keeps
    is kept by the chart too.

    Raises ValueError if the manifold is not of charts, or has no such one.
    """
    parts = manifold.representation
    if not isinstance(parts, Charts):
        raise ValueError(f"it is of kind {manifold.kind}, which has no charts")
    if index >= len(parts.parts):
        raise ValueError(f"its charts are 0 to {len(parts.parts) - 1}")
    told = manifold.options["charts"][index]
    chart = deepcopy(parts.parts[index])
    assert isinstance(chart, Representation)
    options = dict(told["options"])
    # The parts that keep the whole source, and how.
    kept = [
        (part, other["options"]["anchored"])
        for part, own, other in zip(
            parts.parts, parts.sizes, manifold.options["charts"], strict=True
        )
        if not own.bounded and "anchored" in other["options"]
    ]
    if kept and (parts.sizes[index].bounded or "anchored" not in options):
        part, options["anchored"] = kept[0]
        anchor = next(each for each in part.modules() if isinstance(each, Anchored))
        chart = _anchored(_free(chart), deepcopy(anchor))
    for module in chart.modules():
        if isinstance(module, Grid | Corrected):
            module.widen()
    whole = build(told["kind"], options, roles(manifold.space))
    for module in whole.modules():
        if isinstance(module, Anchored):
            # Sixteen bits would round the source once more, for a chart that is put back.
            module.source.float()
    state = whole.state_dict()
    for name, value in chart.state_dict().items():
        state[name][tuple(slice(size) for size in value.shape)] = value
    whole.load_state_dict(state)
    return replace(manifold, representation=whole, kind=told["kind"], options=options, digest="")


def _sources(manifold: Manifold) -> list[torch.Tensor]:
    """The source's own weights, where a manifold keeps them."""
    return [
        value
        for module in manifold.representation.modules()
        if isinstance(module, Anchored)
        for value in module.source.state_dict().values()
    ]


def _check_alike(part: Manifold, first: Manifold) -> None:
    """Raises ValueError if the two differ in what manifolds of one source share."""
    alike = part.frozen.keys() == first.frozen.keys() and all(
        torch.equal(value, first.frozen[name]) for name, value in part.frozen.items()
    )
    if not alike:
        raise ValueError("its tensors that do not morph are not those of the first")
    for name in ("noise", "samples", "scale"):
        if getattr(part, name) != getattr(first, name):
            here, there = getattr(part, name), getattr(first, name)
            raise ValueError(f"its {name} is {here}, that of the first {there}")


def _lost(blocks: int, space: Space) -> float:
    """How far from the source the first chart's shallowest neighbours are, that it does not take."""
    shares = [1 - (blocks - 1) / own for own in space.depth if blocks > 1]
    return min([1.0, *shares])


def _free(model: Representation) -> Representation:
    """The representation without its anchor to the source."""
    if isinstance(model, Anchored):
        return model.inner
    for module in model.modules():
        inner = getattr(module, "inner", None)
        if isinstance(inner, Anchored):
            module.inner = inner.inner
    return model


def _anchored(model: Representation, anchor: Anchored) -> Representation:
    """The representation within this anchor, where `build` puts one."""
    around = [each for each in model.modules() if isinstance(each, Corrected | Expanded)]
    anchor.inner = around[-1].inner if around else model
    if not around:
        return anchor
    around[-1].inner = anchor
    return model


def _compact(model: Representation, steps: int) -> None:
    """Hold all grids in so many steps, but the source's: what goes on from a file begins at it."""
    sources = {id(each.source) for each in model.modules() if isinstance(each, Anchored)}
    for module in model.modules():
        if isinstance(module, Grid) and id(module) not in sources:
            module.compact(steps)


def _cut(model: Representation, small: Representation) -> Representation:
    """The first channels and blocks of the one as the other, which is built for fewer."""
    values = model.state_dict()
    kept = {
        name: values[name][tuple(slice(size) for size in value.shape)]
        for name, value in small.state_dict().items()
    }
    small.load_state_dict(kept)
    return small
