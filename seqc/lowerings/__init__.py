"""How dialect ops are written with operations that a target has: an ordered list of forms for each op.

The first form that a target has, and that takes the node, wins; :class:`seqc.lowerings.lower.Lower` says which and why.
"""

from __future__ import annotations

FORMS: dict[str, tuple[str, ...]] = {
    "linear_scan": ("sequential", "prefix"),
    "selective_scan": ("channels_last", "prefix"),
    "softmax_scan": ("contrib", "sequential", "prefix"),
    "linear_attention": (
        "standard",
        "chunked",
        "contrib",
        "chunked_delta",
        "sequential",
        "parallel_chunks",
        "parallel_delta",
    ),
    "gated_rnn": ("native", "sequential"),
    "causal_conv": ("standard", "conv", "contrib", "taps"),
    "recurrence": ("loop", "blocked", "newton"),
    "lti_scan": ("chunked", "sequential", "prefix", "direct", "fft"),
    "linalg_solve_triangular": ("rows", "blocks"),
}
"""The forms of each op by name, in the order in which they are tried. Here, and not beside the code that writes them,
because the command line lists them where torch is not installed."""

FIRST_WITHOUT_LOOPS: dict[str, tuple[str, ...]] = {
    "linear_scan": ("prefix",),
    "selective_scan": ("prefix",),
    "softmax_scan": ("prefix",),
    "linear_attention": ("parallel_chunks", "parallel_delta"),
    "recurrence": ("blocked",),
    "lti_scan": ("prefix",),
    "linalg_solve_triangular": ("blocks",),
}
"""The forms to try first where a target runs a loop as a kernel for each operation of each step."""

FIRST_IN_ENGINES: dict[str, tuple[str, ...]] = {"causal_conv": ("taps",)}
"""The forms to try first for TensorRT, which fuses element-wise operations (ONNX Runtime on a GPU runs each by itself)."""

OWN_WITHOUT_LOOPS: dict[str, str] = {"linear_attention": "contrib", "causal_conv": "contrib"}
"""The form to try even before that: one operator of the runtime's own, which has no loop (ONNX Runtime has kernels of both
for CUDA in float32 and float16)."""

WHERE_POSSIBLE: frozenset[str] = frozenset({"newton"})
"""Forms that, asked for, are taken by the nodes that they can write and are no error for others: a model has affine and
nonlinear loops, and this form is for the latter."""

SETTINGS: dict[str, dict[str, float]] = {"newton": {"iterations": 5, "tolerance": 1e-6}}
"""What forms are told, by form: options ``FORM.NAME`` of the compiler."""
