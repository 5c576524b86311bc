"""Convolutions whose backward pass is sound on any processor, in any memory layout.

oneDNN (in torch 2.13) runs the backward pass of a strided convolution whose kernel is one pixel
through a buffer that it thins the input into. In channels-last layout, with fewer channels than one
vector register holds (8 floats on AVX2, 16 on AVX-512), it writes past that buffer
(uxlfoundation/oneDNN issue 6035); so do transposed convolutions and those in one dimension. From
here none of them reaches it: the input is thinned before, which gives the same sums, and the
convolution has stride one. No processor, layout or channel count need be known for that. Knows no
network and no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Amount = int | Sequence[int]
Convolution = Callable[..., Tensor]
P = ParamSpec("P")
R = TypeVar("R")


def channels_last(value: Tensor) -> Tensor:
    """The same numbers in channels-last layout if there are four dimensions: faster on CPUs."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


class SoundConvolutions(TorchFunctionMode, ContextDecorator):
    """While it is entered, or in what it decorates, the CPU gets no strided one-pixel convolution.

    Reaches any nn.Module and any exported graph, but not a scripted module, which hides its calls.
    A module under activation checkpointing is refused by torch: it runs again without this mode.
    """

    def __torch_function__(
        self,
        func: Convolution,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The call as it is, or its equal without a stride."""
        instead = _INSTEAD.get(func)
        if instead is None:
            return func(*args, **(kwargs or {}))
        return instead(func, *args, **(kwargs or {}))


def sound(device: torch.device) -> AbstractContextManager[Any]:
    """SoundConvolutions on the CPU; on another device nothing, as all of torch's calls pay for it."""
    return SoundConvolutions() if device.type == "cpu" else nullcontext()


def soundly(device: Callable[..., torch.device]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates what trains on the `device` of its arguments: it runs in `sound` of that."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with sound(device(*args, **kwargs)):
                return function(*args, **kwargs)

        return within

    return decorated


def _each(amount: Amount, count: int) -> list[int]:
    if isinstance(amount, int):
        return [amount] * count
    return list(amount) * (count if len(amount) == 1 else 1)


def _last(places: Iterable[slice]) -> Any:
    return (..., *places)


def _thins(input: Tensor, weight: Tensor, strides: list[int]) -> bool:
    return input.device.type == "cpu" and weight[0, 0].numel() == 1 and max(strides) > 1


def _convolution(
    func: Convolution,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Amount = 1,
    padding: Amount | str = 0,
    dilation: Amount = 1,
    groups: int = 1,
) -> Tensor:
    strides = _each(stride, weight.dim() - 2)
    if padding == "same" or not _thins(input, weight, strides):
        return func(input, weight, bias, stride, padding, dilation, groups)
    if not isinstance(padding, str):  # "valid" is none
        sides = _each(padding, len(strides))
        input = F.pad(input, [side for one in reversed(sides) for side in (one, one)])
    thinned = input[_last(slice(None, None, step) for step in strides)]
    return func(thinned, weight, bias, groups=groups)


def _transposed(
    func: Convolution,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Amount = 1,
    padding: Amount = 0,
    output_padding: Amount = 0,
    groups: int = 1,
    dilation: Amount = 1,
) -> Tensor:
    count = weight.dim() - 2
    strides = _each(stride, count)
    if not _thins(input, weight, strides):
        return func(input, weight, bias, stride, padding, output_padding, groups, dilation)
    dense = func(input, weight, groups=groups)
    places: list[slice] = []
    inside: list[slice] = []
    size: list[int] = []
    for length, step, one, more in zip(
        dense.shape[-count:],
        strides,
        _each(padding, count),
        _each(output_padding, count),
        strict=True,
    ):
        places.append(slice(0, (length - 1) * step + 1, step))
        size.append((length - 1) * step + 1 + more)
        inside.append(slice(one, size[-1] - one))
    spread = dense.new_zeros(*dense.shape[:-count], *size)
    spread[_last(places)] = dense
    spread = spread[_last(inside)]
    return spread if bias is None else spread + bias.view(-1, *[1] * count)


def _general(
    func: Convolution,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Amount,
    padding: Amount,
    dilation: Amount,
    transposed: bool,
    output_padding: Amount,
    groups: int,
) -> Tensor:
    own = (_BACK if transposed else _ALONG)[weight.dim() - 3]
    if transposed:
        more = (output_padding, groups, dilation)
        return _transposed(own, input, weight, bias, stride, padding, *more)
    return _convolution(own, input, weight, bias, stride, padding, dilation, groups)


_ALONG: tuple[Convolution, ...] = (F.conv1d, F.conv2d, F.conv3d)
_BACK: tuple[Convolution, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_ATEN = torch.ops.aten
_INSTEAD: dict[Any, Convolution] = {
    **dict.fromkeys(_ALONG, _convolution),
    **dict.fromkeys(_BACK, _transposed),
    # What exported graphs call.
    **{
        getattr(getattr(_ATEN, f"conv{n}d"), overload): _convolution
        for n in (1, 2, 3)
        for overload in ("default", "padding")
    },
    _ATEN.conv_transpose1d.default: _transposed,
    _ATEN.conv_transpose2d.input: _transposed,
    _ATEN.conv_transpose3d.input: _transposed,
    torch.convolution: _general,
    _ATEN.convolution.default: _general,
}
