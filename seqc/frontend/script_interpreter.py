"""Runs a TorchScript graph node by node in Python, so that tracing it sees its loops and its symbolic sizes.

Inside TorchScript a length is a plain number and a loop runs unseen. torch's own converter (TS2EPConverter, torch 2.13)
refuses loops over a length and turns some sizes into constants; interpreting the graph does neither.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import traceback as fx_traceback

from seqc.errors import UnsupportedModelError

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


def _set_item(items: Any, key: Any, value: Any) -> Any:
    items[key] = value
    return items


# Operations on numbers, lists and tuples; on tensors the ATen operator of the same name is called instead.
_PYTHON: dict[str, Callable[..., Any]] = {
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
_ALWAYS: dict[str, Callable[..., Any]] = {
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
    "prim::is_cuda": lambda tensor: tensor.is_cuda, "prim::requires_grad": lambda tensor: False,
    "prim::DictConstruct": lambda *values: dict(zip(values[::2], values[1::2], strict=True)),
}  # fmt: skip
_FILE_ACCESS = ("aten::save", "aten::load", "aten::from_file")
_UNPACK = ("prim::ListUnpack", "prim::TupleUnpack")


class ScriptInterpreter(nn.Module):
    """A TorchScript module as a plain one: called with its tensors by name, its weights are parameters and buffers."""

    def __init__(self, script: torch.jit.ScriptModule, names: tuple[str, ...]) -> None:
        super().__init__()
        self.script = (script,)  # in a tuple: a submodule would be traced into as TorchScript
        self.names = names
        self.weights = nn.Module()
        for name, parameter in script.named_parameters():
            owner, _, leaf = name.rpartition(".")
            self._owner(owner).register_parameter(leaf, nn.Parameter(parameter.detach(), requires_grad=False))
        for name, buffer in script.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self._owner(owner).register_buffer(leaf, buffer)
        self.stored = {name for name, _ in (*self.weights.named_parameters(), *self.weights.named_buffers())}

    def _owner(self, path: str) -> nn.Module:
        module = self.weights
        for part in filter(None, path.split(".")):
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        return module

    def forward(self, **tensors: torch.Tensor) -> Any:
        graph: Any = self.script[0].inlined_graph
        inputs = list(graph.inputs())
        environment: dict[str, Any] = {inputs[0].debugName(): _Attribute("", self.script[0])}
        given = [tensors[name] for name in self.names]
        for value, tensor in zip(inputs[1:], [*given, *[None] * (len(inputs) - 1 - len(given))], strict=True):
            environment[value.debugName()] = tensor
        with fx_traceback.preserve_node_meta():
            (result,) = self._run(graph, environment)
        return result

    def _run(self, block: Any, environment: dict[str, Any]) -> list[Any]:
        where = ""
        for node in block.nodes():
            found = _source(node)
            if found:
                where = found
                fx_traceback.set_stack_trace([where])
            results = self._node(node, environment, where)
            for value, result in zip(node.outputs(), results, strict=True):
                environment[value.debugName()] = result
        return [environment[value.debugName()] for value in block.outputs()]

    def _node(self, node: Any, environment: dict[str, Any], where: str) -> list[Any]:
        kind = node.kind()
        if kind == "prim::Constant":
            return [node.output().toIValue()]
        values = [environment[value.debugName()] for value in node.inputs()]
        if kind == "prim::GetAttr":
            return [self._attribute(values[0], node.s("name"))]
        if kind == "prim::If":
            block = list(node.blocks())[0 if values[0] else 1]
            return self._run(block, environment)
        if kind == "prim::Loop":
            return self._loop(node, values, environment)
        if kind in _UNPACK:
            return list(values[0])
        if kind in _ALWAYS:
            result = _ALWAYS[kind](*values)
        elif kind in _PYTHON and _for_python(kind, values):
            result = _PYTHON[kind](*values)
        elif kind.startswith("aten::") and kind not in _FILE_ACCESS:
            result = _call(node.schema(), values)
        else:
            raise UnsupportedModelError(f"TorchScript's {kind} is not supported ({_short(where)})")
        return [] if node.outputsSize() == 0 else [result]

    def _loop(self, node: Any, values: list[Any], environment: dict[str, Any]) -> list[Any]:
        trips, go_on, *carried = values
        (block,) = node.blocks()
        parameters = [value.debugName() for value in block.inputs()]
        # range() asks for the number of trips as Python loops do, which is what tells the tracer of the loop.
        for index in range(trips):
            if not go_on:
                break
            environment.update(zip(parameters, (index, *carried), strict=True))
            go_on, *carried = self._run(block, environment)
        return carried

    def _attribute(self, owner: Any, name: str) -> Any:
        path = f"{owner.path}.{name}".lstrip(".")
        if path in self.stored:
            return functools.reduce(getattr, path.split("."), self.weights)
        value = getattr(owner.value, name)
        return _Attribute(path, value) if isinstance(value, torch.jit.ScriptModule) else value


class _Attribute:
    """A submodule on the way to a weight, with its dotted path."""

    def __init__(self, path: str, value: Any) -> None:
        self.path = path
        self.value = value


def _for_python(kind: str, values: list[Any]) -> bool:
    """Whether an operation is on numbers and containers (which may hold tensors), and not on tensors."""
    if kind == "aten::tensor" or isinstance(values[0], (list, tuple, dict, str)):
        return True
    return not any(isinstance(value, torch.Tensor) for value in values)


def _call(schema: str, values: list[Any]) -> Any:
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


def _source(node: Any) -> str:
    """The Python line a node was scripted or traced from, as a stack trace has it; empty where unknown."""
    lines = [line for line in node.sourceRange().splitlines() if line.strip()]
    for i, line in enumerate(lines):
        found = re.search(r'File "[^"]+", line \d+', line)
        if found:
            marked = next((k for k in range(i + 1, len(lines)) if "<--- HERE" in lines[k]), None)
            text = lines[marked - 1].strip() if marked is not None and marked > i + 1 else ""
            return f"{found.group(0)}, in forward\n    {text}"
    return ""


def _short(where: str) -> str:
    return where.replace("\n", " ").strip() or "no source line"
