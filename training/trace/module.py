"""A torch.nn.Module -> a graph: torch.export's program, operation by operation.

`rules.py` says which operation of the closed set an ATen call is and what it does to axes. What has no
rule is refused by the name of the module that calls it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from neumeta.graph import BATCH, Axis, Graph, Node
from neumeta.graph import Dim as GraphDim
from training.trace import axes as ax
from training.trace.axes import BatchMixed, Dim
from training.trace.call import TraceError, arguments, kind, shape_of
from training.trace.groups import name_axes
from training.trace.rules import RULES
from training.trace.stages import find_stages
from training.trace.tracing import EXAMPLES, Spans, SpansOf, Tracing

NOTHING = {"dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach", "alias"}
NOTHING |= {"lift_fresh_copy", "detach_", "dropout_", "feature_dropout_", "_to_copy", "to"}
VIEWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose", "slice"}
VIEWS |= {"expand", "chunk", "split", "split_with_sizes", "select", "t", "narrow"}


def trace(
    module: nn.Module, example: Tensor, *, groups: Sequence[str] = ()
) -> tuple[Graph, dict[str, str]]:
    """The graph of a module that takes a batch of images, and why some axes keep their size.

    `example` is (N, C, H, W) of any N; `groups` are patterns over axis names, one group of widths
    each (none: one for each block of the module tree). The second value maps the module that makes an
    axis to the reason why the axis does not morph.

    Raises TraceError, which names the module's node.
    """
    return _Pass(module, example).graph(groups)


class _Pass:
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
        containers = {name for name, each in module.named_modules() if len(each._modules)}
        # A plain ModuleList or ModuleDict only holds its children: it does not run them in turn.
        self.lists = {
            name
            for name, each in module.named_modules()
            if isinstance(each, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
            and type(each) not in (nn.ModuleList, nn.ModuleDict)
        }
        self.base: dict[str, str] = {}  # a view -> what it is a view of
        self.later: dict[str, int] = {}  # fx name -> place of its last reader
        self.so_far = Tracing(containers)

    # --- the pass -------------------------------------------------------------------------------

    def graph(self, groups: Sequence[str]) -> tuple[Graph, dict[str, str]]:
        t = self.so_far
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
            t.node = node
            if node.op == "placeholder":
                if node.name in held:
                    name = held[node.name]
                    t.values[node.name] = f"tensor:{name}"
                    t.tensors[name] = state[name]
                    continue
                images += 1
                if images > 1:
                    raise TraceError(
                        f"the module takes {images} inputs: one batch of images is read"
                    )
                t.values[node.name] = "input"
                shape = shape_of(node)
                t.dims["input"] = (
                    ((ax.BATCH, 1),),
                    *(((None, size),) for size in shape[1:]),
                )
            elif node.op == "output":
                outputs = self._outputs(node)
            else:
                self._call(node, place)
        return self._finished(outputs, groups)

    def _call(self, node: fx.Node, place: int) -> None:
        t = self.so_far
        called = kind(node)
        if node.target.__class__.__name__ == "builtin_function_or_method" and called == "getitem":
            source, index = node.args
            whole = t.values[source.name]  # type: ignore
            if whole not in t.parts and index and node.users:
                raise t.error("reads where the largest values were")
            t.values[node.name] = t.parts[whole][index] if whole in t.parts else whole  # type: ignore
            return
        given = arguments(node)
        if called in NOTHING:
            read = node.args[0]
            assert isinstance(read, fx.Node)
            if given.get("train") or given.get("training"):
                raise t.error("still drops in eval mode")
            t.values[node.name] = t.values[read.name]
            return
        plain = called.removesuffix("_") if called not in ("sub_", "add_") else called[:-1]
        rule = RULES.get(plain)
        if rule is None:
            raise t.error(
                "is not among the operations that can be served (docs/graph.md lists them): replace"
                " it, or move it out of the module"
            )
        try:
            made = rule(t, given)
        except BatchMixed:
            raise t.error("mixes the images of a batch with each other") from None
        t.values[node.name] = made
        if isinstance(made, str) and made in t.dims:
            expected = shape_of(node)
            found = tuple(t.axes.size(dim) for dim in t.dims[made])
            if found != expected:
                raise t.error(f"gives {expected}, where its rule says {found}")
        if called.endswith("_") and node.args and isinstance(node.args[0], fx.Node):
            self._in_place(node.args[0], made, place)
        first = node.args[0] if node.args else None
        if plain in VIEWS and isinstance(first, fx.Node):
            self.base[node.name] = self.base.get(first.name, first.name)

    def _in_place(self, changed: fx.Node, made: str, place: int) -> None:
        """What is read of the changed value from now on is the result."""
        t = self.so_far
        base = self.base.get(changed.name)
        if base is not None and self.later.get(base, -1) > place:
            raise t.error("changes a view in place, whose base is read later")
        t.values[changed.name] = made

    def _outputs(self, node: fx.Node) -> list[tuple[str, str]]:
        t = self.so_far
        flat = node.args[0]
        assert isinstance(flat, (tuple, list))
        spec = self.program.call_spec.out_spec
        keys = _keys(spec, len(flat))
        found = []
        for key, value in zip(keys, flat, strict=True):
            if not isinstance(value, fx.Node) or t.values[value.name] not in t.dims:
                raise TraceError(f"the module's output {key or 'value'} is no computed tensor")
            name = t.values[value.name]
            for dim in t.dims[name]:
                if dim != ((ax.BATCH, 1),):
                    t.axes.fix(dim, "is an output of the network")
            found.append((key, name))
        return found

    # --- the graph ------------------------------------------------------------------------------

    def _finished(
        self, outputs: list[tuple[str, str]], groups: Sequence[str]
    ) -> tuple[Graph, dict[str, str]]:
        t = self.so_far
        needed = {name for _, name in outputs}
        kept: list[dict[str, Any]] = []
        for node in reversed(t.nodes):
            if node["name"] in needed:
                kept.append(node)
                needed |= set(node["inputs"])
        kept.reverse()
        spans = [t.dims[node["name"]] for node in kept]
        used = dict.fromkeys(name for node in kept for name in node["tensors"].values())
        spans += [t.tensor_dims[name] for name in used]
        roots = dict.fromkeys(
            axis for dims in spans for dim in dims for axis, _ in t.axes.now(dim) if axis
        )
        morphing = [axis for axis in roots if not t.axes.fixed(axis)]
        notes = {t.axes.makers(axis)[0]: t.axes.fixed(axis) for axis in roots if t.axes.fixed(axis)}
        named = name_axes(
            {axis: t.axes.makers(axis) for axis in morphing},
            groups,
            containers=self.lists,
            positions=t.positions,
        )
        names = {axis: name for axis, (name, _) in named.items()}

        def final(dim: Dim) -> GraphDim:
            found: list[tuple[str, int]] = []
            for part in t.axes.now(dim):
                axis, repeat = part
                if axis == ax.BATCH:
                    found.append((BATCH, repeat))
                elif axis in names:
                    found.append((names[axis], repeat))
                elif found and not found[-1][0]:
                    found[-1] = ("", found[-1][1] + t.axes.count(part))
                else:
                    found.append(("", t.axes.count(part)))
            return tuple(found)

        def attribute(value: Any) -> Any:
            if isinstance(value, Spans):
                return final(value.dim)
            if isinstance(value, SpansOf):
                return tuple(final(dim) for dim in value.dims)
            return tuple(value) if isinstance(value, (list, tuple)) else value

        nodes = tuple(
            Node(
                node["name"],
                node["op"],
                node["inputs"],
                node["tensors"],
                {key: attribute(value) for key, value in node["attributes"].items()},
                tuple(final(dim) for dim in t.dims[node["name"]]),
                node["module"],
            )
            for node in kept
        )
        graph = Graph(
            tuple(final(dim) for dim in t.dims["input"]),
            {name: Axis(t.axes.length(axis), group) for axis, (name, group) in named.items()},
            {name: tuple(final(dim) for dim in t.tensor_dims[name]) for name in used},
            nodes,
            tuple(outputs),
        )
        return find_stages(graph), notes


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def _keys(spec: Any, count: int) -> list[str]:
    """The keys of a module's outputs: '' for a tensor alone, places of a tuple, keys of a dict."""
    paths = torch.utils._pytree.tree_flatten_with_path(
        torch.utils._pytree.tree_unflatten(list(range(count)), spec)
    )[0]
    return [
        ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in paths
    ]
