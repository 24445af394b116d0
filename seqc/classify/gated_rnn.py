"""LSTM, GRU and RNN cells, read off the sums of products that a loop's body computes between its activations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from seqc.classify.forms import Factor, Form, Label, NotMultilinear, Term
from seqc.classify.operands import Operands
from seqc.classify.rewrite import Rewritten
from seqc.classify.terms import Terms
from seqc.dependence import computed_from
from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.outside import Outside
from seqc.pieces import joined, piece

aten = torch.ops.aten

_SIGMOID, _TANH, _RELU = aten.sigmoid.default, aten.tanh.default, aten.relu.default
_ACTIVATIONS = frozenset({_SIGMOID, _TANH, _RELU})


@dataclass(frozen=True)
class Gate:
    """A pre-activation ``sign`` * (matrix @ h + the inputs) in a cell of batch and units; ``units`` labels its rows.

    ``matrix`` has the labels ``units`` and ``inner``, that of h. ``reset`` holds what the reset gate multiplies: h or not
    (``before``), and, after the product, ``bias``.
    """

    batch: Label | None
    units: Label
    inner: Label
    matrix: Term
    inputs: tuple[Term, ...]
    bias: tuple[Term, ...] = ()
    sign: float = 1.0


@dataclass(frozen=True)
class Cell:
    """A cell of one of the kinds of ``seqc::gated_rnn``, its gates in the order of that op."""

    kind: str
    carries: tuple[int, ...]
    gates: tuple[Gate, ...]


def as_gated_rnn(loop: Loop, index: int, outside: Outside) -> Rewritten:
    """The cell whose hidden state is carry ``index``. Raises NotMultilinear where there is none."""
    reader = _Reader(loop, index)
    cell = reader.cell()
    mark = loop.emit.mark()
    ops = Operands(outside, reader.terms)
    emit = ops.emit
    gates, biases = zip(*(_parts(ops, gate) for gate in cell.gates), strict=True)
    recurrent = [ops.fixed(gate.matrix.times(gate.sign), [gate.units, gate.inner]) for gate in cell.gates]
    state = loop.carries[index][0]
    initial = loop.carries[cell.carries[-1]][0]
    stacked = [joined(emit, parts, dim) for parts, dim in ((gates, -1), (recurrent, 0), (biases, 0))]
    node = emit(torch.ops.seqc.gated_rnn.default, *stacked, state, initial, cell.kind, loop.reverse)
    steps, final, last_cell = (emit(operator.getitem, node, i) for i in range(3))
    results = {i: steps for i, (value, _) in enumerate(loop.results) if value is reader.following}
    results |= {index: final}
    if cell.kind == "lstm":
        results[cell.carries[-1]] = last_cell
    why = f"a cell of {len(cell.gates)} gates, each of one matrix product of the state"
    return Rewritten("gated_rnn", f"{why}, kind {cell.kind!r}", results, loop.emit.since(mark), cell.carries)


def _parts(ops: Operands, gate: Gate) -> tuple[fx.Node, fx.Node]:
    """The part [T, B, H] of ``gate`` that differs by step, and the bias [H] that is added to the product."""
    size = ops.size(gate.units)
    groups = [[] if gate.batch is None else [gate.batch], [gate.units]]
    total: fx.Node | None = None
    bias: fx.Node | None = None
    for term in gate.inputs:
        fixed = term.support <= {gate.units} and not any(ops.varies(f) for f in term.factors) and not gate.bias
        if fixed:
            bias = _add(ops, bias, ops.vector(term.times(gate.sign), gate.units))
        else:
            total = _add(ops, total, ops.product(term.times(gate.sign), groups, full=True))
    for term in gate.bias:
        bias = _add(ops, bias, ops.vector(term.times(gate.sign), gate.units))
    if total is None:
        raise NotMultilinear("a gate that reads no input")
    if bias is None:
        bias = ops.emit(aten.zeros.default, [size], dtype=total.meta["val"].dtype)
    return total, bias


def _add(ops: Operands, total: fx.Node | None, node: fx.Node) -> fx.Node:
    return node if total is None else ops.emit(aten.add.Tensor, total, node)


class _Reader:
    """Reads the cell off a body. Values behind an activation are factors; so is h."""

    def __init__(self, loop: Loop, index: int) -> None:
        self.loop, self.index = loop, index
        self.h = loop.carries[index][1]
        self.following = loop.next_carries[index]
        if self.h.meta["val"].dim() != 2:
            raise NotMultilinear(f"a state of {self.h.meta['val'].dim()} axes instead of batch and units")
        cut = _activated_pieces(loop)
        self.terms = Terms(loop.body, [self.h], loop.emit.mode)
        for node in loop.operations():
            if node.target in _ACTIVATIONS and self.terms.reads(node):
                self.terms.name(node, self.terms.atom(node))
        for node, activation in cut.items():
            self.terms.name(node, self.terms.form(activation))

    def cell(self) -> Cell:
        if self.following.target in (_TANH, _RELU):
            kind = "rnn_tanh" if self.following.target is _TANH else "rnn_relu"
            return self._closed(Cell(kind, (self.index,), (self._gate(self.following),)))
        products = self._products(self.following)
        if len(products) == 1:
            return self._closed(self._lstm(products[0]))
        return self._closed(self._gru(products))

    def _lstm(self, output: tuple[float, list[fx.Node]]) -> Cell:
        scale, nodes = output
        o, tanh = _pick(nodes, _SIGMOID), _pick(nodes, _TANH)
        if scale != 1 or len(nodes) != 2 or o is None or tanh is None:
            raise NotMultilinear("the next state is no gate times the tanh of a cell")
        cells = [i for i, value in enumerate(self.loop.next_carries) if value is tanh.args[0]]
        if len(cells) != 1:
            raise NotMultilinear("the tanh in the next state is not that of one other carry")
        c = self.loop.carries[cells[0]][1]
        kept, added = None, None
        for factor, parts in self._products(self.loop.next_carries[cells[0]]):
            if factor != 1 or len(parts) != 2:
                raise NotMultilinear("the next cell is not forget * cell + input * candidate")
            if c in parts:
                kept = _pick(parts, _SIGMOID)
            else:
                added = (_pick(parts, _SIGMOID), _pick(parts, _TANH))
        if kept is None or added is None or None in added:
            raise NotMultilinear("the next cell is not forget * cell + input * candidate")
        gates = [self._gate(n) for n in (added[0], kept, added[1], o) if n is not None]
        return Cell("lstm", (self.index, cells[0]), tuple(gates))

    def _gru(self, products: list[tuple[float, list[fx.Node]]]) -> Cell:
        """(1 - z) n + z h, or the other way round; multiplied out in any way."""
        found = {(scale, frozenset(nodes)) for scale, nodes in products}
        nodes = {node for _, parts in products for node in parts}
        z, n = _pick(nodes, _SIGMOID), _pick(nodes, _TANH)
        if z is None or n is None or len(products) != 3:
            raise NotMultilinear("the next state is no mean, by a gate, of the state and a candidate")
        for kept, new, sign in ((self.h, n, 1.0), (n, self.h, -1.0)):
            # z kept + (1 - z) new; where z weighs the candidate, 1 - sigmoid(x) is sigmoid(-x)
            if found == {(1.0, frozenset([z, kept])), (1.0, frozenset([new])), (-1.0, frozenset([z, new]))}:
                update = self._gate(z, sign)
                candidate, reset, kind = self._candidate(n)
                return Cell(kind, (self.index,), (self._gate(reset), update, candidate))
        raise NotMultilinear("the next state is no mean, by a gate, of the state and a candidate")

    def _candidate(self, node: fx.Node) -> tuple[Gate, fx.Node, str]:
        """The candidate's gate without the reset gate, that gate's node, and the kind of GRU."""
        form = self._form(node.args[0])
        resets = {f.node for t in form.terms for f in t.factors if f.node.target is _SIGMOID and self._reads(f)}
        if len(resets) != 1:
            raise NotMultilinear("a candidate with no reset gate of its own")
        (reset,) = resets
        units = form.axes[-1][0] if form.axes[-1] else None
        plain, biases, before = [], [], set()
        for term in form.terms:
            factor = next((f for f in term.factors if f.node is reset), None)
            if factor is None:
                plain.append(term)
                continue
            rest = Term(term.scale, tuple(f for f in term.factors if f is not factor))
            if self._state(rest) is None:
                biases.append(rest)
            else:
                before.add(factor.labels[-1] != units)
                plain.append(rest)
        if len(before) != 1 or (biases and True in before):
            raise NotMultilinear(
                "a reset gate that does not multiply the state, or its matrix product, in the candidate"
            )
        (first,) = before
        gate = self._split(Form(form.axes, tuple(plain)), tuple(biases))
        return gate, reset, "gru_reset_before" if first else "gru"

    def _gate(self, node: fx.Node, sign: float = 1.0) -> Gate:
        return self._split(self._form(node.args[0]), (), sign)

    def _split(self, form: Form, bias: tuple[Term, ...], sign: float = 1.0) -> Gate:
        """``form`` as one matrix product of h and terms that read no state."""
        if len(form.axes) != 2 or any(len(axis) > 1 for axis in form.axes) or not form.axes[1]:
            raise NotMultilinear("a gate whose axes are not batch and units")
        batch = form.axes[0][0] if form.axes[0] else None
        (units,) = form.axes[1]
        product: Gate | None = None
        inputs = []
        for term in form.terms:
            state = self._state(term)
            if state is None:
                if any(self._reads(f) for f in term.factors):
                    raise NotMultilinear("a gate that another gate multiplies")
                if any(self.loop.carries_behind(f.node) for f in term.factors):
                    raise NotMultilinear("a gate that reads another state than its own")
                inputs.append(term)
                continue
            rest = Term(term.scale, tuple(f for f in term.factors if f is not state))
            inner = state.labels[1]
            if product or inner is None or state.labels[0] != batch or rest.support != {units, inner} or inner == units:
                raise NotMultilinear("a gate that is not one matrix product of the state")
            if any(self._reads(f) for f in rest.factors):
                raise NotMultilinear("a matrix that depends on the state")
            product = Gate(batch, units, inner, rest, (), bias, sign)
        if product is None:
            raise NotMultilinear("a gate that does not read the state")
        return Gate(batch, units, product.inner, product.matrix, tuple(inputs), bias, sign)

    def _closed(self, cell: Cell) -> Cell:
        """``cell``, where the rest of the loop reads of it its next state alone."""
        reading = computed_from(self.loop.carries[i][1] for i in cell.carries)
        allowed = {self.following, *(self.loop.next_carries[i] for i in cell.carries)}
        for i, (value, _) in enumerate(self.loop.results):
            own = i in cell.carries or (i >= len(self.loop.carries) and value is self.following)
            if value in reading and not (own and value in allowed):
                raise NotMultilinear("more than its next state is read")
        return cell

    def _products(self, node: fx.Node) -> list[tuple[float, list[fx.Node]]]:
        """``node`` as a sum of elementwise products."""
        form = self._form(node)
        result = []
        for term in form.terms:
            for factor in term.factors:
                if (
                    tuple(() if label is None else (label,) for label in factor.labels) != form.axes
                    or factor.power != 1
                ):
                    raise NotMultilinear("a product that is not elementwise")
            result.append((term.scale, [f.node for f in term.factors]))
        return result

    def _form(self, node: object) -> Form:
        if not isinstance(node, fx.Node):
            raise NotMultilinear("an activation of a number")
        return self.terms.form(node)

    def _state(self, term: Term) -> Factor | None:
        return next((f for f in term.factors if f.node is self.h), None)

    def _reads(self, factor: Factor) -> bool:
        return self.terms.reads(factor.node)


def _activated_pieces(loop: Loop) -> dict[fx.Node, fx.Node]:
    """For each part of a value behind an activation, the same activation of the part, written in the body."""
    emit = Emitter(loop.body, loop.emit.mode)
    written = {}
    for node in loop.operations():
        part = piece(node)
        if part is not None and part.source.target in _ACTIVATIONS:
            with emit.before(node):
                source = emit(aten.slice.Tensor, part.source.args[0], part.axis, part.start, part.end)
                written[node] = emit(part.source.target, source)
    return written


def _pick(nodes: Sequence[fx.Node] | set[fx.Node], target: object) -> fx.Node | None:
    """The one of ``nodes`` that calls ``target``; None where there are none or several."""
    found = [n for n in nodes if n.target is target]
    return found[0] if len(found) == 1 else None
