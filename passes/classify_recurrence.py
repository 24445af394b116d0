"""ClassifyRecurrence: loops that compute a known scan become that scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from seqc.classify.affine import affine, readout
from seqc.classify.confirm import largest_error
from seqc.classify.forms import NotMultilinear
from seqc.classify.rewrite import Rewritten, as_linear_attention, as_linear_scan, as_selective_scan
from seqc.loop import Loop
from seqc.ops.recurrence import is_recurrence
from seqc.outside import Outside
from seqc.passes.loop_cleanup import clean
from seqc.program import Program, module_path, source_line
from seqc.rewrite import remove_dead_code

# Two spellings of one computation in float64 differ by a few roundings of 1e-16 per step.
_AGREEMENT = 1e-10


@dataclass(frozen=True)
class ClassifyRecurrence:
    """Tells from a loop's body what it computes, and writes the dialect op for it.

        for t: h = exp(dt_t[:, :, None] * A) * h + (dt_t * u_t)[:, :, None] * B_t[:, None];  y_t = (h * C_t).sum(-1)
    ->  y, h = seqc::selective_scan(dt * u, dt, A, B, C, h0)

    The body's values are brought into a normal form, sums of products (:mod:`seqc.classify.forms`), so no spelling
    matters; which class they are is read off that form. Each verdict is confirmed on random numbers in float64 before
    it is used, and said with its reason. What is not recognised stays a loop, also with its reason.

    ``tolerance``: the same products in another order; sums over the state may be taken in another order, which is the
    usual error of a float32 dot product.
    """

    name: ClassVar[str] = "classify_recurrence"
    tolerance: ClassVar[float] = 1e-5

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            for node in [n for n in gm.graph.nodes if is_recurrence(n)]:
                changes += _Classifier(program, Loop(gm, node, program.fake_mode)).run()
        if changes:
            remove_dead_code(program)
        return changes


class _Classifier:
    def __init__(self, program: Program, loop: Loop) -> None:
        self.program, self.loop = program, loop
        self.where = " ".join(p for p in (module_path(loop.node), source_line(loop.node)) if p) or "a loop"

    def run(self) -> int:
        count, index = 0, 0
        while index < len(self.loop.carries):
            self.loop.sync()
            replaced = self._carry(index)
            if replaced:
                clean(self.loop)
            self.loop.erase_unused()
            self.loop.commit()
            if not replaced:
                index += 1
                continue
            count += 1
            if all(reader is None for _, reader in self.loop.results):
                break
            self.loop = Loop(self.loop.gm, self.loop.node, self.loop.emit.mode)
        return count

    def _carry(self, index: int) -> bool:
        """Replace carry ``index`` and what reads it; False where it stays."""
        shape = self.program.shape_of(self.loop.carries[index][1].meta["val"])
        what = f"{self.where}: state [{', '.join(map(str, shape))}]"
        mark = self.loop.emit.mark()
        try:
            rewritten = self._rewritten(index)
            error = self._error(index, rewritten)
            if not error <= _AGREEMENT:
                raise NotMultilinear(f"as {rewritten.name} it differs by {error:.1e} on random numbers")
        except Exception as reason:  # what cannot be rewritten, for whatever reason, stays as it is
            self.loop.emit.undo(mark)
            kind = "" if isinstance(reason, NotMultilinear) else f"{type(reason).__name__}: "
            self.program.reasons.append(f"{what} stays sequential: {kind}{str(reason).splitlines()[0]}")
            return False
        self._replace(index, rewritten)
        self.program.reasons.append(
            f"{what} is a {rewritten.name} ({rewritten.why}); confirmed in float64 to {error:.0e}"
        )
        return True

    def _rewritten(self, index: int) -> Rewritten:
        loop = self.loop
        reading = self._readers(index)
        following = loop.next_carries[index]
        others = [i for i in reading if i < len(loop.carries) and i != index]
        if others:
            raise NotMultilinear("another state is computed from it")
        results = [i for i in reading if i >= len(loop.carries)]
        update, terms = affine(loop, index, loop.emit.mode)
        outside = Outside(loop)
        with loop.emit.before(loop.node):
            if all(loop.results[i][0] is following for i in results):
                return as_linear_scan(loop, index, results, update, terms, outside)
            if len(results) != 1:
                raise NotMultilinear(f"{len(results)} results are computed from it")
            read = readout(loop, index, loop.results[results[0]][0], update, terms)
            return self._first_of(
                lambda: as_selective_scan(loop, index, results[0], update, read, terms, outside),
                lambda: as_linear_attention(
                    loop, index, results[0], update, read, terms, outside, self.program.weights
                ),
            )

    def _first_of(self, *attempts: Callable[[], Rewritten]) -> Rewritten:
        refusals = []
        for attempt in attempts:
            mark = self.loop.emit.mark()
            try:
                return attempt()
            except NotMultilinear as reason:
                self.loop.emit.undo(mark)
                refusals.append(str(reason))
        raise NotMultilinear("; ".join(dict.fromkeys(refusals)))

    def _readers(self, index: int) -> list[int]:
        """The results that are computed from carry ``index`` or from its next value."""
        reading = {self.loop.carries[index][1], self.loop.next_carries[index]}
        for node in self.loop.body.graph.nodes:
            if any(n in reading for n in node.all_input_nodes):
                reading.add(node)
        return [i for i, (value, _) in enumerate(self.loop.results) if value in reading]

    def _error(self, index: int, rewritten: Rewritten) -> float:
        pairs = [
            (reader, new) for i, new in rewritten.results.items() if (reader := self.loop.results[i][1]) is not None
        ]
        written = set(rewritten.written)
        loop_inputs = [outer for outer, _ in (*self.loop.carries, *self.loop.xs, *self.loop.invariants)]
        read = [n for node in written for n in node.all_input_nodes if n not in written]
        trip = self.loop.trip.meta["val"] if isinstance(self.loop.trip, fx.Node) else self.loop.trip
        return largest_error(pairs, [*loop_inputs, *read], self.program.weights, trip)

    def _replace(self, index: int, rewritten: Rewritten) -> None:
        loop = self.loop
        for i, new in rewritten.results.items():
            value, reader = loop.results[i]
            if reader is not None:
                reader.replace_all_uses_with(new)
                loop.gm.graph.erase_node(reader)
                loop.results[i] = (value, None)
        for i in sorted((i for i in rewritten.results if i >= len(loop.carries)), reverse=True):
            loop.drop_result(i)
        inner = loop.drop_carry(index)
        loop.erase_unused()
        if not inner.users:
            loop.body.graph.erase_node(inner)
