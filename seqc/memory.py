"""How much memory values take, where sizes may be symbolic, and how much a Program needs for all values alive at once."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.ops.choose import choice, inputs_of, is_choice
from seqc.ops.recurrence import is_recurrence, parts
from seqc.outside import is_pure
from seqc.program import Program, named_args

aten = torch.ops.aten

# A free size (a batch, or a sequence read as a whole) counts as this much where memory is estimated.
_FREE_SIZE = 1024

NOMINAL_BATCH, NOMINAL_LENGTH = 1, 2048
"""The sizes at which the peak of a model is stated unless its dimensions end below."""

# The same elements in the same order: ONNX has no strides, so all other views (permute, expand, slice) are copies there.
_SHARING = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int, aten.alias.default,
    aten.detach.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default,
})  # fmt: skip

Sizes = Mapping[sympy.Symbol, int]
Storage = tuple[fx.Node, int]
"""Memory of its own: result ``i`` of a node."""


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at once, and the node at which they are."""

    bytes: int
    node: fx.Node | None


def nbytes(shape: Iterable[int | torch.SymInt], dtype: torch.dtype, sizes: Sizes | None = None) -> int:
    """Bytes of a tensor; a free size that ``sizes`` does not tell counts as 1024."""
    total = sympy.Integer(dtype.itemsize)
    for size in shape:
        expr = _torch.size_expr(size)
        total *= expr.subs({symbol: (sizes or {}).get(symbol, _FREE_SIZE) for symbol in expr.free_symbols})
    return int(total)


def node_bytes(nodes: Iterable[fx.Node]) -> int:
    """Bytes of all tensors that ``nodes`` are."""
    return sum(nbytes(leaf.shape, leaf.dtype) for node in nodes for _, leaf in _leaves(node))


def nominal_sizes(program: Program, batch: int = NOMINAL_BATCH, length: int = NOMINAL_LENGTH) -> dict[str, int]:
    """A size for each dimension, inside its range: ``batch`` where it is a batch, by name or because it is axis 0 of
    every input that has it, else ``length``."""
    places: dict[str, set[int]] = {}
    for port in program.inputs:
        for axis, size in enumerate(port.shape):
            places.setdefault(str(size), set()).add(axis)
    named = {d.name for d in program.dims if "batch" in d.name.lower()}
    batches = named or {d.name for d in program.dims if places.get(d.name) == {0}}
    if len(batches) == len(program.dims):
        batches = named
    wanted = {d.name: batch if d.name in batches else length for d in program.dims}
    return {d.name: min(max(wanted[d.name], d.min), d.max or wanted[d.name]) for d in program.dims}


def peak_activations(program: Program, sizes: Mapping[str, int] | None = None) -> Peak:
    """An estimate of the memory that all values alive at once take, at ``sizes`` (by dimension, default
    :func:`nominal_sizes`).

    A value lives from its node to its last reader, inputs (which the caller holds) and outputs to the end; reshapes
    share the memory of what they reshape, all other operations write anew, as ONNX has it. A recurrence takes, besides
    its results, the peak of one step, the state included. Weights, and what is computed from them alone, are no
    activations. Of an operation only results are seen, but for attention, whose scores ONNX writes out: an estimate,
    which knows neither the reuse of buffers in place nor the scratch memory of kernels.
    """
    chosen = sizes if sizes is not None else nominal_sizes(program)
    return _Liveness({d.symbol: chosen[d.name] for d in program.dims if d.name in chosen}).peak(
        program.graph_module, _constants(program)
    )


class _Liveness:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def peak(self, gm: fx.GraphModule, free: set[fx.Node]) -> Peak:
        """The peak of one run of ``gm``; the nodes ``free`` take no memory."""
        nodes = list(gm.graph.nodes)
        held = _storages(nodes, free)
        last: dict[Storage, int] = {}
        for i, node in enumerate(nodes):
            read = [s for a in node.all_input_nodes for s in held[a]] if node.target is not operator.getitem else []
            last.update(dict.fromkeys([*held[node], *read], i))
        last.update({(node, 0): len(nodes) for node in nodes if node.op == "placeholder" and held[node]})
        ends: dict[int, list[Storage]] = {}
        for storage, i in last.items():
            ends.setdefault(i, []).append(storage)
        sizes = {(node, i): self._bytes(leaf) for node in nodes for i, leaf in _leaves(node) if (node, i) in last}
        alive, peak = 0, Peak(0, None)
        for i, node in enumerate(nodes):
            alive += sum(sizes[s] for s in held[node] if s[0] is node)
            total = alive + self._inside(node)
            if total > peak.bytes:
                peak = Peak(total, node)
            alive -= sum(sizes[s] for s in ends.get(i, ()))
        return peak

    def _inside(self, node: fx.Node) -> int:
        """What a node needs while it runs, besides what it reads and gives."""
        if is_recurrence(node):
            p = parts(node)
            return self.peak(p.body, {*p.body_xs, *p.body_invariants}).bytes
        if is_choice(node):
            return max(self.peak(body, set(inputs_of(body))).bytes for body in choice(node).bodies)
        if node.target is aten.scaled_dot_product_attention.default:
            given = named_args(node)
            query, key = given["query"].meta["val"], given["key"].meta["val"]
            return 2 * nbytes((*query.shape[:-1], key.shape[-2]), query.dtype, self.sizes)  # before and after softmax
        return 0

    def _bytes(self, tensor: torch.Tensor) -> int:
        return nbytes(tensor.shape, tensor.dtype, self.sizes)


def _storages(nodes: list[fx.Node], free: set[fx.Node]) -> dict[fx.Node, list[Storage]]:
    """The memory that each node's value lies in."""
    held: dict[fx.Node, list[Storage]] = {}
    for node in nodes:
        if node in free or node.op == "output":
            held[node] = []
        elif node.target is operator.getitem and held[node.args[0]]:  # type: ignore[index]
            held[node] = [(node.args[0], node.args[1])]  # type: ignore[list-item]
        elif node.target in _SHARING:
            held[node] = held[node.args[0]]  # type: ignore[index]
        else:
            held[node] = [(node, i) for i, _ in _leaves(node)]
    return held


def _constants(program: Program) -> set[fx.Node]:
    """The weights and what is computed from them, and from literals, alone."""
    found = set(program.weight_nodes)
    for node in program.graph.nodes:
        if node.op == "call_function" and is_pure(node) and all(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _leaves(node: fx.Node) -> Iterator[tuple[int, torch.Tensor]]:
    value = node.meta.get("val")
    for i, leaf in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
        if isinstance(leaf, torch.Tensor):
            yield i, leaf
