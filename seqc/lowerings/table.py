"""Every lowering, by op and name."""

from __future__ import annotations

from seqc.lowerings import (
    FIRST_IN_ENGINES,
    FIRST_WITHOUT_LOOPS,
    FORMS,
    OWN_WITHOUT_LOOPS,
    blocked,
    causal_conv,
    chunked_attention,
    gated_rnn,
    linear_attention,
    linear_scan,
    lti_convolution,
    lti_scan,
    newton,
    parallel_attention,
    prefix,
    recurrence,
    selective_scan,
    softmax_scan,
    triangular_solve,
)
from seqc.lowerings.base import Lowering, short_name
from seqc.target import Target

_ALL = {
    (short_name(form.op), form.name): form
    for module in (
        linear_scan,
        selective_scan,
        linear_attention,
        chunked_attention,
        parallel_attention,
        prefix,
        gated_rnn,
        softmax_scan,
        causal_conv,
        recurrence,
        blocked,
        lti_convolution,
        lti_scan,
        newton,
        triangular_solve,
    )
    for form in module.LOWERINGS
}

LOWERINGS: dict[str, tuple[Lowering, ...]] = {
    op: tuple(_ALL.pop((op, name)) for name in names) for op, names in FORMS.items()
}
"""The forms of each op, by its name without a namespace, in the order in which they are tried."""

assert not _ALL, f"lowerings that FORMS does not list: {list(_ALL)}"


def forms_of(op: str, target: Target) -> tuple[Lowering, ...]:
    """The forms of ``op`` in the order in which they are tried for ``target``; none where it is no op that is lowered."""
    op = short_name(op)
    forms = LOWERINGS.get(op, ())
    first = FIRST_WITHOUT_LOOPS.get(op, ()) if target.avoids_loops else ()
    first += FIRST_IN_ENGINES.get(op, ()) if target.engines else ()
    own = OWN_WITHOUT_LOOPS.get(op) if target.avoids_loops else None
    return tuple(sorted(forms, key=lambda form: (form.name != own, form.name not in first)))
