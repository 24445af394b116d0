"""The dialect: one op per file, with its reference implementation. Importing any registers all with torch."""

from seqc.ops import (
    causal_conv,
    fft_conv,
    gated_rnn,
    left_padded_conv,
    linear_attention,
    linear_scan,
    lti_scan,
    onnx_rnn,
    ort_causal_conv,
    ort_linear_attention,
    selective_scan,
    softmax_scan,
)

__all__ = [
    "causal_conv",
    "fft_conv",
    "gated_rnn",
    "left_padded_conv",
    "linear_attention",
    "linear_scan",
    "lti_scan",
    "onnx_rnn",
    "ort_causal_conv",
    "ort_linear_attention",
    "selective_scan",
    "softmax_scan",
]
