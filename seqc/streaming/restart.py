"""Computation in chunks of the sequence, gone on with from an earlier piece.

What computes in chunks starts each sequence from first states: the carried values of a loop over the chunks, or constants
put in front of what is computed of each chunk. Two forms are tried in this order:

- from the end of the earlier piece: chunks may begin at any step, and the whole is a step form of itself (here);
- from the beginning of the last chunk, whose steps are kept (:mod:`seqc.streaming.boundaries`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.fx as fx

from seqc import _torch
from seqc.dependence import ancestors
from seqc.outside import is_size
from seqc.streaming.boundaries import FromBoundary
from seqc.streaming.copied import Copy, as_in_the_model
from seqc.streaming.demand import Demand, NotCausal, Plan, refuse
from seqc.streaming.derivation import END, Derivation
from seqc.streaming.layers import item
from seqc.streaming.regions import Region, chunk_of, regions
from seqc.streaming.tried import carried, is_computed, is_same_in_ones, kind_of
from seqc.widen import is_narrow, wide_type

aten = torch.ops.aten


def restarts(d: Derivation) -> dict[fx.Node, Restart]:
    """By each node that leaves a region which computes in chunks: the region. Raises NotCausal."""
    return {node: restart for region in regions(d) for restart in (Restart(d, region),) for node in region.exits}


class Form(Protocol):
    """A step form of a region."""

    def write(self, new: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """The exits for the new steps, given these of what the region reads."""
        ...


class Restart:
    """A region of which a step form is written."""

    def __init__(self, d: Derivation, region: Region) -> None:
        self.d, self.region = d, region
        self.form: Form | None = None
        self._written: dict[fx.Node, Any] | None = None

    def plan(self, node: fx.Node, demand: Demand) -> Plan:
        """For an exit: the newest steps of what the region reads. Raises NotCausal."""
        d = self.d
        if not any(demand.modes) and not demand.at_end:
            raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")
        if self.form is None:
            self.form = _form(d, self.region)
        form, needs = self.form, tuple((n, d.newest(n)) for n in self.region.given)

        def write(*new: Any) -> Any:
            if self._written is None:
                self._written = form.write(dict(zip(self.region.given, new, strict=True)))
            return self._written[node]

        return Plan(needs, write)


def _form(d: Derivation, region: Region) -> Form:
    with contextlib.suppress(NotCausal):
        return FromEnd(d, region)
    return FromBoundary(d, region)


class FromEnd:
    """A region that is a step form of itself.

    Given a second piece of the sequence and, as first states, what these had become at the end of the first piece, it gives
    what it gives on both pieces at once, for pieces of any length: a last chunk that is not full is filled up as the model
    does. Whether it does is tried (:mod:`seqc.streaming.tried`). States are float32, and so is what is computed with them.
    """

    def __init__(self, d: Derivation, region: Region) -> None:
        self.d, self.region = d, region
        self.carried = carried(d, region)
        values = [c.start.meta["val"] for c in self.carried]
        self.wide = is_narrow(values)
        self.slots = [
            d.slot("recurrent_state", c.at, list(map(_torch.size_expr, value.shape)), wide_type(value.dtype), c.start)
            for c, value in zip(self.carried, values, strict=True)
        ]
        chunk = chunk_of(d, region)
        self.chunk = chunk if d.steps == 1 and chunk > 1 and self._is_same_in_ones(chunk) else 1

    def _is_same_in_ones(self, chunk: int) -> bool:
        """Whether one step is the same in chunks of one; layers that are alike ask once."""
        known: bool = self.d.shared(
            ("in ones", kind_of(self.region)), lambda: is_same_in_ones(self.d, self.region, self.carried, chunk)
        )
        return known

    def write(self, new: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        d = self.d
        first = {(c.at, c.index): slot.placeholder for c, slot in zip(self.carried, self.slots, strict=True)}
        copied = Copy(d, self.region, d.time, first, self.chunk, wide=self.wide).write(self._inside(), new)
        for c, slot in zip(self.carried, self.slots, strict=True):
            end = copied[c.end]
            slot.following = (
                item(d, end, c.index) if c.axis is None else d.emit(aten.slice.Tensor, end, c.axis, -1, END)
            )
        return {n: as_in_the_model(d, n, copied[n]) for n in self.region.exits}

    def _inside(self) -> list[fx.Node]:
        """What is written: with chunks of one step, the masks within a chunk too."""
        if self.chunk == 1:
            return list(self.region.inside)
        masks = ancestors(n for n in self.region.given if is_computed(self.d, n))
        written = {n for n in masks if n.op == "call_function" and not is_size(n)} | set(self.region.inside)
        return [n for n in self.d.source.graph.nodes if n in written]
