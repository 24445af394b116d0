"""Emits nodes whose values are computed on the fly, so that a rewrite never leaves a node without ``meta["val"]``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.program import Program
from seqc.rewrite import copy_meta, remove_dead_code


def value_of(arg: Any) -> Any:
    """``arg`` with every node replaced by its fake value."""
    return pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, arg, is_leaf=lambda a: a is None)


class Emitter:
    """Writes call_function nodes at a movable place, each with its fake value and its origin's provenance."""

    def __init__(self, gm: fx.GraphModule, mode: Any = None) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.mode = mode if mode is not None else _torch.fake_mode_of(gm)
        self._place: fx.Node | None = None
        self._origin: fx.Node | None = None
        self._written: list[fx.Node] = []
        self.most_steps: int | None = None

    @contextlib.contextmanager
    def before(self, place: fx.Node, origin: fx.Node | None = None) -> Iterator[None]:
        """Inside, nodes are written in front of ``place``, with the provenance of ``origin`` (default ``place``)."""
        saved = (self._place, self._origin)
        self._place, self._origin = place, origin if origin is not None else place
        try:
            with self.graph.inserting_before(place):
                yield
        finally:
            self._place, self._origin = saved

    @property
    def origin(self) -> fx.Node | None:
        """The node whose provenance is given to what is written."""
        return self._origin

    @contextlib.contextmanager
    def of(self, origin: fx.Node) -> Iterator[None]:
        """Inside, nodes carry the provenance of ``origin``."""
        saved, self._origin = self._origin, origin
        try:
            yield
        finally:
            self._origin = saved

    @contextlib.contextmanager
    def at_most(self, steps: int) -> Iterator[None]:
        """Inside, forms are written for at most ``steps`` steps, however many the operands have."""
        saved, self.most_steps = self.most_steps, steps
        try:
            yield
        finally:
            self.most_steps = saved

    def compute(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """The fake value of a call on nodes and literals; raises what the operation raises on wrong shapes."""
        with _torch.faking(self.mode), torch.no_grad():
            return _torch.shape_rule(target)(*value_of(args), **value_of(kwargs))

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write ``target(*args, **kwargs)``."""
        return self.written(target, args, self.compute(target, *args, **kwargs), kwargs)

    def written(self, target: Any, args: tuple[Any, ...], value: Any, kwargs: dict[str, Any] | None = None) -> fx.Node:
        """Write a call whose fake ``value`` is known."""
        node = self.graph.call_function(target, args, kwargs)
        if self._origin is not None:
            copy_meta(self._origin, node)
        node.meta["val"] = value
        self._written.append(node)
        return node

    def mark(self) -> int:
        """A point in the sequence of written nodes, for :meth:`undo`."""
        return len(self._written)

    def since(self, mark: int) -> list[fx.Node]:
        """What was written since ``mark``."""
        return self._written[mark:]

    def undo(self, mark: int) -> None:
        """Remove what was written since ``mark``."""
        for node in reversed(self._written[mark:]):
            self.graph.erase_node(node)
        del self._written[mark:]


def rewrite_nodes(program: Program, rule: Callable[[Program, Emitter, fx.Node], bool]) -> int:
    """How many nodes of all graphs ``rule(program, emit, node)`` replaced; what is unread since then is removed."""
    changes = 0
    for gm in program.graph_modules():
        emit = Emitter(gm, program.fake_mode)
        changes += sum(rule(program, emit, node) for node in list(gm.graph.nodes))
    if changes:
        remove_dead_code(program)
    return changes
