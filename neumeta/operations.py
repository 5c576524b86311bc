"""The closed set of operations that a graph may hold, and what a node of each must look like.

A graph that names another operation is refused when it is read. Knows no graph, no file, and not how
an operation is computed (`compute.py`): the client reads graphs without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Operation:
    """What a node of one operation must look like.

    `inputs` is how many values it reads (None: one or more). `tensors` and `optional` are the roles of
    the tensors it holds. `attributes` says of what kind each attribute is: `int`, `ints`, `number`,
    `flag`, `dim`, `dims`, `text`; `text?` may be missing.
    """

    inputs: int | None = 1
    tensors: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)


WEIGHTED = ("conv", "conv_transpose", "linear")
"""Operations that multiply by a weight: what multiply-accumulates are counted of."""

_WINDOW = {"stride": "ints", "padding": "ints", "dilation": "ints", "groups": "dim"}
_POOL = {"kernel": "ints", "stride": "ints", "padding": "ints", "ceil_mode": "flag"}
_NORM = ("weight", "bias")
ARITHMETIC = ("add", "sub", "mul", "div")

OPERATIONS: dict[str, Operation] = {
    "conv": Operation(1, ("weight",), ("bias",), {**_WINDOW, "norm": "text?"}),
    "conv_transpose": Operation(
        1, ("weight",), ("bias",), {**_WINDOW, "output_padding": "ints", "norm": "text?"}
    ),
    "linear": Operation(1, ("weight",), ("bias",), {"norm": "text?"}),
    "batch_norm": Operation(1, ("mean", "variance"), _NORM, {"eps": "number"}),
    "affine": Operation(1, _NORM, (), {"norm": "text?"}),
    "group_norm": Operation(1, (), _NORM, {"groups": "dim", "eps": "number"}),
    "layer_norm": Operation(1, (), _NORM, {"dimensions": "int", "eps": "number"}),
    "prelu": Operation(1, ("weight",)),
    "parameter": Operation(0, ("value",)),
    "relu": Operation(),
    "relu6": Operation(),
    "leaky_relu": Operation(attributes={"negative_slope": "number"}),
    "elu": Operation(attributes={"alpha": "number"}),
    "gelu": Operation(attributes={"approximate": "text"}),
    "silu": Operation(),
    "mish": Operation(),
    "hardswish": Operation(),
    "hardsigmoid": Operation(),
    "hardtanh": Operation(attributes={"min_val": "number", "max_val": "number"}),
    "sigmoid": Operation(),
    "tanh": Operation(),
    "softplus": Operation(attributes={"beta": "number", "threshold": "number"}),
    "exp": Operation(),
    "neg": Operation(),
    "softmax": Operation(attributes={"dim": "int"}),
    "log_softmax": Operation(attributes={"dim": "int"}),
    **{name: Operation(2) for name in ARITHMETIC},
    # Of a value and a number, which stands first if `reversed`.
    **{
        f"{name}_number": Operation(attributes={"number": "number", "reversed": "flag"})
        for name in ARITHMETIC
    },
    "cat": Operation(None, attributes={"dim": "int"}),
    "max_pool": Operation(attributes={**_POOL, "dilation": "ints"}),
    "avg_pool": Operation(attributes={**_POOL, "count_include_pad": "flag"}),
    "adaptive_max_pool": Operation(attributes={"size": "ints"}),
    "adaptive_avg_pool": Operation(attributes={"size": "ints"}),
    "mean": Operation(attributes={"dims": "ints", "keepdim": "flag"}),
    "resize": Operation(attributes={"size": "ints", "mode": "text", "align_corners": "flag"}),
    "pad": Operation(attributes={"pad": "ints", "mode": "text", "value": "number"}),
    "reshape": Operation(attributes={"shape": "dims"}),
    "permute": Operation(attributes={"order": "ints"}),
    "expand": Operation(attributes={"shape": "dims"}),
    "slice": Operation(attributes={"dim": "int", "start": "dim", "length": "dim", "step": "int"}),
}
