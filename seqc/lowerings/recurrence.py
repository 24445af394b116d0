"""Forms of ``seqc::recurrence``."""

from __future__ import annotations

import torch.fx as fx

from seqc.classify.kinds import kinds_of
from seqc.emit import Emitter
from seqc.lowerings.base import Lowering


def loop(emit: Emitter, node: fx.Node) -> None:
    """The node stays: what executes the graph runs it step by step."""


def _why(node: fx.Node) -> str:
    return f"{kinds_of(node)}: a loop over single steps"


LOWERINGS = (Lowering("seqc::recurrence", "loop", _why, loop),)
