"""Runs TorchScript graphs node by node in Python, so that tracing them sees their loops and symbolic sizes.

Inside TorchScript a length is a plain number and a loop runs unseen. torch's own converter (TS2EPConverter, torch 2.13)
refuses loops over a length and turns some sizes into constants; interpreting the graph does neither.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import traceback as fx_traceback

from seqc.errors import UnsupportedModelError
from seqc.frontend.script_operators import ALWAYS, FILE_ACCESS, ON_PYTHON, call, for_python

_UNPACK = ("prim::ListUnpack", "prim::TupleUnpack")
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass
class _Memory:
    """The attributes that a module has assigned in this forward, and those it read without having assigned them."""

    assigned: dict[str, Any] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)


class ScriptPart(nn.Module):
    """A TorchScript module as a plain one: its submodules, weights, methods and attributes have the names they had.

    ``parts`` has those already made, by the TorchScript module each stands for. What a method assigns to attributes is
    seen within one forward only.
    """

    def __init__(self, script: torch.jit.ScriptModule, parts: dict[Any, ScriptPart]) -> None:
        super().__init__()
        inner: Any = script
        parts[inner._c] = self
        self._script = (script,)  # in a tuple: a submodule would be traced into as TorchScript
        self._memory = _Memory()
        self.training = bool(inner.training)
        for name, parameter in script.named_parameters(recurse=False):
            self._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        self._buffers.update(script.named_buffers(recurse=False))
        for name, child in inner._modules.items():
            self._modules[name] = parts.get(child._c) or ScriptPart(child, parts)

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.run("forward", args, named)

    def __getattr__(self, name: str) -> Any:
        """A method or attribute of the TorchScript module."""
        with contextlib.suppress(AttributeError):
            return super().__getattr__(name)
        script: Any = super().__getattribute__("_script")[0]
        if script._c._has_method(name):
            return lambda *args, **named: self.run(name, args, named)
        return self.read(name)

    def read(self, name: str) -> Any:
        """An attribute, a weight or a submodule."""
        if name in self._memory.assigned:
            return self._memory.assigned[name]
        for own in (self._parameters, self._modules):
            if name in own:
                return own[name]
        self._memory.read.add(name)
        if name in self._buffers:
            return self._buffers[name]
        return self.training if name == "training" else getattr(self._script[0], name)

    def assign(self, name: str, value: Any, where: str) -> None:
        """Set an attribute. Raises UnsupportedModelError where the value that it had before this forward was used."""
        if name in self._memory.read and name not in self._memory.assigned:
            raise UnsupportedModelError(
                f"a TorchScript module uses what an earlier call left in its attribute {name!r} and assigns it anew "
                f"({short(where)}); let the forward set it first, as by a method that resets it"
            )
        self._memory.assigned[name] = value

    def forget(self) -> None:
        """Begin a forward of the whole model."""
        for part in self.modules():
            if isinstance(part, ScriptPart):
                part._memory = _Memory()

    def run(self, method: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a method of the TorchScript module. Raises TypeError where the arguments do not fit it."""
        script: Any = self._script[0]
        found = script._c._get_method(method)
        graph = found.inlined_graph
        values = [self, *_bound(found.schema, args, named)]
        environment = {v.debugName(): value for v, value in zip(graph.inputs(), values, strict=True)}
        with fx_traceback.preserve_node_meta():
            (result,) = _Run(environment, _users_stack()).block(graph)
        return result


class ScriptModel(ScriptPart):
    """A TorchScript module that is the whole model: called with its tensors by name, in the order of ``names``."""

    def __init__(self, script: torch.jit.ScriptModule, names: tuple[str, ...]) -> None:
        super().__init__(script, {})
        self._names = names

    def forward(self, **tensors: torch.Tensor) -> Any:
        self.forget()
        return self.run("forward", tuple(tensors[name] for name in self._names), {})


@contextlib.contextmanager
def interpreted(model: nn.Module) -> Iterator[None]:
    """Within it, the TorchScript modules inside ``model`` are replaced by ones that run their graphs in Python."""
    parts: dict[Any, ScriptPart] = {}
    replaced: list[tuple[nn.Module, str, Any]] = []
    for module in list(model.modules()):
        if not isinstance(module, torch.jit.ScriptModule):
            children: Any = module._modules.items()
            replaced += [(module, n, child) for n, child in children if isinstance(child, torch.jit.ScriptModule)]
    try:
        for module, name, child in replaced:
            module._modules[name] = parts.get(child._c) or ScriptPart(child, parts)
        yield
    finally:
        for module, name, child in replaced:
            module._modules[name] = child


@dataclass
class _Run:
    """A call of a method: the values computed so far by name, and the Python lines from which it was called."""

    environment: dict[str, Any]
    stack: list[str]

    def block(self, block: Any) -> list[Any]:
        where = ""
        for node in block.nodes():
            found = _source(node)
            if found:
                where = found
                fx_traceback.set_stack_trace([*self.stack, where])
            results = self._node(node, where)
            for value, result in zip(node.outputs(), results, strict=True):
                self.environment[value.debugName()] = result
        return [self.environment[value.debugName()] for value in block.outputs()]

    def _node(self, node: Any, where: str) -> list[Any]:
        kind = node.kind()
        if kind == "prim::Constant":
            return [node.output().toIValue()]
        values = [self.environment[value.debugName()] for value in node.inputs()]
        if kind == "prim::GetAttr":
            owner, name = values[0], node.s("name")
            return [owner.read(name) if isinstance(owner, ScriptPart) else getattr(owner, name)]
        if kind == "prim::SetAttr" and isinstance(values[0], ScriptPart):
            values[0].assign(node.s("name"), values[1], where)
            return []
        if kind == "prim::If":
            return self.block(list(node.blocks())[0 if values[0] else 1])
        if kind == "prim::Loop":
            return self._loop(node, values)
        if kind in _UNPACK:
            return list(values[0])
        if kind in ALWAYS:
            result = ALWAYS[kind](*values)
        elif kind in ON_PYTHON and for_python(kind, values):
            result = ON_PYTHON[kind](*values)
        elif kind.startswith("aten::") and kind not in FILE_ACCESS:
            result = call(node.schema(), values)
        else:
            raise UnsupportedModelError(f"TorchScript's {kind} is not supported ({short(where)})")
        return [result] if node.outputsSize() == 1 else list(result or ())

    def _loop(self, node: Any, values: list[Any]) -> list[Any]:
        trips, go_on, *carried = values
        (block,) = node.blocks()
        parameters = [value.debugName() for value in block.inputs()]
        # range() asks for the number of trips as Python loops do, which is what tells the tracer of the loop.
        for index in range(trips):
            if not go_on:
                break
            self.environment.update(zip(parameters, (index, *carried), strict=True))
            go_on, *carried = self.block(block)
        return carried


def _bound(schema: Any, args: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
    """The values of all arguments of a method but ``self``. Raises TypeError where they do not fit."""
    wanted = schema.arguments[1:]
    if len(args) > len(wanted) or not named.keys() <= {a.name for a in wanted[len(args) :]}:
        raise TypeError(f"{schema.name}() takes {', '.join(a.name for a in wanted) or 'nothing'}")
    values = list(args)
    for argument in wanted[len(args) :]:
        if argument.name not in named and not argument.has_default_value():
            raise TypeError(f"{schema.name}() is missing the argument {argument.name!r}")
        values.append(named.get(argument.name, argument.default_value))
    return values


def _users_stack() -> list[str]:
    """The lines of the user's model from which TorchScript is called, as a stack trace has them."""
    frames = traceback.extract_stack()
    entry = [i for i, frame in enumerate(frames) if frame.filename.startswith(_NOT_THE_USERS)]
    inside = frames[entry[0] :] if entry else []
    return traceback.format_list([f for f in inside if not f.filename.startswith(_NOT_THE_USERS)])


def _source(node: Any) -> str:
    """The Python line a node was scripted or traced from, as a stack trace has it; empty where unknown."""
    lines = [line for line in node.sourceRange().splitlines() if line.strip()]
    for i, line in enumerate(lines):
        found = re.search(r'File "[^"]+", line \d+', line)
        if found:
            marked = next((k for k in range(i + 1, len(lines)) if "<--- HERE" in lines[k]), None)
            text = lines[marked - 1].strip() if marked is not None and marked > i + 1 else ""
            return f"{found.group(0)}, in forward\n    {text}\n"
    return ""


def short(where: str) -> str:
    return where.replace("\n", " ").strip() or "no source line"
