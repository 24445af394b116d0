"""Forms that walk forward only, for nodes that walk time from the end."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.program import named_args

aten = torch.ops.aten

Write = Callable[[Emitter, fx.Node], list[fx.Node]]


def flipped(timed: Collection[str], walked: int) -> Callable[[Write], Write]:
    """A form of an op that it writes forward becomes one of both directions: time is flipped in front of and behind it.

    ``timed`` are the operands with a first axis of time, ``walked`` the number of results (the first ones) with it. Two
    copies of these cost less than a loop over steps.
    """

    def both_ways(write: Write) -> Write:
        def written(emit: Emitter, node: fx.Node) -> list[fx.Node]:
            operands = named_args(node)
            if not operands["reverse"]:
                return write(emit, node)
            forward = {
                name: emit(aten.flip.default, x, [0]) if name in timed and x is not None else x
                for name, x in operands.items()
            }
            results = write(emit, emit(node.target, *(forward | {"reverse": False}).values()))
            return [emit(aten.flip.default, x, [0]) if i < walked else x for i, x in enumerate(results)]

        written.__doc__ = write.__doc__
        return written

    return both_ways
