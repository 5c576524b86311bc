"""The evaluation table: which sizes it has, and what a row says of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from neumeta import wire
from neumeta.manifold import Contract, Manifold, roles
from neumeta.representation import build
from neumeta.space import Space
from tests.conftest import lenet
from tests.support.modules import traced
from training import data, evaluate, recipe_file

PLAIN = Space("plain", traced("plain")[1], (0.25, 1.0), (1, 4))
GRAPH = traced("resnet")[1]
LAST = replace(GRAPH.stages[-1], first=2, blocks=1)  # two of its three children cannot be repeated
RESNET = Space("resnet", replace(GRAPH, stages=(*GRAPH.stages[:-1], LAST)), (0.25, 0.75), (2, 4))


@pytest.mark.parametrize(
    ("space", "blocks", "widths", "wanted"),
    [
        (PLAIN, None, [1.0, 0.5], [(1.0, (2, 3)), (0.5, (2, 3))]),
        # One width of two stages or fewer: every depth.
        (PLAIN, [1, 2], [1.0], [(1.0, (a, b)) for a in (1, 2) for b in (1, 2)]),
        # Otherwise the widths, then even depths at the largest width that is trained.
        (PLAIN, [1, 2], [1.0, 0.5], [(1.0, (2, 3)), (0.5, (2, 3)), (1.0, (1, 1)), (1.0, (2, 2))]),
        # Three stages, of which the last has two blocks at least; a width beyond the trained ones.
        (RESNET, [1, 3], [1.0], [(1.0, (2, 3, 3)), *((0.75, (n, n, max(n, 2))) for n in (1, 2, 3))]),
        # What is in both lists is one row.
        (PLAIN, [3, 3], [1.0, 0.5], [(1.0, (2, 3)), (0.5, (2, 3)), (1.0, (3, 3))]),
    ],
)  # fmt: skip
def test_the_table_has_the_sizes_that_the_recipe_lists(
    monkeypatch: pytest.MonkeyPatch,
    space: Space,
    blocks: list[int] | None,
    widths: list[float],
    wanted: list[tuple[float, tuple[int, ...]]],
) -> None:
    asked = recipe_file.load("mnist-resnet-depth").changed(
        network={"named": {}},
        fit={"width": space.width, "blocks": space.blocks, "widths": []},
        evaluate={"blocks": blocks, "widths": widths},
    )
    monkeypatch.setattr(evaluate, "evaluate_one", lambda _, size, *__, **___: {"size": size})
    model = build("grid", {}, roles(space))
    manifold = Manifold(space, model, "grid", {}, 0.0, 1, 64, Contract((0.5,), (0.5,), ("a", "b")))
    rows = evaluate.evaluate(manifold, data.load("digits"), asked)
    assert [(row["width"], row["size"].depth) for row in rows] == wanted
    for row in rows:
        depth = list(row["size"].depth)
        assert row["size"] == space.architecture(row["width"], depth, extrapolate=True)


def test_a_row_says_what_a_size_costs_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    digits, manifold = data.load("digits"), lenet("grid")
    size = manifold.space.architecture(0.5)
    scored: list[Any] = []

    def score(net: Any, *given: Any) -> float:
        scored.extend((net(torch.zeros(2, 1, 28, 28)).shape, *given))
        return 12.3456

    monkeypatch.setattr(evaluate, "score", score)
    row = evaluate.evaluate_one(manifold, size, digits)
    assert scored[0] == (2, 10) and scored[1] is digits
    assert row == {
        "channels": list(size.channels),
        "depth": [],
        "extrapolated": False,
        **manifold.space.cost(size),
        "bytes": wire.plan(manifold, size, "float32").length,
        "score": 12.35,  # per cent, and what is told of it
        "metric": "accuracy",
    }

    def broken(*_: Any) -> float:
        raise ValueError("an output is not finite")

    monkeypatch.setattr(evaluate, "score", broken)
    with pytest.raises(ValueError, match=f"^{size.key}: an output is not finite$"):
        evaluate.evaluate_one(manifold, size, digits)
    manifold.representation.grid["conv2/weight"].data[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=f"{size.key}: .* weights of conv2.weight are not finite"):
        evaluate.evaluate_one(manifold, size, digits)
