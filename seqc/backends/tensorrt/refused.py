"""What TensorRT takes without a word and computes otherwise: refused before anything is built."""

from __future__ import annotations

import onnx_ir as ir

from seqc.backends.tensorrt.where import Origins
from seqc.errors import UnsupportedOpError

# By operator: the input that is dropped, and what to do instead.
_DROPPED = {"Attention": (6, "nonpad_kv_seqlen", "mask the padded steps with attn_mask")}


def check_taken(model: ir.Model, title: str) -> None:
    """Raise UnsupportedOpError that lists everything in ``model`` that ``title`` would silently compute otherwise."""
    origins = Origins(model)
    lines = [
        f"the input {value.name!r} is float64, which becomes float32: convert the model to float32 first"
        for value in model.graph.inputs
        if value.dtype is ir.DataType.DOUBLE
    ]
    for node in model.graph.all_nodes():
        where = origins.get(node.name or "") or node.op_type
        if any(value.dtype is ir.DataType.DOUBLE for value in node.outputs):
            lines.append(f"{where} computes in float64, which becomes float32: compute it in float32")
        place, name, instead = _DROPPED.get(node.op_type, (-1, "", ""))
        if 0 <= place < len(node.inputs) and node.inputs[place] is not None:
            lines.append(f"{where} has the input {name}, which is dropped: {instead}")
    if lines:
        raise UnsupportedOpError("\n  ".join([f"{title} would not compute this model as it is written", *lines]))
