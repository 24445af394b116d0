"""What a value of a loop body is, seen over the steps of the loop.

A *column* is one value of the loop body over the ``k`` steps: the tuple of nodes that compute it in step 0, 1, ... Each is

    Invariant   the same node in every step
    Read        step ``i`` of a tensor: select(x, d, a + b*i), or slice(x, d, a + b*i, a + b*i + w)
    Result      what another loop computes in step ``i``
    Index       a number a + b*i
    Carry       column G one step later: (init, G_0, G_1, ...)
    Op          the same operation on columns

A member is None where the trace has no node for it, because nobody used the value of the last step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from seqc import _torch

if TYPE_CHECKING:
    from seqc.frontend.align import Alignment

aten = torch.ops.aten
Members = tuple["fx.Node | None", ...]


@dataclass(frozen=True)
class Invariant:
    node: fx.Node


@dataclass(frozen=True)
class Read:
    """select(x, dim, start + stride*i), or where ``width`` is given slice(x, dim, ., . + width)."""

    x: fx.Node
    dim: int
    start: int
    stride: int
    width: int | None = None

    def is_step(self, i: int, node: fx.Node) -> bool:
        """Whether ``node`` reads step ``i``."""
        low = self.start + self.stride * i
        at = node.args[2] if len(node.args) > 2 else None
        if isinstance(at, int) and at < 0:
            low -= traced_size(self.x, self.dim)
        place = (low,) if self.width is None else (low, low + self.width)
        return node.args[:2] == (self.x, self.dim) and node.args[2:] == place


@dataclass(frozen=True, eq=False)
class Result:
    """What another loop of as many steps computes in step i, or in step k-1-i where ``flipped``."""

    loop: Alignment
    column: Op
    flipped: bool


@dataclass(frozen=True)
class Index:
    start: float
    stride: float


@dataclass(eq=False)
class Carry:
    members: Members
    init: fx.Node
    next: Column | None = None


@dataclass(eq=False)
class Op:
    members: Members
    template: fx.Node
    args: list[Any] = field(default_factory=list)
    spec: Any = None


Column = Invariant | Read | Result | Index | Carry | Op
"""What explains a value of the loop body."""


def step_of(node: fx.Node) -> tuple[int, int | None] | None:
    """(start, width) of a read of one step, of width None, or of a whole chunk of steps."""
    if node.target is aten.select.int and type(node.args[2]) is int:
        return node.args[2], None
    if node.target is aten.slice.Tensor and len(node.args) == 4 and all(type(a) is int for a in node.args[2:]):
        start, end = node.args[2:]
        if 0 <= start < end and start % (end - start) == 0 and traced_size(node, node.args[1]) == end - start:  # type: ignore
            return start, end - start  # type: ignore[operator, return-value]
    return None


def traced_size(x: fx.Node, dim: int) -> int:
    """The size at which ``x`` was traced."""
    size = x.meta["val"].shape[dim]
    return _torch.hint(size)


def reads_of(column: Column | None) -> Iterator[Read]:
    """Every Read that a column depends on within one step."""
    for item in walk(column):
        if isinstance(item, Read):
            yield item


def walk(*roots: Any, through_carries: bool = False) -> Iterator[Any]:
    """The columns that the roots depend on, each once, arguments before users.

    With ``through_carries`` also what the next values of carries depend on.
    """
    seen: set[int] = set()
    pending = list(roots)
    while pending:
        stack: list[tuple[Any, bool]] = [(pending.pop(0), False)]
        while stack:
            column, done = stack.pop()
            if done:
                yield column
            elif isinstance(column, (Invariant, Read, Result, Index, Carry, Op)) and id(column) not in seen:
                seen.add(id(column))
                stack.append((column, True))
                if isinstance(column, Op):
                    stack.extend((a, False) for a in reversed(column.args))
                elif isinstance(column, Carry) and through_carries:
                    pending.append(column.next)
