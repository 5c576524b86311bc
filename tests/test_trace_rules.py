"""Each operator by itself: what its rule makes of it computes what torch does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neumeta.program import Program
from neumeta.shapes import check
from training.trace import trace

ONE, TWO = (3, 11), (3, 11, 9)
"""An image of one and of two dimensions of space, whose sides no window divides."""

CASES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "max_pool1d": (lambda x: F.max_pool1d(x, 3, 2, 1, 2), ONE),
    "max_pool2d": (lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), (2, 1)), TWO),
    "max_pool2d of one number": (lambda x: F.max_pool2d(x, [2]), TWO),
    "avg_pool2d of one number": (lambda x: F.avg_pool2d(x, [2]), TWO),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False), ONE),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, (3, 2), padding=(1, 0), ceil_mode=True), TWO),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 4), ONE),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (4, 3)), TWO),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 4), ONE),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (4, 3)), TWO),
    "a number less the value": (lambda x: 1 - x, ONE),
    "the value less a number": (lambda x: x - 1, ONE),
    "rsub of a number": (lambda x: torch.rsub(x, 2.5), ONE),
    "rsub of a value": (lambda x: torch.rsub(x, 2 * x), ONE),
    "a number by the value": (lambda x: 2 / (x.exp() + 1), ONE),
    "the value by a number": (lambda x: x / 2, ONE),
    "keepdim": (lambda x: x - x.mean((-1, 2), keepdim=True), TWO),
    "padded by a number": (lambda x: F.pad(x, (1, 2, 0, 3), value=0.5), TWO),
}


class Around(nn.Module):
    """A convolution, the operator, and another convolution."""

    def __init__(self, operator: Callable[[Tensor], Tensor], rank: int) -> None:
        super().__init__()
        kind = nn.Conv1d if rank == 1 else nn.Conv2d
        self.operator = operator
        self.stem, self.head = kind(3, 6, 1), kind(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.operator(self.stem(x)))
        return made


@pytest.mark.parametrize("name", list(CASES))
@torch.no_grad()
def test_an_operator_computes_what_torch_does(name: str) -> None:
    operator, shape = CASES[name]
    torch.manual_seed(0)
    module, x = Around(operator, len(shape) - 1), torch.randn(2, *shape)
    graph, _ = trace(module, x[:1])
    check(graph, graph.full)  # as whoever reads the manifold does
    made = Program(graph, graph.full).run(module.state_dict(), x)
    assert isinstance(made, Tensor)
    torch.testing.assert_close(made, module(x))
    assert "stem" in graph.axes  # which still morphs
