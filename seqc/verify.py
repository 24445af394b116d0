"""Structural verification of a Program: a table of small rules, run after the frontend and after every pass."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc.errors import VerificationError
from seqc.ops.choose import choice, inputs_of, is_choice, results_of
from seqc.ops.recurrence import is_recurrence, parts
from seqc.program import Program, flat_args, module_path, source_line
from seqc.text import lines

Size = Any
_NEIGHBOURS = 2
_SAMPLES = (5, 11, 64)
_SYMBOLIC = frozenset(getattr(torch, name) for name in dir(torch) if name.startswith("sym_"))
# What seqc._torch.emit_expr writes for floor and ceiling of sizes.
_ROUNDING = frozenset({math.floor, math.ceil, math.trunc})


@dataclass(frozen=True)
class Problem:
    """A broken rule: at which node (None: the Program as a whole), and what is wrong."""

    node: fx.Node | None
    message: str


Rule = Callable[[Program, fx.GraphModule], Iterator[Problem]]


def verify(program: Program) -> None:
    """Check every invariant of ``program``, in nested bodies too.

    Raises VerificationError with the rule, the node, its source line, and the lines around it in the text form.
    """
    for gm in reversed(list(program.graph_modules())):  # bodies before the recurrences that rely on them
        rules = RULES if gm is program.graph_module else BODY_RULES
        for rule in rules:
            for problem in rule(program, gm):
                raise VerificationError(_report(program, rule, problem))


def _report(program: Program, rule: Rule, problem: Problem) -> str:
    name = rule.__name__.strip("_").replace("_", "-")
    if problem.node is None:
        return f"invalid program, rule {name}: {problem.message}"
    where = " ".join(part for part in (module_path(problem.node), source_line(problem.node)) if part)
    head = f"invalid program, rule {name}: {problem.node.name}: {problem.message}" + (f" ({where})" if where else "")
    shown = list(lines(program))
    at = next((i for i, (node, _) in enumerate(shown) if node is problem.node), None)
    if at is None:
        return head
    near = range(max(at - _NEIGHBOURS, 0), min(at + _NEIGHBOURS + 1, len(shown)))
    return "\n".join([head, *(("  > " if i == at else "    ") + shown[i][1] for i in near)])


def placeholders(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """The placeholders come first in the graph: the weights by name in their order, then one per input."""
    found = program.placeholders
    names = [n.name for n in found[: len(program.weights)]]
    if names != list(program.weights):
        yield Problem(None, f"the first placeholders are {names}, the weights are {list(program.weights)}")
    if len(found) != len(program.weights) + len(program.inputs):
        yield Problem(
            None, f"{len(found)} placeholders for {len(program.weights)} weights and {len(program.inputs)} inputs"
        )
    yield from leading_placeholders(program, gm)


def leading_placeholders(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """No placeholder stands behind an operation."""
    operation = None
    for node in gm.graph.nodes:
        if node.op == "placeholder" and operation is not None:
            yield Problem(node, f"a placeholder behind the operation {operation.name}")
        elif node.op == "call_function":
            operation = node


def values(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """Every node carries meta["val"]: a tensor, a number, or a flat list of these."""
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        if "val" not in node.meta:
            yield Problem(node, 'it has no meta["val"]')
            continue
        value = node.meta["val"]
        for leaf in value if isinstance(value, (tuple, list)) else (value,):
            known = (torch.Tensor, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
            if leaf is not None and not isinstance(leaf, known):
                yield Problem(node, f'its meta["val"] holds a {type(leaf).__name__}')


def arguments(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """Arguments are earlier nodes of the same graph."""
    earlier: set[fx.Node] = set()
    for node in gm.graph.nodes:
        for arg in flat_args(node):
            if isinstance(arg, fx.Node) and arg not in earlier:
                other = "is of another graph" if arg.graph is not gm.graph else "comes later"
                yield Problem(node, f"its argument {arg.name} {other}")
        earlier.add(node)


def output(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """The last node, and no other, is the output: one flat tuple of nodes."""
    found = [n for n in gm.graph.nodes if n.op == "output"]
    if len(found) != 1 or next(reversed(gm.graph.nodes)) is not found[0]:
        yield Problem(None, f"{len(found)} output nodes; exactly one is needed, at the end")
        return
    args = found[0].args
    flat = len(args) == 1 and isinstance(args[0], tuple) and all(isinstance(v, fx.Node) for v in args[0])
    if not flat:
        yield Problem(found[0], "it does not return one flat tuple of nodes")


def targets(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """Operations are ATen or custom overloads, Python operators on sizes, torch.sym_* functions, a recurrence or a choice."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            target = str(node.target)
            module = dict(gm.named_modules()).get(target)
            if not isinstance(module, fx.GraphModule):
                yield Problem(node, f"{target!r} is not a nested graph; tensors are weights, not attributes")
        elif node.op != "call_function":
            yield Problem(node, f"{node.op} nodes are not allowed")
        elif not _known_target(node):
            yield Problem(node, f"unknown operation {node.target!r}")


def _known_target(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) or is_recurrence(node) or is_choice(node):
        return True
    name = getattr(target, "__name__", "")
    return target in _SYMBOLIC or target in _ROUNDING or getattr(operator, name, None) is target


def weights(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """The tensor of each weight has its placeholder's dtype and shape."""
    for node, tensor in zip(program.weight_nodes, program.weights.values(), strict=False):
        value = node.meta["val"]
        if value.dtype != tensor.dtype or not same_shape(value.shape, tensor.shape):
            yield Problem(node, f"its value is {_show(value)}, the weight is {_show(tensor)}")


def ports(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """Ports agree in number, dtype, rank and shape with the values of their nodes."""
    if len(program.output_nodes) != len(program.outputs):
        yield Problem(None, f"{len(program.output_nodes)} outputs for {len(program.outputs)} ports")
    names = {d.name: sympy.Symbol(d.name) for d in program.dims}
    for node, port in (
        *zip(program.input_nodes, program.inputs, strict=False),
        *zip(program.output_nodes, program.outputs, strict=False),
    ):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            yield Problem(node, f"port {port.name!r} is a {type(value).__name__}, not a tensor")
            continue
        shape = program.shape_of(value)
        if value.dtype != port.dtype or not same_shape(_parsed(shape, names), _parsed(port.shape, names)):
            yield Problem(node, f"port {port.name!r} is {port.dtype}{port.shape}, its value is {value.dtype}{shape}")


def states(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """A state is an input and an output by its names, behind the model's own, and its first value is of the input's type."""
    given = program.inputs[len(program.given_inputs) :]
    following = program.outputs[len(program.own_outputs) :]
    names = [*(s.name for s in program.states), *(s.next_name for s in program.states)]
    if [p.name for p in (*given, *following)] != names:
        yield Problem(None, "the last inputs and outputs are not those of the states")
        return
    for state, port in zip(program.states, given, strict=True):
        if state.initial.dtype != port.dtype or state.initial.dim() != len(port.shape):
            shape = tuple(state.initial.shape)
            yield Problem(
                None, f"state {port.name!r} is {port.dtype}{port.shape}, its first value {state.initial.dtype}{shape}"
            )


def _parsed(shape: tuple[int | str, ...], names: dict[str, sympy.Symbol]) -> tuple[Any, ...]:
    """Sizes as sympy expressions; one that cannot be read stands for itself only."""
    result = []
    for size in shape:
        try:
            result.append(sympy.sympify(size, locals=names))
        except (sympy.SympifyError, TypeError, SyntaxError):
            result.append(sympy.Symbol(str(size)))
    return tuple(result)


def _each(
    gm: fx.GraphModule, kind: Callable[[fx.Node], bool], faults: Callable[[fx.Node], Iterator[str]]
) -> Iterator[Problem]:
    """The faults of the nodes of a kind."""
    for node in filter(kind, gm.graph.nodes):
        yield from (Problem(node, message) for message in faults(node))


def recurrences(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """A recurrence and its body agree: arity, carries in and out, xs and ys with time at axis 0, read by getitem."""
    yield from _each(gm, is_recurrence, _recurrence)


def _recurrence(node: fx.Node) -> Iterator[str]:
    try:
        p = parts(node)
    except Exception as error:
        yield f"its arguments are not (body, trip, carries, xs, invariants, reverse): {error}"
        return
    inputs = [n for n in p.body.graph.nodes if n.op == "placeholder"]
    given = (*p.carries, *p.xs, *p.invariants)
    if len(inputs) != len(given):
        yield f"its body takes {len(inputs)} values, {len(given)} are given"
        return
    results = p.body.graph.output_node().args[0]
    if not isinstance(results, tuple) or len(results) < len(p.carries):
        yield f"its body does not return {len(p.carries)} next carries"
        return
    trip = p.trip.meta["val"] if isinstance(p.trip, fx.Node) else p.trip
    if not isinstance(trip, (int, torch.SymInt)):
        yield f"its trip count is a {type(trip).__name__}"
        return
    for i, x in enumerate(p.xs):
        shape = x.meta["val"].shape
        if not shape or not same_shape(shape[:1], (trip,)):
            yield f"x {i} is {_show(x.meta['val'])}, axis 0 is not the trip count {trip}"
    expected = [v.meta["val"] for v in given]
    steps = [False] * len(p.carries) + [True] * len(p.xs) + [False] * len(p.invariants)
    for placeholder, value, step in zip(inputs, expected, steps, strict=True):
        if not _fits(placeholder.meta["val"], value, lead=(trip,) if step else ()):
            yield f"its body takes {_show(placeholder.meta['val'])} as {placeholder.name}, {_show(value)} is given"
    vals = [v.meta["val"] for v in results if isinstance(v, fx.Node)]
    for i, (start, after) in enumerate(zip(p.carries, vals, strict=False)):
        if not _fits(after, start.meta["val"]):
            yield f"carry {i} is {_show(start.meta['val'])} before and {_show(after)} after a step"
    own = node.meta["val"]
    if not isinstance(own, (tuple, list)) or len(own) != len(vals):
        yield f"its value is not a tuple of the {len(vals)} results"
        return
    for i, (value, result) in enumerate(zip(vals, own, strict=True)):
        if not _fits(value, result, lead=() if i < len(p.carries) else (trip,)):
            yield f"result {i} is {_show(result)}, the body gives {_show(value)}"
    for user in node.users:
        if user.target is not operator.getitem:
            yield f"{user.name} reads it other than by getitem"


def choices(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """A choice and its two bodies agree: they take its operands and return as many values of the same dtypes and ranks."""
    yield from _each(gm, is_choice, _choice)


def _choice(node: fx.Node) -> Iterator[str]:
    try:
        chosen = choice(node)
    except Exception as error:
        yield f"its arguments are not (short, long, size, most, operands): {error}"
        return
    if not isinstance(chosen.size.meta["val"], torch.SymInt):
        yield "it does not choose by a size"
    for name, body in zip(("short", "long"), chosen.bodies, strict=True):
        inputs = [n.meta["val"] for n in inputs_of(body)]
        if len(inputs) != len(chosen.operands):
            yield f"its {name} body takes {len(inputs)} values, {len(chosen.operands)} are given"
            return
        for value, operand in zip(inputs, chosen.operands, strict=True):
            if not _fits(value, operand.meta["val"]):
                yield f"its {name} body takes {_show(value)}, {_show(operand.meta['val'])} is given"
        given, own = [n.meta["val"] for n in results_of(body)], node.meta["val"]
        if [(v.dtype, v.dim()) for v in given] != [(v.dtype, v.dim()) for v in own]:
            yield f"its {name} body gives {', '.join(map(_show, given))}, not {', '.join(map(_show, own))}"
        elif name == "long" and not all(map(_fits, given, own)):
            yield f"its value is not what its long body gives: {', '.join(map(_show, given))}"


def _fits(step: Any, whole: Any, lead: tuple[Any, ...] = ()) -> bool:
    """Whether ``whole`` is ``step``, with the axes ``lead`` in front."""
    if not isinstance(step, torch.Tensor) or not isinstance(whole, torch.Tensor):
        return not lead and type(step) is type(whole) and same_shape((step,), (whole,))
    return step.dtype == whole.dtype and same_shape((*lead, *step.shape), whole.shape)


def lint(program: Program, gm: fx.GraphModule) -> Iterator[Problem]:
    """torch.fx's own check of the graph."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        yield Problem(None, str(error).strip().splitlines()[0])


def same_shape(a: Any, b: Any) -> bool:
    """Whether two shapes are equal for every size: as expressions, or, in different spelling, at several sizes."""
    left, right = [_expr(s) for s in a], [_expr(s) for s in b]
    return len(left) == len(right) and all(map(_same_size, left, right))


def _same_size(a: Any, b: Any) -> bool:
    if a == b:
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return False
    points = [{s: n + 6 * i for i, s in enumerate(symbols)} for n in _SAMPLES]
    return all(a.subs(p) == b.subs(p) for p in points)


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def _show(value: Any) -> str:
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r}"


BODY_RULES: tuple[Rule, ...] = (output, arguments, targets, values, leading_placeholders, recurrences, choices, lint)
"""What holds in every graph, in the order in which the rules rely on each other."""

RULES: tuple[Rule, ...] = (placeholders, *BODY_RULES, weights, ports, states)
"""What holds in the outermost graph."""
