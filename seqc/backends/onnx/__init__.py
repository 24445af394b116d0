"""The ONNX backend: a Program to an ONNX model.

Data flows through :mod:`prepare` (a copy with explicit casts), :mod:`translate` (nodes and bodies) and
:mod:`finalize` (opset, optimisation, names, metadata).
"""

from __future__ import annotations

import onnx_ir

from seqc.backends.onnx.finalize import finalize
from seqc.backends.onnx.prepare import prepare
from seqc.backends.onnx.translate import stamp, translate
from seqc.errors import UsageError
from seqc.program import Program

OPSETS = range(18, 28)
"""torchlib's translations start at 18; 27 is the newest opset that ONNX Runtime 1.31 can load."""


def export(program: Program, opset: int = 20) -> onnx_ir.Model:
    """``program`` as an ONNX model of ``opset`` (18 to 27), with the weights shared, not copied.

    Inputs, outputs and initializers carry the names of the ports and weights, symbolic sizes those of the dimensions.
    Raises UsageError for another opset, and UnsupportedOpError that names every op without an ONNX form, with module
    path and source line.
    """
    if opset not in OPSETS:
        raise UsageError(f"the onnx backend emits opsets {OPSETS.start} to {OPSETS.stop - 1}, not {opset}")
    prepared = prepare(program)
    model = finalize(translate(prepared, opset), prepared, opset)
    stamp(model, prepared)
    return model
