"""How dialect ops are written with operations that a target has: an ordered list of forms for each op.

The first form that a target has, and that takes the node, wins; :class:`seqc.lowerings.lower.Lower` says which and why.
"""

from __future__ import annotations

FORMS: dict[str, tuple[str, ...]] = {
    "linear_scan": ("sequential",),
    "selective_scan": ("channels_last",),
    "linear_attention": ("chunked", "contrib", "chunked_delta", "sequential"),
    "gated_rnn": ("native", "sequential"),
}
"""The forms of each op by name, in the order in which they are tried. Here, and not beside the code that writes them,
because the command line lists them where torch is not installed."""
