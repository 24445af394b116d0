"""A compiled model with matrices or caches in few bits: what of its error is the compiler's, and what is the rounding's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch

from seqc.backends.onnx import export
from seqc.backends.onnx.float32_twin import has_bfloat16
from seqc.backends.onnx.quantize import Quantized, dequantized, quantize
from seqc.caches import SCHEMES, Int8, Scheme
from seqc.check import CheckReport, to_numpy
from seqc.compiler import Arrays, Compiled, float32_form, run_check, runner
from seqc.errors import UsageError
from seqc.frontend.signature import Signature
from seqc.passes import QuantizeCaches
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.streaming.chunks import in_chunks, states_json

Source = Callable[[dict[str, torch.Tensor]], Arrays]

_OTHERWISE_ROUNDED = 0.5
"""Of what the rounding of caches changes: so much may be due to single numbers that PyTorch and the model round otherwise."""


@dataclass(frozen=True)
class Checks:
    """What a compiled model is compared with."""

    source: Source
    signature: Signature
    tolerance: Mapping[str, float]

    def __call__(self, reference: Source, found: Compiled, tolerance: Mapping[str, float] | None = None) -> CheckReport:
        """Compare ``found`` with ``reference``, as a whole and, of streams, in pieces too. Raises VerificationError."""
        limits = self.tolerance if tolerance is None else tolerance
        report = run_check(reference, found.run, self.signature, found.program, limits)
        report.raise_if_failed()
        if found.program.states:
            chunks = in_chunks(found.session)
            run_check(reference, chunks, self.signature, found.program, limits).raise_if_failed()
        return report

    def off(self, found: Callable[[Arrays], Arrays], program: Program) -> float:
        """How far ``found`` is from the source, relative to an output's scale. Raises VerificationError where it fails."""
        unlimited = dict.fromkeys(self.tolerance, math.inf)
        report = run_check(self.source, found, self.signature, program, unlimited)
        report.raise_if_failed()
        return report.error


def quantized(compiled: Compiled, step: Program | None, options: Mapping[str, Any], checks: Checks | None) -> Compiled:
    """``compiled`` as ``options`` say: ``weights`` in int8 or int4, ``cache`` by a scheme; and what of its error is known.

    ``step`` is the Program of one new step of a stream. What was rounded has to be computed with as before; how far the
    rounding takes the model from the source is no error of the compiler's, and is measured. Raises VerificationError where the
    former fails, UsageError where there is nothing to quantise.
    """
    bits, cache = options["weights"], options["cache"]
    found: dict[str, Any] = {"check": None, "drift": None}
    notes = []
    result = compiled
    if cache != "float":
        assert step is not None, "asked for streams only"
        result, told = _small_caches(compiled, step, SCHEMES[cache], checks)
        found |= told
        notes.append(f"{told['caches']} cache{' is' if told['caches'] == 1 else 's are'} {cache}")
    if bits != "float":
        if checks is not None:
            # with caches as they were: what is rounded in these would hide what is compared
            found["check"] = _check_weights(compiled, bits, checks).to_json()
        result, stored = _small_weights(result, bits)
        found |= {
            "weights": bits,
            "matrices": stored.count,
            "bytes_before": stored.bytes_before,
            "bytes_after": stored.bytes_after,
            "stayed": stored.stayed,
        }
        notes.append(f"{stored.count} matrices are {bits} ({stored.bytes_before} bytes became {stored.bytes_after})")
    drift = ""
    if checks is not None:
        found["drift"] = checks.off(_runnable(result).run, result.program)
        drift = f": the model is off from the source by up to {found['drift']:.2g} of an output's scale, which is not limited"
    result.report["quantization"] = found
    result.manifest["quantization"] = {
        **({"weights": bits} if bits != "float" else {}),
        **({"cache": cache} if cache != "float" else {}),
        "drift": found["drift"],
    }
    result.manifest["notes"].append(" and ".join(notes) + drift)
    return result


def _runnable(compiled: Compiled) -> Compiled:
    models = filter(None, (compiled.model, compiled.step_model))
    return float32_form(compiled) if any(map(has_bfloat16, models)) else compiled


def _with(compiled: Compiled, made: Callable[[ir.Model], ir.Model]) -> Compiled:
    step = None if compiled.step_model is None else made(compiled.step_model)
    return replace(compiled, model=made(compiled.model), step_model=step, _session=None, _directory=None)


def _small_weights(compiled: Compiled, bits: str) -> tuple[Compiled, Quantized]:
    told: list[Quantized] = []

    def made(model: ir.Model) -> ir.Model:
        result, found = quantize(model, bits)
        told.append(found)
        return result

    result = _with(compiled, made)
    stored = told[-1]
    if not stored.count:
        why = "".join(f"; {name} {reason}" for name, reason in stored.stayed.items())
        raise UsageError(f"weights={bits} is about matrices that inputs are multiplied with, and there are none{why}")
    return result, stored


def _check_weights(compiled: Compiled, bits: str, checks: Checks) -> CheckReport:
    """Compare the form with small matrices with the one that has their floats, rounded."""
    rounded = _runnable(_with(compiled, lambda model: dequantized(model, bits)))

    def reference(inputs: dict[str, torch.Tensor]) -> Arrays:
        return rounded.run({name: to_numpy(tensor) for name, tensor in inputs.items()})

    return checks(reference, _runnable(_small_weights(compiled, bits)[0]))


def _small_caches(
    compiled: Compiled, step: Program, scheme: Scheme, checks: Checks | None
) -> tuple[Compiled, dict[str, Any]]:
    """``compiled`` with its caches stored by ``scheme``, and what the report says of that.

    Two things are shown. With the rounding left out, all else as it is, the model agrees with the source within the tolerance.
    With it, it agrees with the same Program in PyTorch, but for numbers half way between two whole ones, which may be
    rounded one way here and the other there: half of what the rounding changes is accepted for that.
    """
    result, count = _stored(compiled, step, scheme)
    told: dict[str, Any] = {"cache": scheme.name, "caches": count, "check_of_caches": None}
    if checks is None:
        return result, told
    if isinstance(scheme, Int8):
        checks(checks.source, _runnable(_stored(compiled, step, replace(scheme, rounded=False))[0]))
    reference = runner(result.program)
    off = checks.off(lambda arrays: reference({n: torch.from_numpy(a) for n, a in arrays.items()}), result.program)
    limits = {name: max(limit, _OTHERWISE_ROUNDED * off) for name, limit in checks.tolerance.items()}
    told["check_of_caches"] = checks(reference, _runnable(result), limits).to_json()
    before, after = (c.session.memory() for c in (_runnable(compiled), _runnable(result)))
    told["state_bytes"] = {"before": vars(before), "after": vars(after)}
    return result, told


def _stored(compiled: Compiled, step: Program, scheme: Scheme) -> tuple[Compiled, int]:
    """(the model with its caches stored by ``scheme``, how many there are). Raises UsageError where there are none."""
    programs = [compiled.program.copy(), step.copy()]
    (record,), _ = (run_passes(program, [QuantizeCaches(scheme)]) for program in programs)
    if not record.changes:
        why = "".join(f"; {reason}" for reason in record.reasons)
        raise UsageError(f"cache={scheme.name} is about keys and values that a stream keeps, and there are none{why}")
    general, single = (export(program, compiled.manifest["opset"]) for program in programs)
    manifest = {
        **compiled.manifest,
        "states": states_json(programs[0]),
        "notes": [*compiled.manifest["notes"]],
        "passes": [
            *compiled.manifest["passes"],
            {"name": record.name, "changes": record.changes, "reasons": list(record.reasons)},
        ],
    }
    changed = replace(
        compiled,
        program=programs[0],
        model=general,
        step_model=single,
        manifest=manifest,
        _session=None,
        _directory=None,
    )
    return changed, record.changes
