"""Forms of ``seqc::recurrence``."""

from __future__ import annotations

import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering


def loop(emit: Emitter, node: fx.Node) -> None:
    """The node stays: what executes the graph runs it step by step."""


LOWERINGS = (Lowering("seqc::recurrence", "loop", "a loop over single steps", loop),)
