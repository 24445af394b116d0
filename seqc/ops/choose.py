"""``seqc::choose``: one of two graphs that compute the same, by a size.

    returns (short if size <= most else long)(*operands)

In a graph it is a ``call_function`` node whose target is :func:`choose`, with positional arguments

    (short, long, size, most, operands)

``short, long``  get_attr nodes of child GraphModules; placeholders are the operands, they return one flat tuple each
``size``         a node of a symbolic int
``most``         the largest size, an int, for which ``short`` runs; it may be right for those sizes only
``operands``     tuple of nodes

The value is a flat tuple, of the shapes that ``long`` gives. The bodies hold no weights: both read those among the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

Body = Callable[..., tuple[torch.Tensor, ...]]


def choose(short: Body, long: Body, size: int, most: int, operands: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The reference implementation."""
    return tuple((short if size <= most else long)(*operands))


@dataclass(frozen=True)
class Choice:
    """The arguments of a choose node by name."""

    short: fx.GraphModule
    long: fx.GraphModule
    size: fx.Node
    most: int
    operands: tuple[fx.Node, ...]

    @property
    def bodies(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self.short, self.long


def choice(node: fx.Node) -> Choice:
    """The arguments of a choose node by name."""
    short, long, size, most, operands = node.args
    owner: Any = node.graph.owning_module
    first, second = (owner.get_submodule(str(attr.target)) for attr in (short, long))  # type: ignore[union-attr]
    return Choice(first, second, size, most, tuple(operands))  # type: ignore[arg-type]


def is_choice(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is choose


def inputs_of(body: fx.GraphModule) -> list[fx.Node]:
    """The placeholders of a body."""
    return [n for n in body.graph.nodes if n.op == "placeholder"]


def results_of(body: fx.GraphModule) -> list[fx.Node]:
    """What a body returns."""
    return list(body.graph.output_node().args[0])  # type: ignore[arg-type]
