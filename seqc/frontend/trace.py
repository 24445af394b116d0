"""From a model to a Program whose named dimensions are symbolic, its loops over time included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from seqc import _torch
from seqc.errors import UnsupportedModelError
from seqc.frontend.capture import Capture, capture
from seqc.frontend.merge import merge
from seqc.frontend.normalize import normalize
from seqc.frontend.reroll import reroll
from seqc.frontend.signature import Signature, bind
from seqc.frontend.source import traceable
from seqc.ops.recurrence import propagate
from seqc.program import Program

aten = torch.ops.aten

# (first, second) lengths a model with loops is traced at; the next pair is tried where too few steps were seen.
_LENGTH_PAIRS = ((7, 5), (17, 12))
_FEWEST_STEPS = 4
_LONGEST_TRACE = 4096


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
) -> Program:
    """Trace ``model`` with every named dimension symbolic and every loop over one as a ``seqc::recurrence``.

    model           nn.Module (run in eval mode) or an ExportedProgram
    example_inputs  tuple, or dict by parameter name, of tensors; any sizes the model accepts
    dynamic_shapes  per input, axis -> name (or torch.export.Dim); None: axis 0 is ``batch``, axis 1 ``sequence``

    Raises UnsupportedModelError, with the source line, for data-dependent control flow and loops whose steps differ.
    """
    module, examples, shapes = traceable(model, example_inputs, dynamic_shapes)
    return trace_signature(module.eval(), bind(module, examples, shapes))


def trace_signature(model: nn.Module, signature: Signature, loops: str = "reroll") -> Program:
    """``trace`` for inputs already bound. ``loops="unroll"`` keeps loops unrolled at the example's length."""
    if loops == "unroll":
        return _unrolled(model, signature)
    sizes = signature.trace_sizes()
    first = capture(model, signature, sizes)
    frozen = _frozen_dims(first)
    if not frozen:
        normalize(first.program)
        return _finished(first.program)
    problem: UnsupportedModelError | None = None
    tried: list[tuple[dict[str, int], dict[str, int]]] = []
    for long, short in _LENGTH_PAIRS:
        a, b = _pair_sizes(first, signature, frozen, long, short)
        if (a, b) in tried or any(a[name] == b[name] for name in frozen):
            continue
        tried.append((a, b))
        try:
            # A trace is rewritten in place and serves one attempt; the sizes of two attempts differ.
            one = first if a == first.sizes else capture(model, signature, a)
            return _finished(_reroll_pair(one, capture(model, signature, b)))
        except UnsupportedModelError as error:
            problem = problem or error
    raise problem or UnsupportedModelError(
        f"the model loops over {', '.join(frozen)}, whose range leaves no two sizes to trace it at; leave it fixed or widen it"
    )


def _reroll_pair(a: Capture, b: Capture) -> Program:
    for captured in (a, b):
        normalize(captured.program)
    varies = _varying(a.program, b.program)
    reasons = reroll(a.program, varies)
    reasons += reroll(b.program, varies)
    for captured in (a, b):
        normalize(captured.program)
    return merge(a, b, reasons)


def _finished(program: Program) -> Program:
    propagate(program.graph_module)
    normalize(program)
    program.outputs = tuple(
        type(port)(port.name, node.meta["val"].dtype, program.shape_of(node.meta["val"]))
        for port, node in zip(program.outputs, program.output_nodes, strict=True)
    )
    return program


def _unrolled(model: nn.Module, signature: Signature) -> Program:
    first = capture(model, signature, signature.trace_sizes())
    fixed = _frozen_dims(first)
    axes = {n: {a: d for a, d in axes.items() if d not in fixed} for n, axes in signature.axes.items()}
    sizes = signature.example_sizes()
    static = Signature(
        signature.examples, axes, {n: d for n, d in signature.dims.items() if n not in fixed}, signature.positional
    )
    captured = capture(model, static, {**static.trace_sizes()})
    normalize(captured.program)
    for name in fixed:
        captured.program.notes.append(
            f"loops are kept unrolled: dimension {name!r} is FIXED at {sizes[name]}, other sizes are refused"
        )
    return _finished(captured.program)


def _frozen_dims(captured: Capture) -> list[str]:
    """The dimensions that Python turned into numbers: loops, or arithmetic outside tensors."""
    symbols = {s for item in captured.log if not isinstance(item.value, bool) for s in item.expr.free_symbols}
    for node in captured.exported.graph.nodes:
        # `while t < x.shape[1]` asks for no number: it shows in reads of many fixed places.
        if node.target is aten.select.int and isinstance(node.args[2], int) and node.args[2] >= _FEWEST_STEPS - 1:
            symbols |= _torch.size_expr(node.args[0].meta["val"].shape[node.args[1]]).free_symbols
    return [d.name for d in captured.dims if d.symbol in symbols]


def _pair_sizes(
    first: Capture, signature: Signature, frozen: list[str], long: int, short: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Two sets of sizes at which every number Python evaluated differs and is at least the fewest steps wanted."""
    a, b = dict(first.sizes), dict(first.sizes)
    for name in frozen:
        if first.sizes[name] <= 3:
            a[name], b[name] = signature.clamp(name, long), signature.clamp(name, short)
            continue
        symbol = next(d.symbol for d in first.dims if d.name == name)
        counts = [s.expr for s in first.log if not isinstance(s.value, bool) and s.expr.free_symbols == {symbol}]
        counts = [e for e in counts if int(e.subs(symbol, _LONGEST_TRACE)) >= _FEWEST_STEPS]
        b[name] = _first_size(counts, symbol, signature.clamp(name, short), lambda v, _: v >= _FEWEST_STEPS)
        seen = {e: int(e.subs(symbol, b[name])) for e in counts}
        at_least = max(signature.clamp(name, long), b[name] + 1)
        a[name] = _first_size(counts, symbol, at_least, lambda v, e, seen=seen: v != seen[e] and v >= _FEWEST_STEPS)
    return a, b


def _first_size(counts: list[Any], symbol: Any, start: int, accept: Callable[..., bool]) -> int:
    for size in range(start, _LONGEST_TRACE):
        if all(accept(int(e.subs(symbol, size)), e) for e in counts):
            return size
    return start


def _varying(a: Program, b: Program) -> Callable[[fx.Node], bool]:
    """Tells of a node whether its kind occurs another number of times, or with another number of entries, in the twin."""

    def census(program: Program) -> dict[Any, list[int]]:
        found: dict[Any, list[int]] = defaultdict(list)
        for node in program.graph.nodes:
            if node.op == "call_function":
                found[_key(node)].append(_entries(node))
        return found

    one, other = census(a), census(b)
    return lambda node: one.get(_key(node), []) != other.get(_key(node), [])


def _key(node: fx.Node) -> Any:
    return node.meta.get("stack_trace"), node.target


def _entries(node: fx.Node) -> int:
    return len(node.args[0]) if node.args and isinstance(node.args[0], (list, tuple)) else 0
