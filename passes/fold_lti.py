"""FoldLti: time-invariant state spaces become one op, whose matrices are computed at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqc.classify.forms import NotMultilinear
from seqc.classify.lti import NotInvariant, as_lti_scan
from seqc.classify.replace import replace_results, replacement_error
from seqc.loop import Loop
from seqc.ops.recurrence import is_recurrence
from seqc.outside import Outside
from seqc.passes.loop_cleanup import clean
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code

# Two spellings of one computation in float64 differ by a few roundings of 1e-16 per step.
_AGREEMENT = 1e-10


@dataclass(frozen=True)
class FoldLti:
    """Writes loops h = A h + B u, y = C h + D u, with A, B, C and D from weights alone, as ``seqc::lti_scan``.

        for t: h = a_bar * h + b_bar * u_t[:, :, None];  y_t = (h * c).sum(-1)
    ->  y, h = seqc::lti_scan(diag(a_bar), b_bar, c * a_bar, (c * b_bar).sum(-1), u, h0)

    Each channel has one input, one output and states of its own, which may be coupled: real and imaginary parts, or all
    with all. A, B, C and D are read off the body's normal form (:mod:`seqc.classify.forms`), so no spelling matters, and
    the verdict is confirmed on random numbers in float64 before it is used. Since the state is linear in its inputs, steps
    can be taken many at a time by matrices that are known beforehand.

    States that have an input of their own each, as those of S5 and LRU have, stay: their projections are matrix products
    for all steps at once as it is.

    ``tolerance``: the same products in another order.
    """

    name: ClassVar[str] = "fold_lti"
    tolerance: ClassVar[float] = 1e-5

    def __call__(self, program: Program) -> int:
        gm = program.graph_module
        changes = sum(
            _fold(program, Loop(gm, node, program.fake_mode)) for node in gm.graph.nodes if is_recurrence(node)
        )
        if changes:
            remove_dead_code(program)
        return changes


def _fold(program: Program, loop: Loop) -> int:
    """Fold the groups of carries of ``loop`` that are time-invariant; returns their number."""
    count, index, said = 0, 0, set()
    while index < len(loop.carries):
        loop.sync()
        mark, carry = loop.emit.mark(), loop.carries[index][1]
        where = f"{place_of(loop.node, 'a loop')}: state {_shape(program, loop, index)}"
        try:
            with loop.emit.before(loop.node):
                rewritten = as_lti_scan(loop, index, Outside(loop), program.input_nodes)
            error = replacement_error(program, loop, rewritten)
            if not error <= _AGREEMENT:
                raise NotMultilinear(f"as {rewritten.name} it differs by {error:.1e} on random numbers")
        except NotMultilinear as reason:
            loop.emit.undo(mark)
            index += 1
            if not isinstance(reason, NotInvariant):
                said.add((carry, f"{where} is no time-invariant state space of one input per channel: {reason}"))
            continue
        shapes = " and ".join(_shape(program, loop, i) for i in rewritten.carries)
        program.reasons.append(
            f"{place_of(loop.node, 'a loop')}: state {shapes} is an {rewritten.name} ({rewritten.why}); "
            f"confirmed in float64 to {error:.0e}"
        )
        replace_results(loop, rewritten)
        clean(loop)
        loop.commit()
        count, index = count + 1, 0
        if loop.is_read_by_nobody:
            break
        loop = Loop(loop.gm, loop.node, loop.emit.mode)
    program.reasons += [text for _, text in said]
    return count


def _shape(program: Program, loop: Loop, index: int) -> str:
    return f"[{', '.join(map(str, program.shape_of(loop.carries[index][1].meta['val'])))}]"
