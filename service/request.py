"""What a client may ask, strictly: a JSON body or a query string -> one WeightsRequest.

Knows types and bounds that hold for every manifold; what a manifold covers is `engine.py`'s.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import QueryParams

from service.problem import Problem, field, refuse

Factor = Annotated[float, Field(gt=0, le=2, allow_inf_nan=False, strict=True)]
Blocks = Annotated[int, Field(ge=1, le=64, strict=True)]
Group = Annotated[str, Field(min_length=1, max_length=512)]
Count = Annotated[int, Field(ge=1, le=1 << 62, strict=True)]

MOST = 64
"""Groups that a width, or stages that a depth, may list."""
ALLOWED = {
    "arch": "the name of a served architecture (GET /models lists them)",
    "width": "a number more than 0 and at most 2, a list of 1 to 64 of them, one per group, or an"
    " object of them by group (in a query 'group:number,group:number')",
    "depth": "a list of 1 to 64 whole numbers from 1 to 64",
    "dtype": "'float32', 'float16', 'bfloat16' or 'int8'",
    "format": "'safetensors' or 'onnx'",
    "samples": "a whole number of at least 1",
    "seed": "a whole number from 0 to 2^53",
    "extrapolate": "true or false",
    "budget": "one of {'max_params': n}, {'max_bytes': n}, {'max_macs': n}, instead of a width",
}


class Budget(BaseModel):
    """The largest network that fits: exactly one bound."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_params: Count | None = None
    max_bytes: Count | None = None
    max_macs: Count | None = None


class WeightsRequest(BaseModel):
    """The body of POST /weights and POST /plan."""

    model_config = ConfigDict(extra="forbid", strict=True)

    arch: Annotated[str, Field(min_length=1, max_length=64)]
    width: (
        Factor
        | Annotated[list[Factor], Field(min_length=1, max_length=MOST)]
        | Annotated[dict[Group, Factor], Field(min_length=1, max_length=MOST)]
        | None
    ) = None
    depth: Annotated[list[Blocks], Field(min_length=1, max_length=MOST)] | None = None
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    format: Literal["safetensors", "onnx"] = "safetensors"
    samples: Annotated[int, Field(ge=1, le=4096, strict=True)] | None = None
    seed: Annotated[int, Field(ge=0, le=1 << 53, strict=True)] = 0
    extrapolate: Annotated[bool, Field(strict=True)] = False
    budget: Budget | None = None


def _problem(error: ValidationError) -> Problem:
    found: dict[str, dict[str, str]] = {}
    for each in error.errors(include_url=False, include_context=False):
        name = str(each["loc"][0]) if each["loc"] else "body"
        if each["type"] == "json_invalid":
            why = each["msg"].removeprefix("Invalid JSON: ").encode("ascii", "replace").decode()
            entry = {"field": "body", "given": why[:80], "allowed": "one JSON object"}
            return Problem(400, f"the body is not JSON: {why[:80]}", [entry])
        if each["type"] == "extra_forbidden" and name not in ALLOWED:
            entry = field(name[:64], each["input"], f"no such field; allowed are {sorted(ALLOWED)}")
        elif each["type"] == "missing":
            entry = {"field": name, "given": "nothing", "allowed": ALLOWED[name]}
        else:
            entry = field(name, each["input"], ALLOWED.get(name, "one JSON object"))
        found.setdefault(ascii(name), entry)
    first = next(iter(found.values()))
    detail = f"{ascii(first['field'])[1:-1]}: {first['given']} is not allowed; {first['allowed']}"
    return Problem(422, detail, list(found.values())[:8])


def from_json(raw: bytes) -> WeightsRequest:
    """The request in a JSON body. Raises Problem (400 for bad JSON, 422 for a bad field)."""
    try:
        asked = WeightsRequest.model_validate_json(raw)
    except ValidationError as error:
        raise _problem(error) from None
    if asked.budget is not None:
        bounds = asked.budget.model_dump(exclude_none=True)
        if len(bounds) != 1 or asked.width is not None:
            entry = field("budget", bounds, ALLOWED["budget"])
            raise Problem(422, f"budget: {ALLOWED['budget']}", [entry])
    return asked


_NUMBER = re.compile(
    r"[+-]?\d{1,40}(\.\d{0,40})?([eE][+-]?\d{1,5})?|[+-]?(nan|inf|NaN|Infinity)", re.ASCII
)
_WHOLE = re.compile(r"-?\d{1,20}", re.ASCII)


def _parsed(name: str, text: str) -> object:
    """A query value as the JSON value it stands for, or the text itself if it stands for none."""
    parts = text.split(",")[: MOST + 1]
    if name == "width" and all(_NUMBER.fullmatch(part) for part in parts):
        numbers = [float(part) for part in parts]
        return numbers[0] if len(numbers) == 1 else numbers
    if name == "width":
        named = [part.rpartition(":") for part in parts]
        by_group = {group: float(number) for group, _, number in named if _NUMBER.fullmatch(number)}
        return by_group if len(by_group) == len(parts) else text  # a group comes once
    if name == "depth" and all(_WHOLE.fullmatch(part) for part in parts):
        return [int(part) for part in parts]
    if name in ("samples", "seed") and _WHOLE.fullmatch(text):
        return int(text)
    if name == "extrapolate" and text in ("true", "false"):
        return text == "true"
    return text


def from_query(arch: str, query: QueryParams) -> WeightsRequest:
    """The request in a query string; the same names, lists separated by commas, no budget."""
    given: dict[str, object] = {"arch": arch}
    for name, text in query.multi_items():
        if name in given:
            raise refuse(name[:64], text, "each name once")
        if name == "budget":
            raise refuse(name, text, "a budget is asked for with POST")
        given[name] = _parsed(name, text)
    try:
        return WeightsRequest.model_validate(given)
    except ValidationError as error:
        raise _problem(error) from None


def addressed(query: QueryParams) -> tuple[QueryParams, str | None]:
    """A query without its `etag`, the one of content-addressed URLs, and that etag."""
    pairs = query.multi_items()
    stated = [text for name, text in pairs if name == "etag"]
    if len(stated) > 1:
        raise refuse("etag", stated[1], "each name once")
    rest = QueryParams([pair for pair in pairs if pair[0] != "etag"])
    return rest, stated[0] if stated else None


def no_query(query: QueryParams) -> None:
    """Raise Problem if there is a query string where none has a meaning."""
    for name, text in query.multi_items():
        raise refuse(name[:64], text, "no query parameters on this path")
