"""The printed form of a Program: deterministic, readable, the same for two traces of the same model.

    weight @cell.weight_hh: f32[20, 5]
    input %x: f32[batch, sequence, 4]
    %0: sym[sequence] = aten.sym_size.int(%x, 1)  # (model.py:12)
    %1: (f32[batch, 5], f32[sequence, batch, 5]) = recurrence(trip=%0) {  # cell (model.py:14)
      carry %2: f32[batch, 5] = %7
      x %3: f32[batch, 4] = %8
      invariant %4: f32[20, 5] = @cell.weight_hh
      %5: f32[batch, 20] = aten.linear(%3, %4)
      next %5
      y %5
    }
    output output_0 = %6

Weights are printed by their names in the source model, inputs by their port's name, every other value by its position.
Keyword arguments that say where a tensor lives (device, layout, pinning) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc.ops.choose import choice, inputs_of, is_choice, results_of
from seqc.ops.recurrence import is_recurrence, parts
from seqc.program import Program, module_path, source_line

_DTYPES = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}
_PLACEMENT = frozenset({"device", "layout", "pin_memory"})
_END = 2**63 - 1


def text(program: Program, provenance: bool = True) -> str:
    """The whole Program as text, one value per line; ``provenance`` adds module path and source line as comments."""
    return "\n".join(line for _, line in lines(program, provenance)) + "\n"


def lines(program: Program, provenance: bool = True) -> Iterator[tuple[fx.Node | None, str]]:
    """The lines of :func:`text` with the node each stands for. Broken Programs print too: errors show them."""
    return iter(_Printer(program, provenance).program())


class _Printer:
    def __init__(self, program: Program, provenance: bool) -> None:
        self._program = program
        self._provenance = provenance
        self._names: dict[fx.Node, str] = {}
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = dict(program.dim_names())
        self._unknown = 0
        self._count = 0

    def program(self) -> list[tuple[fx.Node | None, str]]:
        program = self._program
        result: list[tuple[fx.Node | None, str]] = []
        ports = [port.name for port in program.inputs]
        for i, node in enumerate(program.placeholders):
            if node.name in program.weights:
                name = "@" + program.weight_names.get(node.name, node.name)
                role = "weight"
            else:
                position = i - len(program.weights)
                name = "%" + (ports[position] if 0 <= position < len(ports) else node.name)
                role = "input"
            self._names[node] = name if name not in self._names.values() else f"{name}'{i}"
            result.append((node, f"{role} {self._names[node]}: {self._type(node)}"))
        result += self._body(program.graph, "")
        names = [port.name for port in program.outputs]
        for node in program.graph.nodes:
            if node.op == "output":
                result += [(node, line) for line in self._results(node, names)]
        return result

    def _results(self, output: fx.Node, names: list[str]) -> list[str]:
        values = output.args[0] if output.args else None
        if not isinstance(values, (tuple, list)):
            return [f"output {self._literal(values)}"]
        padded = names + [f"#{i}" for i in range(len(names), len(values))]
        return [f"output {name} = {self._literal(value)}" for name, value in zip(padded, values, strict=False)]

    def _body(self, graph: fx.Graph, indent: str) -> list[tuple[fx.Node | None, str]]:
        result: list[tuple[fx.Node | None, str]] = []
        for node in graph.nodes:
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            if is_recurrence(node):
                result += self._recurrence(node, indent)
            elif is_choice(node):
                result += self._choice(node, indent)
            else:
                name = self._name(node)
                result.append((node, f"{indent}{name}: {self._type(node)} = {self._call(node)}{self._where(node)}"))
        return result

    def _recurrence(self, node: fx.Node, indent: str) -> list[tuple[fx.Node | None, str]]:
        name, inner = self._name(node), indent + "  "
        try:
            p = parts(node)
        except Exception:  # a broken node is printed as a plain call
            return [
                (node, f"{indent}{name}: {self._type(node)} = recurrence({self._arguments(node)}){self._where(node)}")
            ]
        direction = ", reverse" if p.reverse else ""
        head = f"recurrence(trip={self._literal(p.trip)}{direction})"
        result: list[tuple[fx.Node | None, str]] = [
            (node, f"{indent}{name}: {self._type(node)} = {head} {{{self._where(node)}")
        ]
        roles = [("carry", v) for v in p.carries] + [("x", v) for v in p.xs] + [("invariant", v) for v in p.invariants]
        inputs = [n for n in p.body.graph.nodes if n.op == "placeholder"]
        for (role, value), placeholder in zip(roles, inputs, strict=False):
            inner_name = self._name(placeholder)
            result.append(
                (placeholder, f"{inner}{role} {inner_name}: {self._type(placeholder)} = {self._literal(value)}")
            )
        result += self._body(p.body.graph, inner)
        output = p.body.graph.output_node()
        values = output.args[0]
        for i, value in enumerate(values if isinstance(values, (tuple, list)) else (values,)):
            role = "next" if i < len(p.carries) else "y"
            result.append((output, f"{inner}{role} {self._literal(value)}"))
        result.append((None, f"{indent}}}"))
        return result

    def _choice(self, node: fx.Node, indent: str) -> list[tuple[fx.Node | None, str]]:
        chosen, name, inner = choice(node), self._name(node), indent + "  "
        head = f"choose({self._literal(chosen.size)} <= {chosen.most})"
        result: list[tuple[fx.Node | None, str]] = [
            (node, f"{indent}{name}: {self._type(node)} = {head} {{{self._where(node)}")
        ]
        for i, body in enumerate(chosen.bodies):
            if i:
                result.append((None, f"{indent}}} else {{"))
            for placeholder, operand in zip(inputs_of(body), chosen.operands, strict=False):
                self._names[placeholder] = self._literal(operand)
            result += self._body(body.graph, inner)
            result += [(body.graph.output_node(), f"{inner}give {self._literal(value)}") for value in results_of(body)]
        result.append((None, f"{indent}}}"))
        return result

    def _name(self, node: fx.Node) -> str:
        if node not in self._names:
            self._names[node] = f"%{self._count}"
            self._count += 1
        return self._names[node]

    def _call(self, node: fx.Node) -> str:
        target = node.target
        if getattr(target, "__name__", "") == "getitem" and len(node.args) == 2:
            return f"{self._literal(node.args[0])}[{self._literal(node.args[1])}]"
        if isinstance(target, torch._ops.OpOverload):
            name = str(target).removesuffix(".default")
        else:
            name = getattr(target, "__name__", str(target))
        return f"{name}({self._arguments(node)})"

    def _arguments(self, node: fx.Node) -> str:
        shown = [self._literal(a) for a in node.args]
        shown += [f"{k}={self._literal(v)}" for k, v in node.kwargs.items() if k not in _PLACEMENT and v is not None]
        return ", ".join(shown)

    def _literal(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names.get(value, f"<{value.name}>")
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(self._literal(v) for v in value) + "]"
        if isinstance(value, slice):
            return f"{self._literal(value.start)}:{self._literal(value.stop)}"
        if isinstance(value, torch.dtype):
            return _DTYPES.get(value, str(value))
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, int) and value == _END:
            return "end"
        return repr(value)

    def _type(self, node: fx.Node) -> str:
        return self._value_type(node.meta["val"]) if "val" in node.meta else "?"

    def _value_type(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            sizes = ", ".join(self._size(s) for s in value.shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(self._value_type(v) for v in value) + ")"
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return f"sym[{self._size(value)}]"
        return type(value).__name__

    def _size(self, size: int | torch.SymInt) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expr = sympy.sympify(size.node.expr)
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._symbols:
                self._symbols[symbol] = sympy.Symbol(f"u{self._unknown}")
                self._unknown += 1
        return str(expr.subs(self._symbols))

    def _where(self, node: fx.Node) -> str:
        if not self._provenance:
            return ""
        path, line = module_path(node), source_line(node)
        if line:
            file, number, *_ = line.split(":", 2)
            line = f"({Path(file).name}:{number})"
        shown = " ".join(part for part in (path, line) if part)
        return f"  # {shown}" if shown else ""
