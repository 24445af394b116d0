"""From a model to a Program whose named dimensions are symbolic, its loops over time included."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from seqc.errors import UnsupportedModelError
from seqc.frontend.capture import Capture, capture
from seqc.frontend.lengths import looped_dims, pairs_of_sizes, thresholds
from seqc.frontend.merge import merge
from seqc.frontend.normalize import normalize
from seqc.frontend.reroll import reroll
from seqc.frontend.signature import Signature, bind
from seqc.frontend.source import evaluating, traceable
from seqc.ops.recurrence import is_recurrence, propagate
from seqc.program import Program


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
    with evaluating(module):
        return trace_signature(module, bind(module, examples, shapes))


def trace_signature(model: nn.Module, signature: Signature, loops: str = "reroll") -> Program:
    """``trace`` for inputs already bound. ``loops="unroll"`` keeps loops unrolled at the example's length."""
    if loops == "unroll":
        return _unrolled(model, signature)
    first = capture(model, signature, signature.trace_sizes())
    branches = {d.name: tuple(thresholds(first, d.name).items()) for d in first.dims}
    program = _looped(model, signature, first) if looped_dims(first) else first.program
    program.dims = tuple(dataclasses.replace(d, branches=branches[d.name]) for d in program.dims)
    normalize(program)
    return _finished(program)


def _looped(model: nn.Module, signature: Signature, first: Capture) -> Program:
    """The Program of a model with loops: from the first pair of traces that shows a loop, else from one that agrees."""
    agreed: Program | None = None
    problem: UnsupportedModelError | None = None
    longest: dict[str, int] = {}
    for a, b in pairs_of_sizes(first, signature):
        try:
            # A trace is rewritten in place and serves one attempt: the sizes of two attempts differ.
            one = first if a == first.sizes else capture(model, signature, a)
            program = _reroll_pair(one, capture(model, signature, b))
        except UnsupportedModelError as error:
            problem = problem or error
            agreed = None if any(a[d] > longest.get(d, 0) for d in a) else agreed
            continue
        if any(is_recurrence(n) for n in program.graph.nodes):
            return program
        if agreed is None:
            agreed, longest = program, a
    if agreed is not None:
        return agreed
    raise problem or UnsupportedModelError(
        f"the model loops over {', '.join(looped_dims(first))}, whose range leaves no two sizes to trace it at; "
        "leave it fixed or widen it"
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
    fixed = looped_dims(first)
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
