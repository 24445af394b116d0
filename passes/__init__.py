"""The passes of seqc: one rewrite of a Program per file."""

from __future__ import annotations

from collections.abc import Iterable

from seqc.passes.causal_conv import CausalConv
from seqc.passes.causal_masks import CausalMasks
from seqc.passes.classify_recurrence import ClassifyRecurrence
from seqc.passes.fill_loops import FillLoops
from seqc.passes.fold_constants import FoldConstants
from seqc.passes.fold_lti import FoldLti
from seqc.passes.fuse_discretization import FuseDiscretization
from seqc.passes.fuse_flips import FuseFlips
from seqc.passes.group_queries import GroupQueries
from seqc.passes.hoist import Hoist
from seqc.passes.make_stateful import MakeStateful
from seqc.passes.narrow import Narrow
from seqc.passes.narrow_numbers import NarrowNumbers
from seqc.passes.quantize_caches import QuantizeCaches
from seqc.passes.repeat_keys import RepeatKeys
from seqc.passes.sink import Sink
from seqc.passes.sink_readouts import SinkReadouts
from seqc.passes.split_complex import SplitComplex
from seqc.passes.split_projections import SplitProjections
from seqc.passes.split_recurrence import SplitRecurrence
from seqc.passes.widen_states import WidenStates
from seqc.rewrite import Pass

__all__ = [
    "BY_NAME",
    "DEFAULT",
    "CausalConv",
    "CausalMasks",
    "ClassifyRecurrence",
    "FillLoops",
    "FoldConstants",
    "FoldLti",
    "FuseDiscretization",
    "FuseFlips",
    "GroupQueries",
    "Hoist",
    "MakeStateful",
    "Narrow",
    "NarrowNumbers",
    "QuantizeCaches",
    "RepeatKeys",
    "Sink",
    "SinkReadouts",
    "SplitComplex",
    "SplitProjections",
    "SplitRecurrence",
    "WidenStates",
    "register",
]

# What weights alone decide is folded while values are still complex: PyTorch computes on them what ONNX cannot, from
# exponentials that kept their digits. Complex values next: what Hoist then moves is real, and the projections it looks
# for are plain matrix products, which are first told apart by what they read. Then loops have in their bodies what
# depends on the state, and what blows up memory outside: this is what is recognised. Convolutions that read no state have
# left the loops by then.
DEFAULT: tuple[Pass, ...] = (
    FuseDiscretization(),
    FoldConstants(),
    SplitComplex(),
    SplitProjections(),
    SplitRecurrence(),
    Hoist(),
    SinkReadouts(),
    Sink(),
    CausalConv(),
    CausalMasks(),
    GroupQueries(),
    FoldLti(),
    ClassifyRecurrence(),
    FuseFlips(),
)
"""The passes that run unless told otherwise, in this order."""


def register(passes: Iterable[Pass]) -> dict[str, Pass]:
    """The passes by name. Raises ValueError where two have the same name."""
    result: dict[str, Pass] = {}
    for step in passes:
        if step.name in result:
            raise ValueError(f"two passes are called {step.name!r}: {result[step.name]!r} and {step!r}")
        result[step.name] = step
    return result


BY_NAME: dict[str, Pass] = register(DEFAULT)
