"""ClassifyRecurrence: loops that compute a known scan become that scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.fx as fx

from seqc.classify.affine import affine, readout
from seqc.classify.forms import NotMultilinear
from seqc.classify.gated_rnn import as_gated_rnn
from seqc.classify.kinds import kind_of
from seqc.classify.replace import confirmed, replace_results, states_of
from seqc.classify.rewrite import Rewritten, as_linear_attention, as_linear_scan, as_selective_scan
from seqc.classify.running_maximum import running
from seqc.classify.softmax_scan import as_softmax_scan
from seqc.dependence import computed_from
from seqc.loop import Loop
from seqc.ops.recurrence import is_recurrence
from seqc.outside import Outside
from seqc.passes.loop_cleanup import clean
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code


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
        self.where = place_of(loop.node, "a loop")
        self.no_cell: dict[fx.Node, str] = {}
        self.no_softmax: dict[fx.Node, str] = {}

    def run(self) -> int:
        """Groups of carries first: those of one are no scan each."""
        count = self._each(self._as_cell, self._is_no_cell)
        count += self._each(self._as_softmax, self._is_no_softmax)
        return count + self._each(self._as_scan, self._is_no_scan)

    def _each(self, attempt: Callable[[int], Rewritten], failed: Callable[[int, Exception], None]) -> int:
        """Replace every carry that ``attempt`` and the confirmation take, with those that belong to it."""
        count, index = 0, 0
        while index < len(self.loop.carries) and not self.loop.is_read_by_nobody:
            self.loop.sync()
            replaced = self._carry(index, attempt, failed)
            clean(self.loop)
            self.loop.commit()
            if not replaced:
                index += 1
                continue
            count, index = count + 1, 0
            if not self.loop.is_read_by_nobody:
                self.loop = Loop(self.loop.gm, self.loop.node, self.loop.emit.mode)
        return count

    def _carry(self, index: int, attempt: Callable[[int], Rewritten], failed: Callable[[int, Exception], None]) -> bool:
        """Replace carry ``index`` and what reads it; False where it stays."""
        try:
            rewritten, error = confirmed(self.program, self.loop, lambda: attempt(index))
        except Exception as reason:  # what cannot be rewritten, for whatever reason, stays as it is
            failed(index, reason)
            return False
        what = self._what(rewritten.carries)
        replace_results(self.loop, rewritten)
        self.program.reasons.append(
            f"{what} is a {rewritten.name} ({rewritten.why}); confirmed in float64 to {error:.0e}"
        )
        return True

    def _what(self, carries: Sequence[int]) -> str:
        return f"{self.where}: {states_of(self.program, self.loop, carries)}"

    def _is_no_cell(self, index: int, reason: Exception) -> None:
        self.no_cell[self.loop.carries[index][1]] = _said(reason)

    def _is_no_scan(self, index: int, reason: Exception) -> None:
        inner = self.loop.carries[index][1]
        cell = f"; no gated cell: {self.no_cell[inner]}" if inner.meta["val"].dim() == 2 else ""
        softmax = f"; no softmax_scan: {self.no_softmax[inner]}" if inner in self.no_softmax else ""
        kind = kind_of(self.loop, index)
        self.program.reasons.append(
            f"{self._what([index])} ({kind}) stays a recurrence: {_said(reason)}{cell}{softmax}"
        )

    def _is_no_softmax(self, index: int, reason: Exception) -> None:
        if running(self.loop, index) is not None:
            self.no_softmax[self.loop.carries[index][1]] = _said(reason)

    def _as_softmax(self, index: int) -> Rewritten:
        return as_softmax_scan(self.loop, index, Outside(self.loop))

    def _as_cell(self, index: int) -> Rewritten:
        return as_gated_rnn(self.loop, index, Outside(self.loop))

    def _as_scan(self, index: int) -> Rewritten:
        loop = self.loop
        reading = self._readers(index)
        following = loop.next_carries[index]
        others = [i for i in reading if i < len(loop.carries) and i != index]
        if others:
            raise NotMultilinear("another state is computed from it")
        results = [i for i in reading if i >= len(loop.carries)]
        update, terms = affine(loop, index, loop.emit.mode)
        outside = Outside(loop)
        if all(loop.results[i][0] is following for i in results):
            return as_linear_scan(loop, index, results, update, terms, outside)
        if len(results) != 1:
            raise NotMultilinear(f"{len(results)} results are computed from it")
        read = readout(loop, index, loop.results[results[0]][0], update, terms)
        return self._first_of(
            lambda: as_selective_scan(loop, index, results[0], update, read, terms, outside),
            lambda: as_linear_attention(loop, index, results[0], update, read, terms, outside, self.program.weights),
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
        reading = computed_from([self.loop.carries[index][1], self.loop.next_carries[index]])
        return [i for i, (value, _) in enumerate(self.loop.results) if value in reading]


def _said(reason: Exception) -> str:
    """Why, in one line; what is no refusal is said with its kind."""
    kind = "" if isinstance(reason, NotMultilinear) else f"{type(reason).__name__}: "
    return kind + (str(reason).splitlines() or ["no reason"])[0]
