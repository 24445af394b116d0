"""Runs passes in the order given, verifying the Program after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from seqc.errors import SeqcError, VerificationError
from seqc.program import Program
from seqc.rewrite import Pass
from seqc.verify import verify

Progress = Callable[[str, int, float], None]
"""Called as ``progress(stage, nodes, seconds)`` when a stage has ended."""


@dataclass(frozen=True)
class PassRecord:
    """What a pass did: honest change count, nodes before and after, seconds, and its reasons in its own words."""

    name: str
    changes: int
    nodes_before: int
    nodes_after: int
    seconds: float
    reasons: tuple[str, ...] = ()


def run_passes(program: Program, passes: Iterable[Pass], progress: Progress | None = None) -> list[PassRecord]:
    """Apply ``passes`` to ``program`` in place. An error names the pass that failed."""
    records = []
    for step in passes:
        before, start = program.node_count(), time.perf_counter()
        program.reasons.clear()
        try:
            changes = step(program)
            verify(program)
        except SeqcError:
            raise
        except Exception as error:
            raise VerificationError(f"pass {step.name!r} failed: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
        reasons = tuple(dict.fromkeys(program.reasons))
        record = PassRecord(step.name, changes, before, program.node_count(), seconds, reasons)
        records.append(record)
        if progress is not None:
            progress(step.name, record.nodes_after, record.seconds)
    return records
