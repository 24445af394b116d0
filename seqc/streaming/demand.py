"""Which part of a value of the whole sequence is wanted when ``steps`` new steps have come after earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from seqc.errors import UnsupportedModelError
from seqc.program import place_of, source_line


@dataclass(frozen=True)
class Window:
    """Along an axis over time: the elements from ``start`` behind the first new step up to ``stop`` behind the end of the last.

    Elements in front of the first step are ``fill``: a number, or a node whose values do not vary from stream to stream.
    """

    start: int = 0
    stop: int = 0
    fill: float | fx.Node | None = None

    def is_same(self, other: Window) -> bool:
        """Whether these are the same elements, whatever is in front of the first step."""
        return (self.start, self.stop) == (other.start, other.stop)


@dataclass(frozen=True)
class Everything:
    """Along an axis over time: all elements up to the newest, in a buffer of ``capacity`` places.

    Places behind the newest element hold any finite number, as if they were later steps; what reads them rules them out.
    """


@dataclass(frozen=True)
class Recent:
    """Along an axis over what steps read: the new elements and the ``count`` before them.

    Where there were fewer, places in front of the first step hold any finite number; what reads them rules them out.
    """

    count: int


Mode = Window | Everything | Recent | None
"""What is wanted along an axis; None: the axis is not over time."""

NEW = Window()
ALL = Everything()


@dataclass(frozen=True)
class Demand:
    """What is wanted of a node: a mode for each of its axes.

    ``at_end``: what a value without an axis over time is at the end of the newest step is good enough. Elsewhere such a value
    has to be known at step ``since``, counted from 0, and all later ones; before it may be anything.
    """

    modes: tuple[Mode, ...]
    at_end: bool = False
    since: int = 0


@dataclass(frozen=True)
class Plan:
    """How a node is computed for a demand: what that needs of other nodes, and the function that writes it from these."""

    needs: tuple[tuple[fx.Node, Demand], ...]
    write: Callable[..., Any]


class NotCausal(UnsupportedModelError):
    """A value cannot be computed step by step."""


def refuse(node: fx.Node, why: str, hint: str = "") -> NotCausal:
    """The error for ``node``, with where it stands in the user's model."""
    end = f"; {hint}" if hint else ""
    at = of_the_model(node)
    return NotCausal(f"no streaming form: {why} ({getattr(at.target, '__name__', at.target)} at {place_of(at)}){end}")


def of_the_model(node: fx.Node) -> fx.Node:
    """``node``, or what reads it where only that has a line in the user's model."""
    return next((n for n in (node, *node.users) if source_line(n)), node)
