"""Continuous representations of weights, by kind, and the wrappers around them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from neumeta.coordinates import Site
from neumeta.representation.base import Representation
from neumeta.representation.charts import Charts, Sizes, bounded, check_sizes, within
from neumeta.representation.grid import MOST_STEPS, Grid
from neumeta.representation.integral import IntegralGrid
from neumeta.representation.mlp import ResidualMLP
from neumeta.representation.wrappers import Anchored, Centred, Corrected, Expanded

__all__ = [
    "KINDS",
    "MOST_CHARTS",
    "MOST_STEPS",
    "WRAPPERS",
    "Anchored",
    "Centred",
    "Charts",
    "Corrected",
    "Expanded",
    "Grid",
    "IntegralGrid",
    "Representation",
    "ResidualMLP",
    "Sizes",
    "build",
    "build_chart",
    "check_sizes",
    "within",
]

KINDS: dict[str, Any] = {"mlp": ResidualMLP, "grid": Grid, "integral": IntegralGrid}
WRAPPERS: dict[str, Any] = {
    "centred": Centred,
    "anchored": Anchored,
    "corrected": Corrected,
    "expanded": Expanded,
}
"""Applied in this order, where the options have an entry of the name."""

MOST_CHARTS = 16


def build(kind: str, options: Mapping[str, Any], roles: Mapping[str, Site]) -> Representation:
    """A new representation; `options` are its own, and by name those of the wrappers around it.

    Of kind 'charts' they are `charts`, a list of {kind, options, least, blocks, most, most_blocks}:
    what each is built of, and the sizes that it is for; the last two may be left out, or be lists
    with one for each group or stage. Raises ValueError for an unknown kind or option.
    """
    if kind == "charts":
        held = options["charts"]
        if not 1 <= len(held) <= MOST_CHARTS or any(each["kind"] == kind for each in held):
            raise ValueError(f"charts: {len(held)}, one within another or more than {MOST_CHARTS}")
        sizes = [
            Sizes(
                float(each["least"]),
                int(each["blocks"]),
                _each("most", each),
                _each("most_blocks", each),
            )
            for each in held
        ]
        first = next(iter(roles.values()), None)
        check_sizes(sizes, *((len(first.widest), len(first.depth)) if first else (0, 0)))
        parts = [
            build_chart(each["kind"], each["options"], roles, own)
            for each, own in zip(held, sizes, strict=True)
        ]
        return Charts(parts, sizes)
    if kind not in KINDS:
        raise ValueError(f"representation: {kind!r} is not one of {sorted(KINDS)}")
    own = {key: value for key, value in options.items() if key not in WRAPPERS}
    try:
        made: Representation = KINDS[kind](roles, **own)
        for name, wrapper in WRAPPERS.items():
            if name in options:
                made = wrapper(made, roles, **options[name])
    except TypeError as error:
        raise ValueError(f"representation: {kind}: {error}") from None
    return made


def _each(key: str, told: Mapping[str, Any]) -> tuple[float, ...]:
    held = told.get(key, math.inf)
    each = held if isinstance(held, list | tuple) else [held]
    if any(type(most) not in (int, float) for most in each):
        raise ValueError(f"charts: {key} is {str(held)[:80]}, not numbers")
    return tuple(map(float, each))


def build_chart(
    kind: str, options: Mapping[str, Any], roles: Mapping[str, Site], sizes: Sizes
) -> Representation:
    """A new representation for these sizes: of bounded ones it has only their channels and blocks,
    which only a grid is content with. Raises ValueError for another kind, and as `build`."""
    if sizes.bounded and kind != "grid":
        raise ValueError(
            f"charts: only a grid can be for narrow or shallow sizes alone, not {kind}"
        )
    return build(kind, options, bounded(roles, sizes))
