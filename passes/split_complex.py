"""SplitComplex: complex tensors become pairs of real tensors."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.complex_rules import Call, rewrite
from seqc.emit import Emitter
from seqc.errors import UnsupportedOpError
from seqc.ops.recurrence import is_recurrence, parts, recurrence_shapes
from seqc.pairs import REAL, Arithmetic, Pair
from seqc.program import Program, flat_args, module_path, source_line
from seqc.rewrite import remove_dead_code

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitComplex:
    """Rewrites every complex tensor into its real and imaginary part, because ONNX has no complex arithmetic.

    Complex weights become two weights; carries, xs, ys and invariants of recurrences become two each; a complex input
    or output of the model keeps its name, with a trailing axis of 2 (real, imaginary). Fourier transforms of any length
    become matrix products (see :mod:`seqc.dft` for why). An operator on complex values without a real form is refused
    with UnsupportedOpError. A Program without complex values is not changed.

    ``tolerance``: the same arithmetic in another order; divisions and powers go through |z|^2 and polar form, and
    transforms through plain sums, each within a few float32 roundings per term.
    """

    name: ClassVar[str] = "split_complex"
    tolerance: ClassVar[float] = 1e-5

    def __call__(self, program: Program) -> int:
        if not any(_is_complex(n) for gm in program.graph_modules() for n in gm.graph.nodes):
            return 0
        splitter = _Splitter(program.graph_module, program.fake_mode)
        _split_weights(program, splitter)
        _split_inputs(program, splitter)
        splitter.run()
        _join_outputs(program, splitter)
        splitter.erase()
        remove_dead_code(program)
        return splitter.changes


class _Splitter:
    """Rewrites one graph, and the bodies of its recurrences. ``pairs`` holds what each complex node became."""

    def __init__(self, gm: fx.GraphModule, mode: Any) -> None:
        self.gm = gm
        self.emit = Emitter(gm, mode)
        self.math = Arithmetic(self.emit)
        self.pairs: dict[fx.Node, Pair | list[Pair]] = {}
        self.matrices: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.replaced: list[fx.Node] = []
        self.changes = 0

    def run(self) -> None:
        """Rewrite every operation that reads or makes complex values."""
        for node in list(self.gm.graph.nodes):
            if node.op != "call_function" or node in self.pairs:
                continue
            if is_recurrence(node):
                if any(_is_complex(n) for n in _all_nodes(parts(node).body)):
                    self._recurrence(node)
            elif _is_complex(node) or any(_is_complex(a) for a in node.all_input_nodes):
                with self.emit.before(node):
                    self._operation(node)

    def erase(self) -> None:
        """Remove the complex nodes, which nothing reads any more."""
        for node in reversed(self.replaced):
            if node.op == "placeholder" or not node.users:
                self.gm.graph.erase_node(node)
        self.gm.recompile()

    def both(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The real nodes that stand for ``node``: two for a complex one, itself for a real one."""
        if node not in self.pairs:
            return (node,)
        pair = self.pairs[node]
        assert isinstance(pair, Pair)
        return self.math.both(pair)

    def _operation(self, node: fx.Node) -> None:
        self.changes += 1
        if node.target is operator.getitem:
            source = self.pairs[node.args[0]]  # type: ignore[index]
            assert isinstance(source, list)
            self._became(node, source[int(node.args[1])])  # type: ignore[arg-type]
            return

        def known(operand: fx.Node) -> Any:
            return self.pairs.get(operand, operand)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
        if node.target is aten.view_as_real.default:
            self._read_parts(node)
        result = rewrite(Call(self.emit, node, tuple(args), dict(kwargs), self.matrices))
        if result is None:
            raise UnsupportedOpError(_refusal(node))
        self._became(node, result)

    def _read_parts(self, node: fx.Node) -> None:
        """Let who selects a part of view_as_real (as .real and .imag do) read that part itself."""
        pair, rank = self.pairs[node.args[0]], node.meta["val"].dim()  # type: ignore[index]
        assert isinstance(pair, Pair)
        for user in list(node.users):
            if user.target is aten.select.int and user.args[1] in (-1, rank - 1) and user.args[2] in (0, 1):
                user.replace_all_uses_with(self.math.both(pair)[user.args[2]])  # type: ignore[index]
                self.gm.graph.erase_node(user)

    def _became(self, node: fx.Node, result: Pair | list[Pair] | fx.Node) -> None:
        self.replaced.append(node)
        if isinstance(result, fx.Node):
            node.replace_all_uses_with(result)
        elif isinstance(result, Pair):
            self.pairs[node] = self.math.shaped(result, node.meta["val"])
        else:
            self.pairs[node] = result

    def _recurrence(self, node: fx.Node) -> None:
        p = parts(node)
        body = _Splitter(p.body, self.emit.mode)
        for placeholder in [n for n in p.body.graph.nodes if n.op == "placeholder"]:
            body.split_placeholder(placeholder)
        body.run()
        results = [*p.next_carries, *p.ys]
        output = p.body.graph.output_node()
        with body.emit.before(output):
            split = [body.both(r) for r in results]
        output.args = (tuple(part for group in split for part in group),)
        body.erase()
        with self.emit.before(node):
            groups = [tuple(part for v in group for part in self.both(v)) for group in (p.carries, p.xs, p.invariants)]
            self._regrouped(node, p.trip, groups, p.reverse)
        first = 0
        readers = {int(u.args[1]): u for u in node.users if u not in self.pairs}  # type: ignore[arg-type]
        for i, group in enumerate(split):
            reader = readers.get(i)
            if reader is not None and len(group) == 1:
                reader.args = (node, first)
            elif reader is not None:
                with self.emit.before(reader):
                    new = [self.emit(operator.getitem, node, first + side) for side in (0, 1)]
                self.pairs[reader] = Pair(new[0], new[1])
                self.replaced.append(reader)
            first += len(group)
        self.changes += 1 + body.changes

    def _regrouped(self, node: fx.Node, trip: Any, groups: list[tuple[fx.Node, ...]], reverse: bool) -> None:
        carries, xs, invariants = groups
        body = parts(node).body
        node.args = (node.args[0], trip, carries, xs, invariants, reverse)
        node.kwargs = {}
        steps = trip.meta["val"] if isinstance(trip, fx.Node) else trip
        values = [[n.meta["val"] for n in group] for group in groups]
        node.meta["val"] = self.emit.compute(
            lambda: recurrence_shapes(body, steps, values[0], values[1], values[2], reverse)
        )

    def split_placeholder(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Put two real placeholders in the place of a complex one."""
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype not in REAL:
            return (node,)
        new = []
        with self.gm.graph.inserting_before(node):
            for suffix in ("real", "imag"):
                part = self.gm.graph.placeholder(f"{node.name}_{suffix}")
                part.meta["val"] = self.emit.compute(lambda: value.new_empty(value.shape, dtype=REAL[value.dtype]))
                new.append(part)
        self.pairs[node] = Pair(new[0], new[1])
        self.replaced.append(node)
        return tuple(new)


def _split_weights(program: Program, splitter: _Splitter) -> None:
    weights, names = {}, {}
    for node, tensor in zip(program.weight_nodes, list(program.weights.values()), strict=True):
        name = program.weight_names.get(node.name, node.name)
        if tensor.dtype not in REAL:
            weights[node.name], names[node.name] = tensor, name
            continue
        new = splitter.split_placeholder(node)
        whole = torch.view_as_real(tensor.detach().resolve_conj())
        for i, (part, suffix) in enumerate(zip(new, ("real", "imag"), strict=True)):
            weights[part.name] = whole[..., i].contiguous()
            names[part.name] = f"{name}.{suffix}"
    count = len(program.weights)
    program.weights, program.weight_names = weights, names
    splitter.changes += len(weights) - count


def _split_inputs(program: Program, splitter: _Splitter) -> None:
    nodes = [n for n in program.placeholders if n.name not in program.weights and n not in splitter.pairs]
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    ports = []
    for node, port in zip(nodes, program.inputs, strict=True):
        if port.dtype not in REAL:
            ports.append(port)
            continue
        value, real = node.meta["val"], REAL[port.dtype]
        with program.graph.inserting_before(node):
            new = program.graph.placeholder(f"{node.name}_pair")
        new.meta["val"] = splitter.emit.compute(lambda v=value, r=real: v.new_empty((*v.shape, 2), dtype=r))
        with splitter.emit.before(first):
            splitter.pairs[node] = Pair(*(splitter.emit(aten.select.int, new, -1, i) for i in (0, 1)))
        splitter.replaced.append(node)
        ports.append(dataclasses.replace(port, dtype=real, shape=(*port.shape, 2)))
        program.notes.append(f"input {port.name!r} is complex: its last axis, of size 2, holds real and imaginary part")
    program.inputs = tuple(ports)
    program.states = tuple(
        dataclasses.replace(s, initial=torch.view_as_real(s.initial.resolve_conj())) if s.initial.is_complex() else s
        for s in program.states
    )


def _join_outputs(program: Program, splitter: _Splitter) -> None:
    output = program.output_node
    values, ports = [], []
    for node, port in zip(program.output_nodes, program.outputs, strict=True):
        if node in splitter.pairs:
            with splitter.emit.before(output):
                joined = splitter.emit(aten.stack.default, list(splitter.both(node)), -1)
            values.append(joined)
            ports.append(dataclasses.replace(port, dtype=REAL[port.dtype], shape=(*port.shape, 2)))
            program.notes.append(
                f"output {port.name!r} is complex: its last axis, of size 2, holds real and imaginary part"
            )
        else:
            values.append(node)
            ports.append(port)
    output.args = (tuple(values),)
    program.outputs = tuple(ports)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(v, torch.Tensor) and v.dtype in REAL for v in leaves)


def _all_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]


def _refusal(node: fx.Node) -> str:
    where = " ".join(part for part in (module_path(node), source_line(node)) if part)
    kinds = [str(a.meta["val"].dtype) for a in flat_args(node) if isinstance(a, fx.Node) and _is_complex(a)]
    return f"{node.target} on {', '.join(kinds) or 'complex values'} has no real form" + (
        f" ({where})" if where else ""
    )
