"""The IR: a torch.fx graph of ATen ops and the ``seqc::`` dialect, with weights, ports, dimensions and provenance."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc.sizes import simpler


@dataclass(frozen=True)
class Dim:
    """A symbolic dimension: its user-visible ``name``, inclusive range, and the symbol that stands for it in shapes.

    ``traced`` is the size at which the model was traced; ``max`` is None where the range has no upper end. ``branches``
    are sizes, with the source line, at which Python in the model may branch otherwise: the check compares both sides.
    """

    name: str
    symbol: sympy.Symbol
    traced: int
    min: int = 1
    max: int | None = None
    branches: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Port:
    """An input or output by position: name, dtype, and shape of ints and of expressions in dimension names."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class State:
    """A tensor that a stream keeps between calls, by the names of the input that takes it and the output that gives it.

    ``initial``  its value before the first step, of one stream (one row at ``batch_axis``)
    ``batch_axis``  the axis of the independent streams; None where the state is the same for all streams that are in step
    ``grows``  the axis of its places, one for each step: at least as many as past and new steps together. The new steps are
    written at their positions; what the places behind them hold is never read. None where its size is constant
    ``pending``  the axis of its steps since the beginning of the last chunk: none before the first step. None where it keeps no
    such steps
    ``window``  the axis of the newest steps that it keeps for later ones to read, each as it was computed. None where it is
    something else
    """

    name: str
    next_name: str
    initial: torch.Tensor
    batch_axis: int | None
    grows: int | None = None
    pending: int | None = None
    window: int | None = None


@dataclass(repr=False)
class Program:
    """A sequence model as a graph.

    ``graph_module`` has one placeholder per weight (named by the keys of ``weights``, in that order) followed by one per
    input, and one output node that returns a flat tuple. Every node carries ``meta["val"]`` (a fake tensor or symbolic
    int). Nested bodies of recurrences are child GraphModules reached by ``get_attr`` nodes.
    """

    graph_module: fx.GraphModule
    weights: dict[str, torch.Tensor]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dims: tuple[Dim, ...] = ()
    weight_names: dict[str, str] = field(default_factory=dict)
    """Placeholder name -> the weight's name in the source model (``layers.0.weight``)."""
    out_spec: pytree.TreeSpec | None = None
    """How the flat outputs fold back into what the source model returns."""
    states: tuple[State, ...] = ()
    """What a streaming Program carries from call to call: the last inputs and outputs, in this order."""
    notes: list[str] = field(default_factory=list)
    """What the user should be told: outputs dropped, loops kept unrolled, and the like."""
    reasons: list[str] = field(default_factory=list)
    """Why the running pass did, or did not do, something, with the source line; ``run_passes`` takes them over."""

    def __repr__(self) -> str:
        """One line; :func:`seqc.text.text` prints the graph."""
        nodes = sum(n.op == "call_function" for n in self.graph.nodes)
        return f"<Program of {nodes} nodes: {', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}>"

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def weight_nodes(self) -> list[fx.Node]:
        return self.placeholders[: len(self.weights)]

    @property
    def input_nodes(self) -> list[fx.Node]:
        return self.placeholders[len(self.weights) :]

    @property
    def given_inputs(self) -> tuple[Port, ...]:
        """The inputs that are no states."""
        return self.inputs[: len(self.inputs) - len(self.states)]

    @property
    def own_outputs(self) -> tuple[Port, ...]:
        """The outputs that are no states."""
        return self.outputs[: len(self.outputs) - len(self.states)]

    @property
    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def output_nodes(self) -> list[fx.Node]:
        return list(self.output_node.args[0])  # type: ignore[arg-type]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the graph in PyTorch: the reference semantics of this Program at any stage."""
        if len(inputs) != len(self.inputs):
            raise TypeError(f"this Program takes {len(self.inputs)} inputs, got {len(inputs)}")
        with torch.no_grad():
            return tuple(self.graph_module(*self.weights.values(), *inputs))

    def copy(self) -> Program:
        """An independent graph that shares the weight tensors."""
        return Program(
            copy.deepcopy(self.graph_module),
            dict(self.weights),
            self.inputs,
            self.outputs,
            self.dims,
            dict(self.weight_names),
            self.out_spec,
            self.states,
            list(self.notes),
        )

    def add_weight(self, tensor: torch.Tensor, name: str) -> fx.Node:
        """Append a weight (a constant computed at compile time) and return its placeholder."""
        unique = self.graph._graph_namespace.create_name(name, None)
        last = self.weight_nodes[-1] if self.weights else None
        first = self.placeholders[0] if self.placeholders else next(iter(self.graph.nodes))
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before(first):
            node = self.graph.placeholder(unique)
        node.meta["val"] = (
            self.fake_mode.from_tensor(tensor, static_shapes=True) if self.fake_mode is not None else tensor
        )
        self.weights[node.name] = tensor
        self.weight_names[node.name] = name
        return node

    @property
    def fake_mode(self) -> Any:
        """The FakeTensorMode (with its ShapeEnv) in which every ``meta["val"]`` lives."""
        for node in self.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None:
                return mode
        return None

    def graph_modules(self) -> Iterator[fx.GraphModule]:
        """This graph and every nested body, outermost first."""
        for module in self.graph_module.modules():
            if isinstance(module, fx.GraphModule):
                yield module

    def node_count(self) -> int:
        """Operations in the graph and all nested bodies (placeholders, outputs and attribute reads not counted)."""
        return sum(n.op == "call_function" for gm in self.graph_modules() for n in gm.graph.nodes)

    def to_networkx(self) -> nx.DiGraph:
        """The top-level graph as a networkx DiGraph: nodes by name with ``op`` and ``target``, edges producer -> user."""
        g = nx.DiGraph()
        for node in self.graph.nodes:
            g.add_node(node.name, op=node.op, target=str(node.target))
            g.add_edges_from((arg.name, node.name) for arg in node.all_input_nodes)
        return g

    def dim_names(self) -> Mapping[sympy.Symbol, sympy.Symbol]:
        return {d.symbol: sympy.Symbol(d.name) for d in self.dims}

    def shape_of(self, value: torch.Tensor) -> tuple[int | str, ...]:
        """The shape of a fake tensor with the symbols spelled by the user's dimension names."""
        return tuple(self.size_of(s) for s in value.shape)

    def size_of(self, size: int | torch.SymInt) -> int | str:
        if isinstance(size, int):
            return size
        expr = sympy.sympify(size.node.expr)
        for dim in self.dims:
            expr = simpler(expr, dim.symbol)
        expr = expr.subs(self.dim_names())
        return int(expr) if expr.is_Integer else str(expr)


def provenance(node: fx.Node) -> str:
    """``module.path (file.py:12: source text)`` of a node, innermost user frame last; empty where unknown."""
    where = source_line(node)
    path = module_path(node)
    return f"{path} ({where})" if path and where else path or where


def place_of(node: fx.Node, unknown: str = "") -> str:
    """``module.path file.py:12: source text`` of a node; where neither is known ``unknown``, or the node's name."""
    return " ".join(part for part in (module_path(node), source_line(node)) if part) or unknown or node.name


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made the node, relative to the user's model."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return "" if path == "model" or path.startswith("_empty_nn_module_stack") else path.removeprefix("model.")


def source_frames(node: fx.Node) -> list[tuple[str, int, str]]:
    """(file, line, text) of the Python frames that made the node, outermost first."""
    frames: list[tuple[str, int, str]] = []
    lines = (node.meta.get("stack_trace") or "").splitlines()
    for i, line in enumerate(lines):
        text = line.strip()
        if text.startswith('File "') and '", line ' in text:
            file, rest = text[6:].split('", line ', 1)
            number = rest.split(",", 1)[0]
            frames.append((file, int(number), lines[i + 1].strip() if i + 1 < len(lines) else ""))
    return frames


def source_line(node: fx.Node) -> str:
    """``file.py:12: text`` of the innermost frame outside torch and seqc; empty where unknown."""
    frames = source_frames(node)
    user = [f for f in frames if "/torch/" not in f[0] and "/seqc/" not in f[0]]
    return f"{user[-1][0]}:{user[-1][1]}: {user[-1][2]}" if user else ""


def flat_args(node: fx.Node) -> Sequence[Any]:
    """The leaves of a node's args and kwargs, nodes and literals alike."""
    leaves: list[Any] = pytree.tree_leaves((node.args, dict(node.kwargs)), is_leaf=lambda x: x is None)
    return leaves


def named_args(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an operator by their names in its schema, defaults filled in."""
    result: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value if argument.has_default_value() else None
        result[argument.name] = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
    return result
