"""Every lowering, by op and name."""

from __future__ import annotations

from seqc.lowerings import FORMS, chunked_attention, gated_rnn, linear_attention, linear_scan, selective_scan
from seqc.lowerings.base import Lowering

_ALL = {
    (form.op, form.name): form
    for module in (linear_scan, selective_scan, linear_attention, chunked_attention, gated_rnn)
    for form in module.LOWERINGS
}

LOWERINGS: dict[str, tuple[Lowering, ...]] = {
    f"seqc::{op}": tuple(_ALL.pop((f"seqc::{op}", name)) for name in names) for op, names in FORMS.items()
}
"""The forms of each op in the order in which they are tried."""

assert not _ALL, f"lowerings that FORMS does not list: {list(_ALL)}"
