"""A torch.nn.Module -> a graph: torch.export's program, operation by operation.

Each rule says which operation of the closed set an ATen call is and what it does to axes. What has no
rule is refused by the name of the module that calls it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from neumeta.graph import BATCH, Axis, Graph, Node
from neumeta.graph import Dim as GraphDim
from training.trace import axes as ax
from training.trace.axes import Axes, BatchMixed, Dim
from training.trace.groups import name_axes
from training.trace.stages import find_stages

EXAMPLES = 3
"""Images in the traced batch: a number that few other dimensions have."""
NOTHING = {"dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach", "alias"}
NOTHING |= {"lift_fresh_copy", "detach_", "dropout_", "feature_dropout_", "_to_copy", "to"}
VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "slice"}
VIEWS |= {"expand", "chunk", "split", "split_with_sizes", "select", "t", "narrow"}


class TraceError(ValueError):
    """A module that cannot be traced: where, why, and what to do about it."""


def trace(
    module: nn.Module, example: Tensor, *, groups: Sequence[str] = ()
) -> tuple[Graph, dict[str, str]]:
    """The graph of a module that takes a batch of images, and why some axes keep their size.

    `example` is (N, C, H, W) of any N; `groups` are patterns over axis names, one group of widths
    each (none: one for each block of the module tree). The second value maps the module that makes an
    axis to the reason why the axis does not morph.

    Raises TraceError, which names the module's node.
    """
    return _Tracing(module, example).graph(groups)


class _Tracing:
    """One pass over an exported program."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        if not isinstance(example, Tensor) or example.ndim < 2 or not len(example):
            raise TraceError(
                "the example input must be a batch of at least one image, (N, C, H, W)"
            )
        batch = example[:1].expand(EXAMPLES, *[-1] * (example.ndim - 1)).contiguous()
        training = module.training
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(module.eval(), (batch,), strict=False)
        except Exception as error:  # whatever the user's own code and torch.export raise
            raise TraceError(
                f"torch.export cannot follow {type(module).__name__} on an input of shape"
                f" {tuple(example.shape)}: {_first_line(error)}"
            ) from None
        finally:
            module.train(training)
        self.program = program
        self.containers = {name for name, each in module.named_modules() if len(each._modules)}
        # A plain ModuleList or ModuleDict only holds its children: it does not run them in turn.
        self.lists = {
            name
            for name, each in module.named_modules()
            if isinstance(each, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
            and type(each) not in (nn.ModuleList, nn.ModuleDict)
        }
        self.axes = Axes(EXAMPLES)
        self.positions: dict[str, int] = {}  # who makes an axis -> at how many places of an image
        self.values: dict[str, str] = {}  # fx name -> our name
        self.dims: dict[str, tuple[Dim, ...]] = {}
        self.tensor_dims: dict[str, tuple[Dim, ...]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.parts: dict[str, list[str]] = {}  # values that a chunk or split makes
        self.base: dict[str, str] = {}  # a view -> what it is a view of
        self.later: dict[str, int] = {}  # fx name -> place of its last reader
        self.nodes: list[dict[str, Any]] = []
        self.node: fx.Node
        self.names: set[str] = set()

    # --- the pass -------------------------------------------------------------------------------

    def graph(self, groups: Sequence[str]) -> tuple[Graph, dict[str, str]]:
        signature = self.program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        held |= dict(signature.inputs_to_lifted_tensor_constants)
        state = {**self.program.state_dict, **self.program.constants}
        nodes = list(self.program.graph.nodes)
        for place, node in enumerate(nodes):
            for read in node.all_input_nodes:
                self.later[read.name] = place
        outputs: list[tuple[str, str]] = []
        images = 0
        for place, node in enumerate(nodes):
            self.node = node
            if node.op == "placeholder":
                if node.name in held:
                    name = held[node.name]
                    self.values[node.name] = f"tensor:{name}"
                    self.tensors[name] = state[name]
                    continue
                images += 1
                if images > 1:
                    raise TraceError(
                        f"the module takes {images} inputs: one batch of images is read"
                    )
                self.values[node.name] = "input"
                shape = _shape(node)
                self.dims["input"] = (
                    ((ax.BATCH, 1),),
                    *(((None, size),) for size in shape[1:]),
                )
            elif node.op == "output":
                outputs = self._outputs(node)
            else:
                self._call(node, place)
        return self._finished(outputs, groups)

    def _call(self, node: fx.Node, place: int) -> None:
        kind = _kind(node)
        if node.target.__class__.__name__ == "builtin_function_or_method" and kind == "getitem":
            source, index = node.args
            self.values[node.name] = self.parts[self.values[source.name]][index]  # type: ignore
            return
        arguments = _arguments(node)
        if kind in NOTHING:
            read = node.args[0]
            assert isinstance(read, fx.Node)
            if arguments.get("train") or arguments.get("training"):
                raise self._error("still drops in eval mode")
            self.values[node.name] = self.values[read.name]
            return
        plain = kind.removesuffix("_") if kind not in ("sub_", "add_") else kind[:-1]
        rule = RULES.get(plain)
        if rule is None:
            raise self._error(
                "is not among the operations that can be served (docs/graph.md lists them): replace"
                " it, or move it out of the module"
            )
        try:
            made = rule(self, arguments)
        except BatchMixed:
            raise self._error("mixes the images of a batch with each other") from None
        self.values[node.name] = made
        if isinstance(made, str) and made in self.dims:
            expected = _shape(node)
            found = tuple(self.axes.size(dim) for dim in self.dims[made])
            if found != expected:
                raise self._error(f"gives {expected}, where its rule says {found}")
        if kind.endswith("_") and node.args and isinstance(node.args[0], fx.Node):
            self._in_place(node.args[0], made, place)
        first = node.args[0] if node.args else None
        if plain in VIEWS and isinstance(first, fx.Node):
            self.base[node.name] = self.base.get(first.name, first.name)

    def _in_place(self, changed: fx.Node, made: str, place: int) -> None:
        """What is read of the changed value from now on is the result."""
        base = self.base.get(changed.name)
        if base is not None and self.later.get(base, -1) > place:
            raise self._error("changes a view in place, whose base is read later")
        self.values[changed.name] = made

    def _outputs(self, node: fx.Node) -> list[tuple[str, str]]:
        flat = node.args[0]
        assert isinstance(flat, (tuple, list))
        spec = self.program.call_spec.out_spec
        keys = _keys(spec, len(flat))
        found = []
        for key, value in zip(keys, flat, strict=True):
            if not isinstance(value, fx.Node) or self.values[value.name] not in self.dims:
                raise TraceError(f"the module's output {key or 'value'} is no computed tensor")
            name = self.values[value.name]
            for dim in self.dims[name]:
                if dim != ((ax.BATCH, 1),):
                    self.axes.fix(dim, "is an output of the network")
            found.append((key, name))
        return found

    def _error(self, why: str) -> TraceError:
        module = _module(self.node) or "the network itself"
        return TraceError(f"{module}: {_kind(self.node)} ({self.node.name}) {why}")

    # --- what rules use -------------------------------------------------------------------------

    def read(self, value: Any) -> str:
        """The name of a value; a parameter that is read as one becomes a node of its own."""
        if not isinstance(value, fx.Node):
            raise self._error(f"reads {value!r} where a tensor is expected")
        name = self.values[value.name]
        if name.startswith("tensor:"):
            tensor = name.removeprefix("tensor:")
            shape = tuple(self.tensors[tensor].shape)
            dims = self.tensor_dims.get(tensor) or tuple(
                self.axes.new(size, f"{tensor}" if not i else f"{tensor}.{i}")
                for i, size in enumerate(shape)
            )
            return self.add("parameter", (), dims, {"value": (tensor, dims)}, {}, keep=False)
        return name

    def new(self, size: int) -> Dim:
        """A new axis, made by the module that the present operation is called in."""
        self.positions[self.where()] = math.prod(_shape(self.node)) // (EXAMPLES * size)
        return self.axes.new(size, self.where())

    def held(self, value: Any) -> str | None:
        """The name of a parameter or buffer that an operation holds."""
        if value is None:
            return None
        name = self.values[value.name]
        if not name.startswith("tensor:"):
            raise self._error("computes the tensor it holds: use plain parameters")
        return name.removeprefix("tensor:")

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        dims: Sequence[Dim],
        tensors: Mapping[str, tuple[str | None, Sequence[Dim]]],
        attributes: Mapping[str, Any],
        keep: bool = True,
    ) -> str:
        """A node with these held tensors (role -> name and dimensions); returns its value's name."""
        held = {}
        batch: Dim = ((ax.BATCH, 1),)
        if any(batch in self.dims[name] for name in inputs) and batch not in dims:
            raise BatchMixed
        for role, (name, spans) in tensors.items():
            if name is None:
                continue
            if batch in spans:
                raise BatchMixed
            before = self.tensor_dims.get(name)
            if before is None:
                self.tensor_dims[name] = tuple(spans)
            else:
                for one, other in zip(before, spans, strict=True):
                    self.axes.unite(one, other, f"shares {name}")
            held[role] = name
        module = _module(self.node)
        name = self._fresh(op, module if keep else held.get("value", module))
        self.nodes.append(
            {
                "name": name,
                "op": op,
                "inputs": tuple(inputs),
                "tensors": held,
                "attributes": dict(attributes),
                "module": module,
            }
        )
        self.dims[name] = tuple(dims)
        return name

    def _fresh(self, op: str, module: str) -> str:
        stem = module if module and module not in self.containers else f"{module}.{op}".lstrip(".")
        name, count = stem, 0
        while name in self.names or name == "input":
            count += 1
            name = f"{stem}_{count}"
        self.names.add(name)
        return name

    def where(self) -> str:
        """The module that the present operation is called in."""
        return _module(self.node) or self.node.name

    def channels(self, name: str, dim: int) -> int:
        """A dimension counted from the front."""
        return dim % len(self.dims[name])

    # --- the graph ------------------------------------------------------------------------------

    def _finished(
        self, outputs: list[tuple[str, str]], groups: Sequence[str]
    ) -> tuple[Graph, dict[str, str]]:
        needed = {name for _, name in outputs}
        kept: list[dict[str, Any]] = []
        for node in reversed(self.nodes):
            if node["name"] in needed:
                kept.append(node)
                needed |= set(node["inputs"])
        kept.reverse()
        spans = [self.dims[node["name"]] for node in kept]
        used = dict.fromkeys(name for node in kept for name in node["tensors"].values())
        spans += [self.tensor_dims[name] for name in used]
        roots = dict.fromkeys(
            axis for dims in spans for dim in dims for axis, _ in self.axes.now(dim) if axis
        )
        morphing = [axis for axis in roots if not self.axes.fixed(axis)]
        notes = {
            self.axes.makers(axis)[0]: self.axes.fixed(axis)
            for axis in roots
            if self.axes.fixed(axis)
        }
        named = name_axes(
            {axis: self.axes.makers(axis) for axis in morphing},
            groups,
            containers=self.lists,
            positions=self.positions,
        )
        names = {axis: name for axis, (name, _) in named.items()}

        def final(dim: Dim) -> GraphDim:
            found: list[tuple[str, int]] = []
            for part in self.axes.now(dim):
                axis, repeat = part
                if axis == ax.BATCH:
                    found.append((BATCH, repeat))
                elif axis in names:
                    found.append((names[axis], repeat))
                elif found and not found[-1][0]:
                    found[-1] = ("", found[-1][1] + self.axes.count(part))
                else:
                    found.append(("", self.axes.count(part)))
            return tuple(found)

        def attribute(value: Any) -> Any:
            if isinstance(value, _Spans):
                return final(value.dim)
            if isinstance(value, _SpansOf):
                return tuple(final(dim) for dim in value.dims)
            return tuple(value) if isinstance(value, (list, tuple)) else value

        nodes = tuple(
            Node(
                node["name"],
                node["op"],
                node["inputs"],
                node["tensors"],
                {key: attribute(value) for key, value in node["attributes"].items()},
                tuple(final(dim) for dim in self.dims[node["name"]]),
                node["module"],
            )
            for node in kept
        )
        graph = Graph(
            tuple(final(dim) for dim in self.dims["input"]),
            {name: Axis(self.axes.length(axis), group) for axis, (name, group) in named.items()},
            {name: tuple(final(dim) for dim in self.tensor_dims[name]) for name in used},
            nodes,
            tuple(outputs),
        )
        return find_stages(graph), notes


class _Spans:
    """An attribute that follows from a dimension, whose axes are not yet final."""

    def __init__(self, dim: Dim) -> None:
        self.dim = dim


class _SpansOf:
    """An attribute that is a shape."""

    def __init__(self, dims: Sequence[Dim]) -> None:
        self.dims = tuple(dims)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _kind(node: fx.Node) -> str:
    target = node.target
    name = getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
    return str(name)


def _module(node: fx.Node) -> str:
    """The path of the innermost user's module that runs this node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return paths[-1].partition("@")[0] if paths else ""


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise TraceError(f"{_module(node)}: {node.name} makes no tensor")
    if not all(isinstance(size, int) for size in value.shape):
        raise TraceError(f"{_module(node)}: {node.name} has a shape that depends on the data")
    return tuple(int(size) for size in value.shape)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of the operator's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise TraceError(f"{_module(node)}: {node.name} calls {node.target}, which is no operator")
    found: dict[str, Any] = {}
    for place, argument in enumerate(schema.arguments):
        if place < len(node.args):
            found[argument.name] = node.args[place]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def _keys(spec: Any, count: int) -> list[str]:
    """The keys of a module's outputs: '' for a tensor alone, places of a tuple, keys of a dict."""
    paths = torch.utils._pytree.tree_flatten_with_path(
        torch.utils._pytree.tree_unflatten(list(range(count)), spec)
    )[0]
    return [
        ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in paths
    ]


def _pair(value: Any, count: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def _constants(node: fx.Node, start: int) -> list[Dim]:
    return [((None, size),) for size in _shape(node)[start:]]


# --- rules: an ATen call -> a node, and what becomes of axes ---------------------------------------

Rule = Callable[[_Tracing, dict[str, Any]], str]


def _convolution(t: _Tracing, a: dict[str, Any], transposed: bool = False) -> str:
    x = t.read(a["input"])
    weight = t.held(a["weight"])
    assert weight is not None
    shape = tuple(t.tensors[weight].shape)
    given, groups = t.dims[x][1], int(a["groups"])
    spatial: list[Dim] = [((None, size),) for size in shape[2:]]
    count = len(spatial)
    total = t.axes.size(given)
    reads = total // groups
    makes = shape[1] if transposed else shape[0] // groups
    if groups == 1:
        made = t.new(makes)
        expression: Dim = ((None, 1),)
        across = (made, given) if not transposed else (given, made)
    else:
        whole = t.axes.blocks(given, reads)
        if whole is None:
            t.axes.fix(given, f"feeds {t.where()}, whose groups cut across it")
            whole = t.axes.now(given)
            made, expression = ((None, makes * groups),), ((None, groups),)
            if any(axis is not None and repeat % reads for axis, repeat in whole):
                whole = ((None, total),)
        else:
            made = tuple((axis, repeat // reads * makes) for axis, repeat in whole)
            expression = tuple((axis, repeat // reads) for axis, repeat in whole)
        inner: Dim = ((None, makes if transposed else reads),)
        across = (whole, inner) if transposed else (made, inner)
    padding = a["padding"]
    if isinstance(padding, str):
        raise t._error(f"has padding {padding!r}: give it as numbers")
    attributes = {
        "stride": _pair(a["stride"], count),
        "padding": _pair(padding, count),
        "dilation": _pair(a["dilation"], count),
        "groups": _Spans(expression),
    }
    if transposed:
        attributes["output_padding"] = _pair(a["output_padding"], count)
    return t.add(
        "conv_transpose" if transposed else "conv",
        (x,),
        (t.dims[x][0], made, *_constants(t.node, 2)),
        {"weight": (weight, (*across, *spatial)), "bias": (t.held(a["bias"]), (made,))},
        attributes,
    )


def _transposed(t: _Tracing, a: dict[str, Any]) -> str:
    return _convolution(t, a, transposed=True)


def _linear(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["input"])
    weight = t.held(a["weight"])
    assert weight is not None
    made = t.new(t.tensors[weight].shape[0])
    return t.add(
        "linear",
        (x,),
        (*t.dims[x][:-1], made),
        {
            "weight": (weight, (made, t.dims[x][-1])),
            "bias": (t.held(a["bias"]), (made,)),
        },
        {},
    )


def _batch_norm(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["input"])
    mean, variance = t.held(a["running_mean"]), t.held(a["running_var"])
    if a["training"] or mean is None or variance is None:
        raise t._error("keeps no running statistics: use track_running_stats=True")
    spans = (t.dims[x][1],)
    held = {
        "mean": (mean, spans),
        "variance": (variance, spans),
        "weight": (t.held(a["weight"]), spans),
        "bias": (t.held(a["bias"]), spans),
    }
    return t.add("batch_norm", (x,), t.dims[x], held, {"eps": float(a["eps"])})


def _group_norm(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["input"])
    groups = int(a["num_groups"])
    given = t.dims[x][1]
    expression: Dim = ((None, groups),)
    if groups > 1:
        each = t.axes.size(given) // groups
        whole = t.axes.blocks(given, each)
        if whole is None:
            t.axes.fix(given, f"feeds {t.where()}, whose groups cut across it")
        else:
            expression = tuple((axis, repeat // each) for axis, repeat in whole)
    return _grouped(t, a, x, expression)


def _grouped(t: _Tracing, a: dict[str, Any], x: str, groups: Dim) -> str:
    """A group norm of `x` whose number of groups follows from a dimension."""
    spans = (t.dims[x][1],)
    held = {"weight": (t.held(a["weight"]), spans), "bias": (t.held(a["bias"]), spans)}
    values = {"groups": _Spans(groups), "eps": float(a["eps"])}
    return t.add("group_norm", (x,), t.dims[x], held, values)


def _instance_norm(t: _Tracing, a: dict[str, Any]) -> str:
    if not a["use_input_stats"]:
        raise t._error("uses running statistics: use track_running_stats=False")
    x = t.read(a["input"])
    return _grouped(t, a, x, t.dims[x][1])


def _layer_norm(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["input"])
    count = len(a["normalized_shape"])
    spans = t.dims[x][-count:]
    held = {"weight": (t.held(a["weight"]), spans), "bias": (t.held(a["bias"]), spans)}
    return t.add("layer_norm", (x,), t.dims[x], held, {"dimensions": count, "eps": float(a["eps"])})


def _prelu(t: _Tracing, a: dict[str, Any]) -> str:
    x, weight = t.read(a["self"]), t.held(a["weight"])
    assert weight is not None
    shared = t.tensors[weight].numel() == 1
    spans: Sequence[Dim] = [((None, 1),)] if shared else [t.dims[x][1]]
    return t.add("prelu", (x,), t.dims[x], {"weight": (weight, spans)}, {})


def _same(op: str, **attributes: tuple[str, Any]) -> Rule:
    """An operation that keeps every dimension; `attributes` are (argument's name, type)."""

    def rule(t: _Tracing, a: dict[str, Any]) -> str:
        x = t.read(a.get("self", a.get("input")))
        values = {key: kind(a[name]) for key, (name, kind) in attributes.items()}
        return t.add(op, (x,), t.dims[x], {}, values)

    return rule


def _softmax(op: str) -> Rule:
    def rule(t: _Tracing, a: dict[str, Any]) -> str:
        x = t.read(a["self"])
        dim = int(a["dim"]) % len(t.dims[x])
        if t.dims[x][dim] == ((ax.BATCH, 1),):
            raise BatchMixed
        return t.add(op, (x,), t.dims[x], {}, {"dim": dim})

    return rule


def _elu(t: _Tracing, a: dict[str, Any]) -> str:
    if a["scale"] != 1 or a["input_scale"] != 1:
        raise t._error("is a scaled ELU")
    x = t.read(a["self"])
    return t.add("elu", (x,), t.dims[x], {}, {"alpha": float(a["alpha"])})


def _arithmetic(op: str, flipped: bool = False) -> Rule:
    def rule(t: _Tracing, a: dict[str, Any]) -> str:
        if a.get("alpha", 1) != 1 or a.get("rounding_mode"):
            raise t._error("has a factor or a rounding mode")
        one, other = a["self"], a["other"]
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            number, value = (one, other) if isinstance(other, fx.Node) else (other, one)
            x = t.read(value)
            first = (number is one) != flipped
            values = {"number": float(number), "reversed": first}
            return t.add(f"{op}_number", (x,), t.dims[x], {}, values)
        left, right = t.read(one), t.read(other)
        if flipped:
            left, right = right, left
        return t.add(op, (left, right), _broadcast(t, left, right), {}, {})

    return rule


def _broadcast(t: _Tracing, left: str, right: str) -> list[Dim]:
    a, b = list(t.dims[left]), list(t.dims[right])
    ones: list[Dim] = [((None, 1),)]
    a, b = ones * (len(b) - len(a)) + a, ones * (len(a) - len(b)) + b
    made: list[Dim] = []
    for one, other in zip(a, b, strict=True):
        sizes = t.axes.size(one), t.axes.size(other)
        if sizes[0] == sizes[1]:
            made.append(
                t.axes.unite(one, other, f"is joined with another kind of axis in {t.where()}")
            )
        else:
            made.append(one if sizes[1] == 1 else other)
    return made


def _cat(t: _Tracing, a: dict[str, Any]) -> str:
    names = [t.read(value) for value in a["tensors"]]
    if len(names) == 1:
        return names[0]
    dim = t.channels(names[0], a["dim"])
    made = list(t.dims[names[0]])
    for name in names[1:]:
        for place, other in enumerate(t.dims[name]):
            if place == dim:
                if other == ((ax.BATCH, 1),):
                    raise BatchMixed
                made[dim] = (*made[dim], *other)
            else:
                made[place] = t.axes.unite(made[place], other, f"is joined in {t.where()}")
    return t.add("cat", names, made, {}, {"dim": dim})


def _pool(op: str, count: int) -> Rule:
    def rule(t: _Tracing, a: dict[str, Any]) -> str:
        x = t.read(a["self"])
        if a.get("divisor_override") is not None:
            raise t._error("has a divisor_override")
        kernel = _pair(a["kernel_size"], count)
        values = {
            "kernel": kernel,
            "stride": _pair(a["stride"], count) if a["stride"] else kernel,
            "padding": _pair(a["padding"], count),
            "ceil_mode": bool(a["ceil_mode"]),
        }
        if op == "max_pool":
            values["dilation"] = _pair(a["dilation"], count)
        else:
            values["count_include_pad"] = bool(a["count_include_pad"])
        return t.add(op, (x,), (*t.dims[x][:2], *_constants(t.node, 2)), {}, values)

    return rule


def _adaptive(op: str, count: int) -> Rule:
    def rule(t: _Tracing, a: dict[str, Any]) -> str:
        x = t.read(a["self"])
        size = _shape(t.node)[-count:]
        return t.add(op, (x,), (*t.dims[x][:2], *_constants(t.node, 2)), {}, {"size": size})

    return rule


def _mean(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["self"])
    rank = len(t.dims[x])
    places = sorted(int(dim) % rank for dim in (a.get("dim") or range(rank)))
    if any(t.dims[x][place] == ((ax.BATCH, 1),) for place in places):
        raise BatchMixed
    made: list[Dim] = []
    for place, dim in enumerate(t.dims[x]):
        if place not in places:
            made.append(dim)
        elif a["keepdim"]:
            made.append(((None, 1),))
    return t.add("mean", (x,), made, {}, {"dims": tuple(places), "keepdim": bool(a["keepdim"])})


def _resize(mode: str) -> Rule:
    def rule(t: _Tracing, a: dict[str, Any]) -> str:
        x = t.read(a["input"] if "input" in a else a["self"])
        values = {
            "size": _shape(t.node)[2:],
            "mode": mode,
            "align_corners": bool(a.get("align_corners", False)),
        }
        return t.add("resize", (x,), (*t.dims[x][:2], *_constants(t.node, 2)), {}, values)

    return rule


def _pad(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["self"])
    pads = [int(p) for p in a["pad"]]
    mode, value = a.get("mode", "constant"), a.get("value") or 0.0
    made = list(t.dims[x])
    for place in range(len(pads) // 2):
        dim = len(made) - 1 - place
        before, after = pads[2 * place : 2 * place + 2]
        if not before and not after:
            continue
        if made[dim] == ((ax.BATCH, 1),):
            raise BatchMixed
        if before < 0 or after < 0 or mode != "constant":
            t.axes.fix(made[dim], f"is padded by {mode} in {t.where()}")
            made[dim] = ((None, t.axes.size(made[dim]) + before + after),)
        else:
            made[dim] = tuple(
                part for part in ((None, before), *made[dim], (None, after)) if part != (None, 0)
            )
    values = {"pad": tuple(pads), "mode": mode, "value": float(value)}
    return t.add("pad", (x,), made, {}, values)


def _reshape(t: _Tracing, a: dict[str, Any]) -> str:
    """view, reshape, flatten, squeeze, unsqueeze: runs of dimensions merged or split."""
    x = t.read(a["self"] if "self" in a else a["input"])
    given, wanted = list(t.dims[x]), list(_shape(t.node))
    sizes = [t.axes.size(dim) for dim in given]
    made: list[Dim] = []
    i = j = 0
    while i < len(given) or j < len(wanted):
        if i < len(given) and j < len(wanted) and sizes[i] == wanted[j]:
            made.append(given[i])
            i, j = i + 1, j + 1
            continue
        if j < len(wanted) and wanted[j] == 1:
            made.append(((None, 1),))
            j += 1
            continue
        if i < len(given) and sizes[i] == 1:
            i += 1
            continue
        first, second = i, j
        left, right = sizes[i], wanted[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * sizes[i], i + 1
            else:
                right, j = right * wanted[j], j + 1
        if any(dim == ((ax.BATCH, 1),) for dim in given[first:i]):
            raise BatchMixed
        why = f"is reshaped across channels in {t.where()}"
        if j - second == 1:
            made.append(t.axes.merge(given[first:i], why))
        else:
            made += t.axes.split(t.axes.merge(given[first:i], why), wanted[second:j], why)
    return t.add("reshape", (x,), made, {}, {"shape": _SpansOf(made)})


def _permute(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["self"])
    rank = len(t.dims[x])
    if "dims" in a:
        order = [int(dim) % rank for dim in a["dims"]]
    else:
        order = list(range(rank))
        i, j = int(a.get("dim0", 0)) % rank, int(a.get("dim1", 1)) % rank
        order[i], order[j] = order[j], order[i]
    return t.add(
        "permute", (x,), [t.dims[x][place] for place in order], {}, {"order": tuple(order)}
    )


def _expand(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["self"])
    wanted = _shape(t.node)
    given = [((None, 1),)] * (len(wanted) - len(t.dims[x])) + list(t.dims[x])
    made: list[Dim] = []
    for dim, size in zip(given, wanted, strict=True):
        made.append(dim if t.axes.size(dim) == size else ((None, size),))
    return t.add("expand", (x,), made, {}, {"shape": _SpansOf(made)})


def _cut(t: _Tracing, x: str, dim: int, start: int, end: int, step: int) -> str:
    given = t.dims[x][dim]
    if given == ((ax.BATCH, 1),):
        raise BatchMixed
    why = f"is cut in {t.where()}"
    if step != 1:
        t.axes.fix(given, why)
    before, inside = t.axes.take(given, start, end, why)
    made = list(t.dims[x])
    length = inside
    if step != 1:
        made[dim] = ((None, -(-(end - start) // step)),)
    else:
        made[dim] = inside
    values = {
        "dim": dim,
        "start": _Spans(before or ((None, 0),)),
        "length": _Spans(length),
        "step": step,
    }
    return t.add("slice", (x,), made, {}, values)


def _slice(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["self"])
    dim = t.channels(x, int(a["dim"]))
    size = t.axes.size(t.dims[x][dim])
    if "length" in a:
        start = int(a["start"]) % size
        end = start + int(a["length"])
    else:
        start, end, _ = slice(a["start"], a["end"]).indices(size)
    step = int(a.get("step", 1))
    if (start, end, step) == (0, size, 1):
        return x
    return _cut(t, x, dim, start, end, step)


def _split(t: _Tracing, a: dict[str, Any]) -> str:
    """chunk, split: each part a slice of its own."""
    x = t.read(a["self"])
    dim = t.channels(x, int(a["dim"]))
    sizes = [int(value.shape[dim]) for value in t.node.meta["val"]]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = [_cut(t, x, dim, end - size, end, 1) for size, end in zip(sizes, ends, strict=True)]
    key = f"parts:{t.node.name}"
    t.parts[key] = parts
    return key


def _select(t: _Tracing, a: dict[str, Any]) -> str:
    x = t.read(a["self"])
    dim = t.channels(x, int(a["dim"]))
    size = t.axes.size(t.dims[x][dim])
    start = int(a["index"]) % size
    cut = _cut(t, x, dim, start, start + 1, 1)
    made = [each for place, each in enumerate(t.dims[cut]) if place != dim]
    return t.add("reshape", (cut,), made, {}, {"shape": _SpansOf(made)})


RULES: dict[str, Rule] = {
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
    "relu": _same("relu"),
    "relu6": _same("relu6"),
    "leaky_relu": _same("leaky_relu", negative_slope=("negative_slope", float)),
    "elu": _elu,
    "gelu": _same("gelu", approximate=("approximate", str)),
    "silu": _same("silu"),
    "mish": _same("mish"),
    "hardswish": _same("hardswish"),
    "hardsigmoid": _same("hardsigmoid"),
    "hardtanh": _same("hardtanh", min_val=("min_val", float), max_val=("max_val", float)),
    "sigmoid": _same("sigmoid"),
    "tanh": _same("tanh"),
    "softplus": _same("softplus", beta=("beta", float), threshold=("threshold", float)),
    "exp": _same("exp"),
    "neg": _same("neg"),
    "softmax": _softmax("softmax"),
    "log_softmax": _softmax("log_softmax"),
    "add": _arithmetic("add"),
    "sub": _arithmetic("sub"),
    "rsub": _arithmetic("sub", flipped=True),
    "mul": _arithmetic("mul"),
    "div": _arithmetic("div"),
    "cat": _cat,
    "concat": _cat,
    "max_pool1d": _pool("max_pool", 1),
    "max_pool2d": _pool("max_pool", 2),
    "avg_pool1d": _pool("avg_pool", 1),
    "avg_pool2d": _pool("avg_pool", 2),
    "adaptive_avg_pool1d": _adaptive("adaptive_avg_pool", 1),
    "adaptive_avg_pool2d": _adaptive("adaptive_avg_pool", 2),
    "adaptive_max_pool1d": _adaptive("adaptive_max_pool", 1),
    "adaptive_max_pool2d": _adaptive("adaptive_max_pool", 2),
    "mean": _mean,
    "upsample_nearest2d": _resize("nearest"),
    "upsample_bilinear2d": _resize("bilinear"),
    "pad": _pad,
    "constant_pad_nd": _pad,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "squeeze": _reshape,
    "unsqueeze": _reshape,
    "permute": _permute,
    "transpose": _permute,
    "t": _permute,
    "expand": _expand,
    "slice": _slice,
    "narrow": _slice,
    "select": _select,
    "chunk": _split,
    "split": _split,
    "split_with_sizes": _split,
}
