"""FoldLti: time-invariant state spaces become one op, whose matrices are computed at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch.fx as fx

from seqc.classify.forms import NotMultilinear
from seqc.classify.lti import NotInvariant, as_lti_scan
from seqc.classify.replace import confirmed, replace_results, states_of
from seqc.classify.rewrite import Rewritten
from seqc.loop import Loop
from seqc.ops.recurrence import is_recurrence
from seqc.outside import Outside
from seqc.passes.loop_cleanup import clean
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code


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
    said: dict[fx.Node, str] = {}
    count = index = 0
    while index < len(loop.carries):
        loop.sync()
        place = place_of(loop.node, "a loop")
        try:
            rewritten, error = confirmed(program, loop, partial(_attempt, program, loop, index))
        except NotMultilinear as reason:
            if not isinstance(reason, NotInvariant):
                state = states_of(program, loop, [index])
                text = f"{place}: {state} is no time-invariant state space of one input per channel: {reason}"
                said[loop.carries[index][1]] = text
            index += 1
            continue
        program.reasons.append(
            f"{place}: {states_of(program, loop, rewritten.carries)} is an {rewritten.name} ({rewritten.why}); "
            f"confirmed in float64 to {error:.0e}"
        )
        replace_results(loop, rewritten)
        clean(loop)
        loop.commit()
        count, index = count + 1, 0
        if loop.is_read_by_nobody:
            break
        loop = Loop(loop.gm, loop.node, loop.emit.mode)
    program.reasons += said.values()
    return count


def _attempt(program: Program, loop: Loop, index: int) -> Rewritten:
    return as_lti_scan(loop, index, Outside(loop), program.input_nodes)
