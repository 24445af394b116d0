"""Which dimension a stream takes steps along."""

from __future__ import annotations

from seqc.errors import UsageError
from seqc.program import Dim, Program


def time_of(program: Program, name: str | None = None) -> Dim:
    """The dimension of the steps. Raises UsageError where there is none, or a choice."""
    grown = {d.name for d in program.dims if any(d.name in map(str, p.shape) for p in program.given_inputs)}
    found = [d for d in program.dims if d.name in grown and "batch" not in d.name.lower()]
    if name is not None:
        chosen = [d for d in program.dims if d.name == name]
        if not chosen:
            raise UsageError(f"no dimension {name!r} (dimensions: {', '.join(d.name for d in program.dims)})")
        return chosen[0]
    if len(found) != 1:
        listed = ", ".join(d.name for d in found) or "none"
        raise UsageError(
            f"a streaming model has one dimension of steps; here: {listed} (batch dimensions say so by name)"
        )
    return found[0]
