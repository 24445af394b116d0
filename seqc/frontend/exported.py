"""ExportedPrograms as sources: a module that can be traced again, its example inputs and its dynamic sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import traceback as fx_traceback
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.errors import UnsupportedModelError

_UNBOUNDED = 2**31


@dataclass(frozen=True)
class Exported:
    """An ExportedProgram taken apart.

    ``example_inputs`` are the tensors the program was exported with, by input name, or random ones of the same shapes
    and dtypes where it holds none. ``dynamic_shapes`` has the form that ``seqc.compile`` takes: {input: {axis: Dim}}.
    """

    module: nn.Module
    example_inputs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, Any]]
    notes: list[str] = field(default_factory=list)


class ExportedModule(nn.Module):
    """Runs an exported graph on its tensors by name; inputs that are not tensors keep their exported values.

    The graph is interpreted node by node, so that tracing it again keeps the source lines of the original model.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.graph = program.module(check_guards=False)
        self.inputs = _user_inputs(program)
        self.out_spec = program.call_spec.out_spec

    def forward(self, **tensors: torch.Tensor) -> Any:
        flat = [tensors[name] if name is not None else value for name, value in self.inputs]
        assert isinstance(self.graph, fx.GraphModule)
        with fx_traceback.preserve_node_meta():
            out = fx.Interpreter(self.graph).run(*flat, enable_io_processing=False)
        leaves = list(out) if isinstance(out, (list, tuple)) else [out]
        return pytree.tree_unflatten(leaves, self.out_spec) if self.out_spec is not None else tuple(leaves)

    def train(self, mode: bool = True) -> ExportedModule:
        """An exported graph has fixed whatever depends on training: the call is accepted and changes nothing."""
        return self


def from_exported(program: torch.export.ExportedProgram) -> Exported:
    """Make an ExportedProgram traceable again; a size exported as dynamic stays dynamic with its range.

    Raises UnsupportedModelError for a size that the program derives from another one (``2*s0``).
    """
    values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    inputs = [name for name, _ in _user_inputs(program) if name is not None]
    axes: dict[sympy.Symbol, list[tuple[str, int]]] = {}
    notes = []
    for name in inputs:
        for axis, size in enumerate(values[name].shape):
            expr = _torch.size_expr(size)
            if isinstance(expr, sympy.Symbol):
                axes.setdefault(expr, []).append((name, axis))
            elif not expr.is_Integer:
                raise UnsupportedModelError(
                    f"input {name!r} was exported with a length of {expr} on axis {axis}; "
                    "give that axis a dimension of its own"
                )
            elif axis < min(values[name].dim() - 1, 2) and (axis == 0 or int(expr) != 1):
                notes.append(f"input {name!r}: axis {axis} was exported with the fixed size {int(expr)} and keeps it")
    dims = _dims(axes, program.range_constraints)
    shapes: dict[str, dict[int, Any]] = {name: {} for name in inputs}
    for symbol, places in axes.items():
        for name, axis in places:
            shapes[name][axis] = dims[symbol]
    examples = _examples(program, inputs, values, dims)
    return Exported(ExportedModule(program).eval(), examples, shapes, notes)


def _user_inputs(program: torch.export.ExportedProgram) -> list[tuple[str | None, Any]]:
    """(name, None) of each tensor input, (None, value) of each constant one, in flat order."""
    specs = [s.arg for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    return [(a.name, None) if isinstance(a, TensorArgument) else (None, getattr(a, "value", None)) for a in specs]


def _dims(axes: Mapping[sympy.Symbol, list[tuple[str, int]]], ranges: Mapping[Any, Any]) -> dict[sympy.Symbol, Any]:
    """A torch.export.Dim for each symbol: ``batch`` on first axes, ``sequence`` on second ones, else ``dim2``, ..."""
    dims: dict[sympy.Symbol, Any] = {}
    taken: set[str] = set()
    for symbol, places in axes.items():
        at = {axis for _, axis in places}
        base = {frozenset({0}): "batch", frozenset({1}): "sequence"}.get(frozenset(at), f"dim{max(at)}")
        name, count = base, 2
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        bounds = ranges.get(symbol)
        low, high = (bounds.lower, bounds.upper) if bounds is not None else (sympy.Integer(0), sympy.oo)
        top = int(high) if high.is_Integer and int(high) < _UNBOUNDED else None
        dims[symbol] = torch.export.Dim(name, min=max(int(low), 1) if low.is_Integer else 1, max=top)
    return dims


def _examples(
    program: torch.export.ExportedProgram, inputs: list[str], values: dict[str, Any], dims: Mapping[sympy.Symbol, Any]
) -> dict[str, torch.Tensor]:
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        leaves = [x for x in pytree.tree_leaves((tuple(args), dict(kwargs or {}))) if isinstance(x, torch.Tensor)]
        if len(leaves) == len(inputs):
            return dict(zip(inputs, leaves, strict=True))
    generator = torch.Generator().manual_seed(0)
    examples = {}
    for name in inputs:
        sizes = [_torch.size_expr(s) for s in values[name].shape]
        shape = [_default_size(dims[s]) if s in dims else int(s) for s in sizes]
        dtype = values[name].dtype
        drawn = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.zeros(shape)
        examples[name] = drawn.to(dtype)
    return examples


def _default_size(dim: Any) -> int:
    size = max(int(dim.min), 5)
    return size if dim.max is None else min(size, int(dim.max))
