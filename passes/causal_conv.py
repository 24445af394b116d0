"""CausalConv: depthwise convolutions that read the past only become ``seqc::causal_conv``, however they are spelled."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.classify.confirm import largest_error_between
from seqc.convolutions import Kept, NotCausal, Sum, convolution, kept
from seqc.emit import Emitter
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code, sort_topologically
from seqc.taps import Taps
from seqc.verify import same_shape
from seqc.windows import Order, Window, slice_start, window

aten = torch.ops.aten

# The two spellings in float64 differ by the order in which a few products are added.
_AGREEMENT = 1e-10


@dataclass(frozen=True)
class CausalConv:
    """Recognises a causal depthwise convolution by which steps each of its results reads.

        y = conv1d(x, w, b, padding=k - 1, groups=D)[..., :L]        y = conv1d(cat([state, x], -1), w, b, groups=D)
    ->  y, _ = seqc::causal_conv(x, w, b, None)                      y, _ = seqc::causal_conv(x, w, b, state)

    Padding may be the convolution's own, a pad, or a cat with zeros or with a state, in any layout; the end may be cut
    off behind activations; sums of at least three slices of one padded tensor, each times a weight per channel, are the
    same. A tensor of the last steps that lies around becomes the final state. Each rewrite needs that as many steps come
    out as go in for every length, as expressions, and is confirmed on random numbers in float64.

    ``tolerance``: products are added in another order, and the bias may come first.
    """

    name: ClassVar[str] = "causal_conv"
    tolerance: ClassVar[float] = 1e-6

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            rewriter = _Rewriter(program, gm)
            for node in list(gm.graph.nodes):
                changes += rewriter.run(node)
            if changes:
                sort_topologically(gm.graph)
        if changes:
            remove_dead_code(program)
        return changes


class _Rewriter:
    def __init__(self, program: Program, gm: fx.GraphModule) -> None:
        self.program, self.gm = program, gm
        self.emit = Emitter(gm, program.fake_mode)
        self.taps = Taps(gm, [n for n in program.weight_nodes if n.graph is gm.graph])

    def run(self, node: fx.Node) -> bool:
        """Replace what is kept of the convolution that ``node`` is; False where it is none, or stays."""
        where = place_of(node)
        mark = self.emit.mark()
        try:
            found = convolution(node) or self.taps.sum(node)
            if found is None:
                return False
            with self.emit.before(node):
                pairs, boundary = self._written(found)
            error = largest_error_between(pairs, boundary, self.program.weights, found.line.steps, found.reach + 3)
            if not error <= _AGREEMENT:
                raise NotCausal(f"as causal_conv it differs by {error:.1e} on random numbers")
        except NotCausal as reason:
            self.emit.undo(mark)
            self.program.reasons.append(f"{where}: stays as it is: {reason}")
            return False
        for old, new in pairs:
            old.replace_all_uses_with(new)
        state = "zeros" if found.line.state is None else "a state"
        self.program.reasons.append(
            f"{where}: is a causal_conv ({found.taps} taps, dilation {found.dilation}, {state} before the first step); "
            f"confirmed in float64 to {error:.0e}"
        )
        return True

    def _written(self, found: Sum) -> tuple[list[tuple[fx.Node, fx.Node]], list[fx.Node]]:
        """(old, new) nodes, and what both are computed from."""
        line, emit = found.line, self.emit
        uses = kept(found)
        x = self._laid_out(line.source, line.order, found.axes)
        state = self._state(found)
        weight, bias = found.weight(emit), found.bias(emit)
        call = emit(torch.ops.seqc.causal_conv.default, x, weight, bias, state, found.dilation)
        y = emit(operator.getitem, call, 0)
        pairs = [(use.node, self._with_rest(self._kept(y, use), found)) for use in uses]
        last = self._final_states(found)
        if last:
            final = emit(operator.getitem, call, 1)
            pairs += [(node, self._moved(final, layout)) for node, layout in last]
        boundary = [line.source, *found.rest, *([line.state] if line.state is not None else [])]
        return pairs, boundary

    def _laid_out(self, node: fx.Node, order: Order, axes: tuple[int, int, int]) -> fx.Node:
        """``node`` as [batch, channels, time], where ``order`` holds its axes by those of the convolution's operand."""
        wanted = [order[axis] for axis in axes]
        if None in wanted or node.meta["val"].dim() != len(wanted):
            raise NotCausal("it has axes beside batch, channels and time")
        return node if wanted == [0, 1, 2] else self.emit(aten.permute.default, node, wanted)

    def _state(self, found: Sum) -> fx.Node | None:
        line = found.line
        if line.state is None:
            return None
        state = self._laid_out(line.state, line.state_order, found.axes)
        count = int(state.meta["val"].shape[2])
        if count == found.reach:
            return state
        return self.emit(aten.slice.Tensor, state, 2, count - found.reach, count)

    def _kept(self, y: fx.Node, use: Kept) -> fx.Node:
        """``y`` with the operations between the convolution and where its end is cut off."""
        for step in use.between:
            y = self.emit(step.target, y, *step.args[1:], **step.kwargs)
        return self._moved(y, use.layout)

    def _with_rest(self, y: fx.Node, found: Sum) -> fx.Node:
        for term in found.rest:
            y = self.emit(aten.add.Tensor, y, term)
        return y

    def _moved(self, value: fx.Node, layout: Order) -> fx.Node:
        """``value`` [batch, channels, time] with the axes of ``layout``."""
        order = [axis for axis in layout if axis is not None]
        if order != [0, 1, 2]:
            value = self.emit(aten.permute.default, value, order)
        for at, axis in enumerate(layout):
            if axis is None:
                value = self.emit(aten.unsqueeze.default, value, at)
        return value

    def _final_states(self, found: Sum) -> list[tuple[fx.Node, Order]]:
        """Slices of the padded tensor that hold its last steps, as many as the convolution reaches back."""
        line, result = found.line, []
        for node in line.path:
            axis = found.time_of(node, line)
            if axis is None:
                continue
            part = window(node, axis)
            if -part.start < found.reach or not part.whole:
                continue
            for user in node.users:
                start = slice_start(user, axis)
                if start is not None and user not in line.path and _is_end(found, part, user, start, axis):
                    result.append((user, found.layout_of(part)))
        return result


def _is_end(found: Sum, part: Window, node: fx.Node, start: Any, axis: int) -> bool:
    """Whether ``node``, which starts at step ``start`` of ``part``, holds the last steps, as many as are read back."""
    before = part.start + start - (part.steps - found.reach)
    return (
        found.reach > 0
        and before.is_zero is True
        and same_shape(node.meta["val"].shape[axis : axis + 1], [found.reach])
    )
