"""The dialect: one op per file, with its reference implementation. Importing any registers all with torch."""

from seqc.ops import (
    gated_rnn,
    linear_attention,
    linear_scan,
    onnx_rnn,
    ort_linear_attention,
    selective_scan,
    softmax_scan,
)

__all__ = [
    "gated_rnn",
    "linear_attention",
    "linear_scan",
    "onnx_rnn",
    "ort_linear_attention",
    "selective_scan",
    "softmax_scan",
]
