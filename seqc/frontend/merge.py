"""Makes one symbolic Program of two rerolled traces: the numbers in which they differ are functions of the sizes.

After rerolling, traces at two lengths are the same graph up to integers (trip counts, ends of slices, shapes). Each such
integer is solved for as ``a * e + b``, or ``(e + b) // m``, of a dimension or of an expression Python evaluated while
tracing. What does not fit is refused: it would be a size frozen at the traced length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from seqc import _torch
from seqc.errors import UnsupportedModelError
from seqc.frontend.capture import Capture
from seqc.frontend.lengths import chunk_widths, looped_dims
from seqc.ops.recurrence import propagate
from seqc.program import Program, provenance
from seqc.rewrite import sort_topologically

aten = torch.ops.aten


def merge(a: Capture, b: Capture, reasons: list[str]) -> Program:
    """The Program of ``a`` with every number that differs from ``b``'s made symbolic.

    Raises UnsupportedModelError where the traces differ in more than numbers; ``reasons`` says which loops were not
    understood.
    """
    solver = _Solver(a, b)
    pairs = list(_pairs(a.program.graph, b.program.graph, reasons))
    for node, other in pairs:
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
        others, other_spec = pytree.tree_flatten((other.args, dict(other.kwargs)))
        if spec != other_spec or node.target != other.target or node.op != other.op:
            raise _different(node, other, reasons)
        solved = [solver.solve(x, y, node, reasons) for x, y in zip(leaves, others, strict=True)]
        if any(x is not y for x, y in zip(solved, leaves, strict=True)):
            args, kwargs = pytree.tree_unflatten(solved, spec)
            node.args, node.kwargs = args, kwargs
    for gm, other_gm in zip(a.program.graph_modules(), b.program.graph_modules(), strict=True):
        if gm is not a.program.graph_module:
            _require_equal(gm, other_gm, reasons)
    sort_topologically(a.program.graph)
    propagate(a.program.graph_module)
    a.program.graph_module.recompile()
    return a.program


def _pairs(a: fx.Graph, b: fx.Graph, reasons: list[str]) -> Iterator[tuple[fx.Node, fx.Node]]:
    left, right = list(a.nodes), list(b.nodes)
    for node, other in zip(left, right, strict=False):
        if node.op != other.op or (node.op in ("call_function", "placeholder") and node.target != other.target):
            raise _different(node, other, reasons)
        yield node, other
    if len(left) != len(right):
        longer, count = (left, len(right)) if len(left) > len(right) else (right, len(left))
        raise _different(longer[count - 1], longer[count], reasons)


def _different(node: fx.Node, other: fx.Node, reasons: list[str]) -> UnsupportedModelError:
    why = reasons[0] if reasons else f"traces at two lengths differ at {provenance(node) or node.format_node()}"
    return UnsupportedModelError(
        f"a loop over a dynamic dimension could not be made symbolic: {why}. Try: the same operations in every step "
        "(branches on t as masks), or fix the length and pass the option loops=unroll"
    )


def _require_equal(gm: fx.GraphModule, other: fx.GraphModule, reasons: list[str]) -> None:
    for node, twin in zip(gm.graph.nodes, other.graph.nodes, strict=True):
        leaves = [x for x in pytree.tree_leaves((node.args, dict(node.kwargs))) if not isinstance(x, fx.Node)]
        others = [x for x in pytree.tree_leaves((twin.args, dict(twin.kwargs))) if not isinstance(x, fx.Node)]
        if node.op != twin.op or (node.op != "get_attr" and node.target != twin.target) or leaves != others:
            raise _different(node, twin, reasons)


class _Quotient(NamedTuple):
    """``expr`` divides by ``divisor`` and is ``u`` in the one trace, ``v`` in the other."""

    expr: Any
    divisor: int
    u: int
    v: int
    usual: bool


class _Solver:
    """Finds the expression behind a number that differs between the traces."""

    def __init__(self, a: Capture, b: Capture) -> None:
        self.program = a.program
        sizes_a = {d.symbol: a.sizes[d.name] for d in a.program.dims}
        sizes_b = {d.symbol: b.sizes[d.name] for d in a.program.dims}
        logged = [s.expr for s in a.log if not isinstance(s.value, bool)]
        symbols = [d.symbol for d in a.program.dims if d.name in looped_dims(a)]
        # Whole chunks of w steps before a last one that may be ragged: ceil(s / w) - 1.
        chunks = [FloorDiv(s - 1, w) for s in symbols for w in chunk_widths(a)]
        exprs = dict.fromkeys([*sizes_a, *(e for e in logged if isinstance(e, sympy.Expr)), *chunks])
        self.candidates = [(e, _value(e, sizes_a), _value(e, sizes_b)) for e in exprs if e.free_symbols <= set(sizes_a)]
        self.candidates = [c for c in self.candidates if c[1] != c[2]]
        self.nodes: dict[Any, fx.Node] = {}

    def solve(self, x: Any, y: Any, node: fx.Node, reasons: list[str]) -> Any:
        if isinstance(x, fx.Node) or isinstance(y, fx.Node):
            if type(x) is not type(y):
                raise _different(node, node, reasons)
            return x
        if type(x) is type(y) and (x == y or (x != x and y != y)):
            return x
        expr = self.expression(x, y) if type(x) is int and type(y) is int else None
        if expr is None:
            raise UnsupportedModelError(
                f"the number {x} at {provenance(node) or node.name} is {y} at another length; compute it from tensor "
                f"shapes with torch operations, so that it can stay symbolic"
            )
        return self.node_of(expr)

    def expression(self, x: int, y: int) -> Any:
        """The simplest fit: a multiple, a sum, a usual quotient, a multiple and a sum, any quotient, an end of steps."""
        for expr, u, v in self.candidates:
            if u and v and x % u == 0 and x // u == y // v and y % v == 0:
                return (x // u) * expr
        for expr, u, v in self.candidates:
            if x - y == u - v:
                return expr + (x - u)
        usual = [q for q in self._quotients() if q.usual]
        for q in usual:
            if (q.u, q.v) == (x, y):
                return q.expr
        for expr, u, v in self.candidates:
            a, rest = divmod(x - y, u - v)
            # Two points fit any line: a number of chunks may be multiplied by their width only.
            if rest == 0 and (expr.is_Symbol or a in {int(c.args[1]) for c in expr.atoms(FloorDiv)}):
                return a * expr + (x - a * u)
        for q in self._quotients():
            if (q.u, q.v) == (x, y):
                return q.expr
        for q in self._quotients():
            if x - q.divisor * q.u == y - q.divisor * q.v:
                return q.divisor * q.expr + (x - q.divisor * q.u)
        return None

    def _quotients(self) -> Iterator[_Quotient]:
        """Candidates divided by a small number: rounded down and up, then shifted before they are rounded."""
        for m in range(2, 9):
            for expr, u, v in self.candidates:
                for b in (m - 1, 0, *range(-m, m)):
                    usual = b in (m - 1, 0) and bool(expr.is_Symbol)
                    yield _Quotient(FloorDiv(expr + b, m), m, (u + b) // m, (v + b) // m, usual)

    def node_of(self, expr: Any) -> Any:
        """A graph node that computes ``expr`` from the sizes of the inputs."""
        if expr not in self.nodes:
            graph = self.program.graph
            with graph.inserting_before(_first_operation(graph)):
                symbols = {d.symbol: self.size_of(d.symbol) for d in self.program.dims if d.symbol in expr.free_symbols}
                tracer = fx.proxy.GraphAppendingTracer(graph)
                proxies = {s: fx.Proxy(n, tracer) for s, n in symbols.items()}
                self.nodes[expr] = _torch.emit_expr(expr, proxies).node
        return self.nodes[expr]

    def size_of(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol not in self.nodes:
            for node in self.program.input_nodes:
                for axis, size in enumerate(node.meta["val"].shape):
                    if _torch.size_expr(size) == symbol:
                        self.nodes[symbol] = self.program.graph.call_function(aten.sym_size.int, (node, axis))
                        return self.nodes[symbol]
        return self.nodes[symbol]


def _first_operation(graph: fx.Graph) -> fx.Node:
    node: fx.Node = next(n for n in graph.nodes if n.op != "placeholder")
    return node


def _value(expr: Any, sizes: dict[sympy.Symbol, int]) -> int:
    return int(expr.subs(sizes))
