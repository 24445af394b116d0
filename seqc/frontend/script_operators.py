"""The operators of TorchScript, as Python functions or as the ATen operators that they name."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32,
    torch.bfloat16,
)  # fmt: skip
_LAYOUTS = (torch.strided, torch.sparse_coo)
_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
_NUMBERS = (int, float, bool, complex, torch.SymInt, torch.SymFloat, torch.SymBool)


def _append(items: list[Any], value: Any) -> list[Any]:
    items.append(value)
    return items


def _add(a: Any, b: Any, alpha: Any = 1) -> Any:
    return a + b if isinstance(b, (list, tuple, str)) else a + b * alpha


def _sub(a: Any, b: Any, alpha: Any = 1) -> Any:
    return a - b * alpha


def _rsub(a: Any, b: Any, alpha: Any = 1) -> Any:
    return b - a * alpha


def _div(a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return a / b
    return a // b if rounding_mode == "floor" else torch.sym_int(a / b)  # type: ignore[no-untyped-call]


def _first(value: Any, *_: Any) -> Any:
    return value


def _len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) else len(value)


def _to_int(value: Any) -> Any:
    return value if isinstance(value, (int, torch.SymInt)) else torch.sym_int(_number(value))  # type: ignore[no-untyped-call]


def _to_float(value: Any) -> Any:
    return torch.sym_float(_number(value))  # type: ignore[no-untyped-call]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _size(tensor: torch.Tensor, axis: int | None = None) -> Any:
    return list(tensor.shape) if axis is None else tensor.shape[axis]


def _tensor(data: Any, dtype: int | None = None, device: Any = None, requires_grad: bool = False) -> torch.Tensor:
    return torch.tensor(data, dtype=None if dtype is None else _DTYPES[dtype], device=device)


def _raise(message: Any = "", kind: Any = None) -> None:
    raise ValueError(str(message) or str(kind))


def _set_item(items: Any, key: Any, value: Any) -> Any:
    items[key] = value
    return items


# Operations on numbers, lists and tuples; on tensors the ATen operator of the same name is called instead.
ON_PYTHON: dict[str, Callable[..., Any]] = {
    "aten::add": _add, "aten::sub": _sub, "aten::mul": operator.mul, "aten::div": _div, "aten::rsub": _rsub,
    "aten::floordiv": operator.floordiv, "aten::floor_divide": operator.floordiv, "aten::remainder": operator.mod,
    "aten::pow": operator.pow, "aten::neg": operator.neg, "aten::abs": abs, "aten::lt": operator.lt,
    "aten::le": operator.le, "aten::gt": operator.gt, "aten::ge": operator.ge, "aten::eq": operator.eq,
    "aten::ne": operator.ne, "aten::__and__": operator.and_, "aten::__or__": operator.or_,
    "aten::__not__": operator.not_, "aten::sqrt": math.sqrt, "aten::log": math.log, "aten::exp": math.exp,
    "aten::ceil": math.ceil, "aten::floor": math.floor, "aten::__getitem__": operator.getitem,
    "aten::__contains__": operator.contains, "aten::to": _first, "aten::detach": _first, "aten::append": _append,
    "aten::list": list,
    "aten::_set_item": _set_item, "aten::slice": lambda items, start, stop, step: items[start:stop:step],
    "aten::__range_length": lambda low, high, step: len(range(low, high, step)), "aten::tensor": _tensor,
    "aten::__derive_index": lambda index, start, step: start + index * step, "prim::min": min, "prim::max": max,
    "aten::str": str, "aten::format": lambda text, *values: text.format(*values),
}  # fmt: skip
# Operations that mean something else than the ATen operator of that name, whatever they are given.
ALWAYS: dict[str, Callable[..., Any]] = {
    "aten::size": _size, "aten::len": _len, "aten::dim": lambda tensor: tensor.dim(),
    "aten::numel": lambda tensor: tensor.numel(),
    "aten::Int": _to_int, "aten::IntImplicit": _to_int, "aten::Bool": lambda value: bool(_number(value)),
    "aten::Float": _to_float, "aten::FloatImplicit": _number,
    "aten::ScalarImplicit": _number, "aten::item": _number, "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not, "aten::is_floating_point": torch.is_floating_point,
    "aten::warn": lambda *_: None,
    "prim::NumToTensor": _first, "prim::dtype": lambda tensor: _DTYPES.index(tensor.dtype),
    "prim::device": lambda tensor: tensor.device, "aten::device": torch.device, "prim::data": _first,
    "prim::layout": lambda tensor: _LAYOUTS.index(tensor.layout), "prim::unchecked_cast": _first,
    "prim::unchecked_unwrap_optional": _first, "aten::_unwrap_optional": _first,
    "prim::ListConstruct": lambda *values: list(values), "prim::TupleConstruct": lambda *values: values,
    "prim::TupleIndex": operator.getitem, "prim::Uninitialized": lambda: None, "prim::Print": lambda *_: None,
    "prim::RaiseException": _raise,
    "prim::is_cuda": lambda tensor: tensor.is_cuda, "prim::requires_grad": lambda tensor: False,
    "prim::DictConstruct": lambda *values: dict(zip(values[::2], values[1::2], strict=True)),
}  # fmt: skip
FILE_ACCESS = ("aten::save", "aten::load", "aten::from_file")


def for_python(kind: str, values: list[Any]) -> bool:
    """Whether an operation is on numbers and containers (which may hold tensors), and not on tensors."""
    if kind == "aten::tensor" or isinstance(values[0], (list, tuple, dict, str)):
        return True
    return not any(isinstance(value, torch.Tensor) for value in values)


def call(schema: str, values: list[Any]) -> Any:
    """Call the ATen operator of a schema; ``values`` are in the order of its arguments."""
    name, _, rest = schema.partition("(")
    base, _, overload = name.removeprefix("aten::").partition(".")
    packet = getattr(torch.ops.aten, base)
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for (kind, argument, keyword), value in zip(_arguments(rest), values, strict=True):
        converted = _convert(kind, value)
        if keyword:
            keywords[argument] = converted
        else:
            positional.append(converted)
    # A number where the schema wants a tensor came from a size: the operator's other overloads take it.
    kinds = [kind for kind, _, _ in _arguments(rest)]
    exact = not any(k.startswith("Tensor") and isinstance(v, _NUMBERS) for k, v in zip(kinds, values, strict=True))
    return (getattr(packet, overload or "default") if exact else packet)(*positional, **keywords)


def _convert(kind: str, value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if kind.startswith("ScalarType"):
            return _DTYPES[value]
        if kind.startswith("MemoryFormat"):
            return _MEMORY_FORMATS[value]
        if kind.startswith("Layout"):
            return _LAYOUTS[value]
    return value


@functools.lru_cache(maxsize=1024)
def _arguments(text: str) -> tuple[tuple[str, str, bool], ...]:
    """(type, name, keyword only) of each argument in ``Tensor self, *, ScalarType? dtype=None) -> Tensor``."""
    found, depth, start, keyword = [], 0, 0, False
    for i, letter in enumerate(text):
        if depth == 0 and letter in ",)":
            item = text[start:i].strip()
            start = i + 1
            if item == "*":
                keyword = True
            elif item:
                kind, _, name = item.partition("=")[0].rpartition(" ")
                found.append((kind, name, keyword))
            if letter == ")":
                break
        depth += (letter in "([") - (letter in ")]")
    return tuple(found)
