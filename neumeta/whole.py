"""Whether a file is whole and of what was asked for: an architecture, a dtype and a format.

Needs the graph and the wire format; knows no service.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from neumeta import onnx
from neumeta.failure import PullError
from neumeta.notation import BadGraph, sized
from neumeta.plan import Part, layout

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
"""By dtype, what safetensors calls it."""
FORMATS = ("safetensors", "onnx")


def check_file(path: Path, arch: str = "", dtype: str = "", file_format: str = "") -> None:
    """Raise PullError unless this is a whole file of this architecture, dtype and format (or of any):
    the tensors of the graph in its metadata, at the depth and channels stated there, and in a
    safetensors file one after the other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if not file_format:
            file_format = FORMATS[file.read(9)[8:] != b"{"]
            file.seek(0)
        try:
            if file_format == "onnx":
                wrong = _held(*onnx.contents(file, size), arch, dtype)
            else:
                wrong = _checked(file, size, arch, dtype)
        except BadGraph as error:
            raise PullError(f"what arrived is no network: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            what = "is no whole ONNX model" if file_format == "onnx" else "has a broken header"
            raise PullError(f"what arrived {what}") from None
    if wrong:
        raise PullError(f"what arrived is not what was asked for: {wrong}")


def _checked(file: BinaryIO, size: int, arch: str, dtype: str) -> str:
    """What is wrong with a safetensors file, if anything."""
    count = int.from_bytes(file.read(8), "little")
    if size < 8 or count > size - 8:
        raise PullError("what arrived is no safetensors file")
    end, wrong = _laid_out(json.loads(file.read(count)), arch, dtype)
    if not wrong and 8 + count + end != size:
        raise PullError("what arrived does not have the length its header states")
    return wrong


def _held(
    about: Mapping[str, Any], tensors: Mapping[str, onnx.Tensor], arch: str, dtype: str
) -> str:
    """What is wrong with an ONNX model of these tensors, if anything."""
    if wrong := _other(about, arch):
        return wrong
    kinds = {name: kind for name, (kind, _, _) in tensors.items()}
    for part in _parts(about, kinds, onnx.TYPES, dtype):
        if part.name not in tensors:
            return f"{part.name} is missing"
        if tensors[part.name] != (onnx.TYPES[part.dtype], part.shape, part.bytes):
            kind, shape, _ = tensors[part.name]
            return f"{part.name} is type {kind} {shape}, not {part.dtype} {part.shape}"[:160]
    return ""


def _parts(
    about: Mapping[str, Any], kinds: Mapping[str, object], codes: Mapping[str, object], dtype: str
) -> list[Part]:
    """What is to lie in a file of this dtype; without one, of that which most of its tensors, whose
    types are `kinds`, are made of."""
    graph, sizes = sized(about)
    if not dtype:
        given = {kinds[name] for name in graph.tensors if name in kinds}
        # Beside int8 there is float32.
        dtype = next((each for each in [*codes][::-1] if codes[each] in given), "float32")
    return layout(graph, sizes, dtype)[0]


def _other(about: Mapping[str, Any], arch: str) -> str:
    # A named depth, as resnet32 is of resnet20, is a file of that manifold.
    other = arch and arch not in (about["arch"], *about.get("names", ()))
    return f"it is {ascii(about['arch'])[:60]}" if other else ""


def _laid_out(header: dict[str, Any], arch: str, dtype: str) -> tuple[int, str]:
    """How many bytes of tensors a header lays out, and what is wrong with it, if anything."""
    about = json.loads(header.pop("__metadata__")["neumeta"])
    if wrong := _other(about, arch):
        return 0, wrong
    offset, kinds = 0, {name: entry["dtype"] for name, entry in header.items()}
    for part in _parts(about, kinds, CODES, dtype):
        name, wanted = part.name, list(part.shape)
        if name not in header:
            return 0, f"{name} is missing"
        entry, code = header.pop(name), CODES[part.dtype]
        if entry["dtype"] != code or entry["shape"] != wanted:
            given = f"{entry['dtype']} {entry['shape']}"[:80]
            return 0, f"{name} is {given}, not {code} {wanted}"
        if entry["data_offsets"] != [offset, offset + part.bytes]:
            return 0, f"{name} is not where its shape puts it"
        offset += part.bytes
    return offset, f"there is a tensor {ascii(next(iter(header)))[:60]}" if header else ""
