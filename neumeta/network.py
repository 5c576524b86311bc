"""The plain torch.nn.Module a device runs, and loading one from a pulled file.

Knows nothing of manifolds, INRs or the service: a pulled safetensors file and this module are all
a device needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

try:
    import torch
except ModuleNotFoundError:
    told = "neumeta.network runs networks on torch: pip install 'neumeta-serve[torch]'"
    raise ModuleNotFoundError(told, name="torch") from None
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from neumeta.graph import Graph, Sizes
from neumeta.notation import sized
from neumeta.plan import scaled
from neumeta.program import Outputs, Program
from neumeta.shapes import check

MOST_LEVELS = 64
"""How deep a module may lie in a network."""

Module = TypeVar("Module", bound=nn.Module)


class Network(nn.Module):
    """A graph whose axes have these sizes, with its own parameters.

    The input is (N, C, ...): floats, raw pixels in [0, 1] when `normalise` was called, else already
    normalised; or uint8 pixels, which become [0, 1] first. The output is what the user's own module
    gave: logits (N, classes), or a tuple or dict of tensors.

    The normalisation is part of `state_dict()`. Tensors without one (a pulled file's) load too, and
    leave the module's own as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, graph: Graph, sizes: Sizes, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """With these tensors as parameters, or (None) with room for them."""
        super().__init__()
        self.program = Program(graph, sizes)
        self.shape = tuple(sum(repeat for _, repeat in dim) for dim in graph.input[1:])
        self.channels = self.shape[0]
        around = (self.channels, *[1] * (len(self.shape) - 1))
        self.register_buffer("mean", torch.zeros(around))
        self.register_buffer("std", torch.ones(around))
        self.tensor_names = tuple(graph.tensors)
        for name in graph.tensors:
            *parents, last = name.split(".")
            if name in self._buffers or len(parents) > MOST_LEVELS:
                raise ValueError(f"tensor {name[:80]}: this name cannot be held")
            shape = graph.shape(name, sizes)
            held = torch.empty(shape) if tensors is None else tensors[name]
            _inside(self, parents)._parameters[last] = nn.Parameter(held)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("mean", "std"):
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take raw pixels in [0, 1] from now on: subtract `mean`, divide by `std`, per channel.

        Raises ValueError unless there is one finite number per channel, those of `std` above 0.
        """
        for name, given in (("mean", mean), ("std", std)):
            if len(given) != self.channels or not all(map(math.isfinite, given)):
                raise ValueError(f"{name}: {list(given)} is not {self.channels} finite numbers")
        if min(std) <= 0:
            raise ValueError(f"std: {list(std)} is not above 0")
        shape, held = self.mean.shape, self._buffers
        # Not by assignment: the network may have a module of its own called `mean`.
        held["mean"] = self.mean.new_tensor(mean).view(shape)
        held["std"] = self.std.new_tensor(std).view(shape)

    def pixels(self, x: Tensor) -> Tensor:
        """Images in the module's own precision; uint8 ones scaled to [0, 1].

        Raises ValueError for what is no batch of images with the module's number of channels.
        """
        # A trace holds what one example did: these questions would only be asked while it is made.
        if not torch._C._is_tracing():
            wanted = f"images (N, {self.channels}, height, width), floats in [0, 1] or uint8"
            if not isinstance(x, Tensor):
                raise ValueError(f"expected a tensor of {wanted}, got {type(x).__name__}")
            if not x.is_floating_point() and x.dtype != torch.uint8:
                raise ValueError(f"expected {wanted}, got {x.dtype}")
            if x.dim() == len(self.shape) and x.shape[0] == self.channels:
                raise ValueError(
                    f"expected {wanted}, got one image {tuple(x.shape)}: the batch dimension is"
                    " missing, images[None] adds it"
                )
            if x.dim() != len(self.shape) + 1 or x.shape[1] != self.channels:
                raise ValueError(f"expected {wanted}, got shape {tuple(x.shape)}")
        scaled = x.dtype == torch.uint8
        x = x.to(next(self.parameters(), self.mean).dtype)
        return x / 255 if scaled else x

    def forward(self, x: Tensor) -> Outputs:
        """The network's outputs for a batch of images.

        Raises ValueError for what is no batch of images (see `pixels`).
        """
        return self.program.run(self.tensors(), (self.pixels(x) - self.mean) / self.std)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the graph by name, as this module holds it."""
        found: dict[str, Tensor] = {}
        for name in self.tensor_names:
            *parents, last = name.split(".")
            parameter = _inside(self, parents)._parameters[last]
            assert parameter is not None
            found[name] = parameter
        return found


def _inside(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module at this path, made where it is not there.

    Not by attribute: a network's own names may be those of `Network` and `nn.Module`.
    """
    for name in names:
        found = module._modules.get(name)
        if found is None:
            found = module._modules[name] = nn.Module()
        module = found
    return module


@overload
def load(path: str | Path) -> Network: ...
@overload
def load(path: str | Path, into: Module) -> Module: ...


def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """A ready network in eval mode from a file pulled from the service.

    Without `into`, the file's own graph is run: no code of whoever trained it is needed, and raw pixels
    in [0, 1], or uint8 ones, are read. With `into`, the user's own module of the same size is filled
    instead and returned: its batch norms become the identity where they were folded, and its input is
    normalised images, as in training (`contract(path)` has the mean and std).

    Raises ValueError, naming the file and what is wrong, if it is no whole network or does not fit;
    FileNotFoundError if it is not there.
    """
    about, weights = _read(Path(path))
    try:
        graph, sizes = sized(about)
        _restore(weights, graph, sizes)
        _fitting(weights, {name: graph.shape(name, sizes) for name in graph.tensors})
        check(graph, sizes)
        if into is not None:
            return fill(into, graph, weights).eval()
        net = Network(graph, sizes, weights)
        # A network of nothing but activations has no tensors.
        net.to(next((weight.dtype for weight in weights.values()), torch.float32))
        net.normalise(_numbers(about, "mean"), _numbers(about, "std"))
    except ValueError as error:
        raise ValueError(f"{path}: not a network this version can run: {error}") from None
    return net.eval().requires_grad_(False)


def contract(path: str | Path) -> dict[str, Any]:
    """What a pulled file says of itself: arch, depth, channels, mean, std, task and classes.

    Raises ValueError if it is no network, FileNotFoundError if it is not there.
    """
    about, _ = _read(Path(path))
    return {key: value for key, value in about.items() if key != "graph"}


@torch.no_grad()
def fill(module: nn.Module, graph: Graph, weights: Mapping[str, Tensor]) -> nn.Module:
    """The user's own module with the tensors of this folded graph; its batch norms do nothing more.

    Raises ValueError naming what the module lacks or has in another shape.
    """
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    pairs: list[tuple[Tensor, Tensor]] = []

    def put(name: str, value: Tensor) -> None:
        if name not in held:
            raise ValueError(f"tensor {name} is no part of {type(module).__name__}")
        if held[name].shape != value.shape:
            mine, given = tuple(held[name].shape), tuple(value.shape)
            raise ValueError(
                f"tensor {name} is {mine} in {type(module).__name__}, {given} in the file"
            )
        pairs.append((held[name], value))

    for node in graph.nodes:
        norm = node.attributes.get("norm")
        rest = dict(node.tensors)
        if norm:
            scale = weights[rest["weight"]] if node.op == "affine" else None
            shift = weights[rest.pop("bias")]
            if scale is not None:
                rest.pop("weight")
            _identity(module, norm, scale, shift, put, held)
            if node.op != "affine" and node.tensors["bias"] in held:
                put(node.tensors["bias"], torch.zeros_like(shift))
        for name in rest.values():
            put(name, weights[name])
    # All of them or none.
    for mine, given in pairs:
        mine.copy_(given)
    return module


def _identity(
    module: nn.Module,
    norm: str,
    scale: Tensor | None,
    shift: Tensor,
    put: Any,
    held: Mapping[str, Tensor],
) -> None:
    """Make a batch norm add `shift`, and multiply by `scale` where there is one."""
    try:
        eps = float(module.get_submodule(norm).eps)  # type: ignore[arg-type]
    except AttributeError:
        raise ValueError(f"{norm} is no batch norm of {type(module).__name__}") from None
    factor = torch.ones_like(shift) if scale is None else scale
    mean, variance = torch.zeros_like(shift), torch.full_like(shift, 1 - eps)
    if f"{norm}.weight" in held:
        put(f"{norm}.weight", factor)
        put(f"{norm}.bias", shift)
    elif (factor > 0).all():
        mean, variance = -shift / factor, factor.double().pow(-2).sub(eps).to(factor)
    else:
        raise ValueError(f"{norm} has no weight of its own to hold a negative scale")
    put(f"{norm}.running_mean", mean)
    put(f"{norm}.running_var", variance)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `neumeta` metadata and the tensors of a file."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a network's file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no regular file")
    with path.open("rb") as raw:
        head = raw.read(9)
    # safetensors has its header's length first, which may look like either, and then the header.
    if head[8:] != b"{" and head.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path}: a torch or pickle file; a network is a safetensors file")
    if head[8:] != b"{" and head.startswith(b"\x08"):
        raise ValueError(f"{path}: an ONNX model, for ONNX Runtime; load reads safetensors files")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            floats = {kind for kind in kinds.values() if kind in ("F16", "BF16", "F32", "F64")}
            rest = set(kinds.values()) - floats
            if len(floats) > 1 or (rest and (rest, floats) != ({"I8"}, {"F32"})):
                raise ValueError(
                    f"{path}: not a network: its tensors are not all of one float type, or int8 and"
                    " float32"
                )
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: empty, cut short or damaged: {error}") from None
    if "neumeta" not in metadata:
        raise ValueError(f"{path}: no NeuMeta network (its metadata has no 'neumeta' key)")
    try:
        about = json.loads(metadata["neumeta"])
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: its metadata 'neumeta' is not JSON") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path}: its metadata 'neumeta' is not a JSON object")
    if "representation" in about:
        raise ValueError(f"{path}: a manifold, not a network: neumeta-serve makes networks of it")
    return about, weights


def _restore(weights: dict[str, Tensor], graph: Graph, sizes: Sizes) -> None:
    """Make int8 tensors float32 by their scales, which are then no more.

    Raises ValueError for one without scales of its shape, or that is no weight.
    """
    planned = scaled(graph, sizes, "int8")
    for name in [name for name, tensor in weights.items() if tensor.dtype == torch.int8]:
        if name not in planned:
            raise ValueError(f"tensor {name} is int8, and has no scales")
        numbers, own = weights[name], planned[name]
        factors = weights.pop(own.name, None)
        wanted = own.shape(tuple(numbers.shape))
        if factors is None or tuple(factors.shape) != wanted:
            given = "missing" if factors is None else f"{tuple(factors.shape)}"
            raise ValueError(f"tensor {own.name} is {given} where {wanted} is expected")
        weights[name] = numbers.float() * factors


def _fitting(weights: Mapping[str, Tensor], planned: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not those of this architecture, before any of it is made."""
    for name, dimensions in planned.items():
        if name not in weights:
            raise ValueError(f"tensor {name} is missing")
        if tuple(weights[name].shape) != dimensions:
            given = tuple(weights[name].shape)
            raise ValueError(f"tensor {name} is {given} where {dimensions} is expected")
    if extra := sorted(set(weights) - set(planned)):
        raise ValueError(f"tensor {extra[0]} is no part of it")


def _numbers(about: dict[str, Any], key: str) -> list[float]:
    given = about.get(key)
    if not isinstance(given, list) or not all(type(each) in (int, float) for each in given):
        raise ValueError(f"{key}: {str(given)[:80]} is not a list of numbers")
    return given
