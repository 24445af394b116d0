"""At which sizes a model is traced: Python's numbers must differ between two traces, and every loop show several steps.

What a trace reveals of the loops in it: the numbers Python computed from symbolic sizes (trip counts), reads at fixed
places (steps and chunks), and the comparisons of a size with a number, behind which another chunk or branch may lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from seqc import _torch
from seqc.frontend.capture import Capture
from seqc.frontend.signature import Signature

aten = torch.ops.aten

Sizes = dict[str, int]

FEWEST_STEPS = 4
# Of chunks where so few do not show how several carried values hang together.
_MORE_STEPS = 7
# (longer, shorter) lengths a model with loops is traced at; the next pair is tried where too few steps were seen.
LENGTH_PAIRS = ((7, 5), (17, 12))
_LONGEST_TRACE = 4096
_WIDEST_CHUNK = 512
_NARROW_CHUNK = 16
_QUOTIENTS = (FloorDiv, Mod, PythonMod)


def looped_dims(captured: Capture) -> list[str]:
    """The dimensions that Python turned into numbers: loops, or arithmetic outside tensors."""
    symbols = {s for item in captured.log if not isinstance(item.value, bool) for s in item.expr.free_symbols}
    # `while t < x.shape[1]` asks for no number: it shows in reads of many fixed places.
    for axis, start, _ in _fixed_reads(captured):
        if start >= FEWEST_STEPS - 1:
            symbols |= axis.free_symbols
    return [d.name for d in captured.dims if d.symbol in symbols]


def thresholds(captured: Capture, name: str) -> dict[int, str]:
    """The sizes of dimension ``name`` at which a comparison that Python made comes out otherwise, with its line."""
    symbol = _symbol(captured, name)
    found: dict[int, str] = {}
    for item in captured.log:
        if isinstance(item.value, bool) and item.direct and item.expr.free_symbols == {symbol}:
            sizes = [m.args[1] for m in item.expr.atoms(Mod, PythonMod)]
            if _is_linear(item.expr, symbol):
                sizes += sympy.solve(sympy.Eq(item.expr.lhs, item.expr.rhs), symbol)
            for size in sizes:
                if size.is_Integer and size > 1:
                    found.setdefault(int(size), item.line)
    return dict(sorted(found.items()))


def chunk_widths(captured: Capture) -> list[int]:
    """The numbers of steps that the loops may take at a time, as far as the trace tells: the surest first."""
    looped = looped_dims(captured)
    symbols = [_symbol(captured, name) for name in looped]
    read = {w for axis, start, w in _fixed_reads(captured) if axis in symbols and start % w == 0}
    compared = {w for name in looped for w in thresholds(captured, name)}
    return [w for w in dict.fromkeys([*sorted(read), *sorted(compared)]) if 1 < w <= _WIDEST_CHUNK]


def pairs_of_sizes(first: Capture, signature: Signature) -> Iterator[tuple[Sizes, Sizes]]:
    """The pairs of sizes to trace a model with loops at, in the order in which to try them.

    A loop over chunks shows only at lengths of several chunks, so narrow chunks are supposed first; wide ones, which
    need long traces, only after the plain pairs, and more chunks last.
    """
    widths = chunk_widths(first)
    plans: list[tuple[int, int, int | None, int]]
    plans = [(*LENGTH_PAIRS[0], w, FEWEST_STEPS) for w in widths if w <= _NARROW_CHUNK]
    plans += [(*pair, None, FEWEST_STEPS) for pair in LENGTH_PAIRS]
    plans += [(*LENGTH_PAIRS[0], w, FEWEST_STEPS) for w in widths if w > _NARROW_CHUNK]
    plans += [(*LENGTH_PAIRS[1], w, _MORE_STEPS) for w in widths if w <= _NARROW_CHUNK]
    seen: list[tuple[Sizes, Sizes]] = []
    looped = looped_dims(first)
    for long, short, width, fewest in plans:
        pair = _pair(first, signature, looped, long, short, width, fewest)
        in_range = all(signature.clamp(name, sizes[name]) == sizes[name] for sizes in pair for name in looped)
        if pair not in seen and in_range and all(pair[0][name] != pair[1][name] for name in looped):
            seen.append(pair)
            yield pair


def _pair(
    first: Capture, signature: Signature, looped: list[str], long: int, short: int, width: int | None, fewest: int
) -> tuple[Sizes, Sizes]:
    """Two sets of sizes at which every number Python evaluated differs and is ``fewest`` at least.

    ``width`` supposes loops over chunks of that many steps. A last chunk is ragged then, and of another size in each.
    """
    a, b = dict(first.sizes), dict(first.sizes)
    for i, name in enumerate(looped):
        # Neither a size nor its change may be that of another dimension: a number is told from which it comes.
        long, short = long + 5 * i, short + 4 * i
        symbol = _symbol(first, name)
        numbers = [_unbounded(first, s.expr) for s in first.log if not isinstance(s.value, bool)]
        counts = [e for e in numbers if e.free_symbols == {symbol}]
        counts += [FloorDiv(symbol + width - 1, width)] if width else []
        chunks = {int(c.args[1]) for e in counts for c in e.atoms(*_QUOTIENTS) if c.args[1].is_Integer}
        counts = [e for e in counts if int(e.subs(symbol, _LONGEST_TRACE)) >= fewest]
        # Room for a longer one: the clamp of the next size, less one.
        short = signature.clamp(name, signature.clamp(name, short + 1) - 1)
        b[name] = _size(counts, chunks, symbol, short, None, fewest)
        a[name] = _size(counts, chunks, symbol, max(signature.clamp(name, long), b[name] + 1), b[name], fewest)
    return a, b


def _size(counts: list[Any], chunks: set[int], symbol: Any, start: int, other: int | None, fewest: int) -> int:
    """The first size from ``start`` with steps enough, other counts than at ``other``, and other ragged ends."""
    for size in range(start, _LONGEST_TRACE):
        steps = [int(e.subs(symbol, size)) for e in counts]
        if (
            min(steps, default=fewest) >= fewest
            # Ragged chunks of two have one step, always: there one trace has a whole one, so that a difference shows.
            and all(size % w or w == 2 for w in chunks)
            and (other is None or all(size % w != other % w for w in chunks))
            # Of two even sizes a half is the same rounded down and up.
            and (other is None or size % 2 or other % 2)
            and (other is None or all(n != int(e.subs(symbol, other)) for e, n in zip(counts, steps, strict=True)))
        ):
            return size
    return start


def _symbol(captured: Capture, name: str) -> sympy.Symbol:
    return next(d.symbol for d in captured.dims if d.name == name)


def _fixed_reads(captured: Capture) -> list[tuple[Any, int, int]]:
    """(size of the axis, start, width) of every read at a fixed place along an axis of symbolic size."""
    reads = []
    for node in captured.exported.graph.nodes:
        if node.target is aten.select.int and isinstance(node.args[2], int):
            start, end = node.args[2], node.args[2] + 1
        elif node.target is aten.slice.Tensor and len(node.args) == 4:
            start, end = node.args[2], unclamped(node.args[3])
        else:
            continue
        size = node.args[0].meta["val"].shape[node.args[1]]
        if isinstance(size, torch.SymInt) and type(start) is int and type(end) is int and 0 <= start < end < 2**62:
            reads.append((_unbounded(captured, _torch.size_expr(size)), start, end - start))
    return reads


def _unbounded(captured: Capture, expr: Any) -> Any:
    """A size of a trace without the lengths that loops before it, unrolled, have in this trace: n for min(n, 12)."""
    for dim in captured.dims:
        expr = _torch.without_bounds(expr, dim.symbol, captured.sizes[dim.name])
    return expr


def unclamped(bound: Any) -> Any:
    """The number n in ``min(n, size)``, else ``bound``: the ends of slices are clamped to the size anyway."""
    numbers = [a for a in bound.args if type(a) is int] if getattr(bound, "target", None) is torch.sym_min else []
    return numbers[0] if len(numbers) == 1 else bound


def _is_linear(relation: Any, symbol: sympy.Symbol) -> bool:
    if not isinstance(relation, sympy.Rel):
        return False
    difference = relation.lhs - relation.rhs
    return bool(difference.is_polynomial(symbol)) and sympy.degree(difference, symbol) == 1
