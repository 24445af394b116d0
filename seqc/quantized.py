"""A compiled model with its matrices in int8 or int4: what of its error is the compiler's, and what is the rounding's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch

from seqc.backends.onnx.float32_twin import has_bfloat16
from seqc.backends.onnx.quantize import dequantized, quantize
from seqc.check import to_numpy
from seqc.compiler import Arrays, Compiled, float32_form, run_check
from seqc.errors import UsageError
from seqc.frontend.signature import Signature
from seqc.program import Program
from seqc.streaming.chunks import in_chunks


@dataclass(frozen=True)
class Checks:
    """What a compiled model is compared with."""

    source: Callable[[dict[str, torch.Tensor]], Arrays]
    signature: Signature
    program: Program
    tolerance: Mapping[str, float]


def quantized(compiled: Compiled, bits: str, checks: Checks | None) -> Compiled:
    """``compiled`` with its matrices in int8 or int4, and what of its error is known.

    The compiled model has to compute what it does with the weights that were rounded; how far these are from the source's
    is no error of the compiler's, and is measured. Raises VerificationError where the former fails, UsageError where there
    is nothing to quantise.
    """
    models = [compiled.model, *([compiled.step_model] if compiled.step_model is not None else [])]
    made = [quantize(model, bits) for model in models]
    told = made[0][1]
    if not told.count:
        why = "".join(f"; {name} {reason}" for name, reason in told.stayed.items())
        raise UsageError(f"weights={bits} is about matrices that inputs are multiplied with, and there are none{why}")
    found: dict[str, Any] = {
        "weights": bits,
        "matrices": told.count,
        "bytes_before": told.bytes_before,
        "bytes_after": told.bytes_after,
        "stayed": told.stayed,
        "check": None,
        "drift": None,
    }

    def with_models(models: list[ir.Model]) -> Compiled:
        step = models[1] if len(models) > 1 else None
        return replace(compiled, model=models[0], step_model=step, _session=None, _directory=None)

    result = with_models([model for model, _ in made])
    note = f"{told.count} matrices are {bits} ({told.bytes_before} bytes became {told.bytes_after})"
    if checks is not None:
        narrow = any(map(has_bfloat16, models))
        runnable = float32_form(result) if narrow else result
        rounded = with_models([dequantized(model, bits) for model in models])
        reference = float32_form(rounded) if narrow else rounded

        def run_reference(inputs: dict[str, torch.Tensor]) -> Arrays:
            return reference.run({name: to_numpy(tensor) for name, tensor in inputs.items()})

        report = run_check(run_reference, runnable.run, checks.signature, checks.program, checks.tolerance)
        report.raise_if_failed()
        found["check"] = report.to_json()
        if checks.program.states:
            chunks = in_chunks(runnable.session)
            run_check(run_reference, chunks, checks.signature, checks.program, checks.tolerance).raise_if_failed()
        unlimited = dict.fromkeys(checks.tolerance, math.inf)
        drift = run_check(checks.source, runnable.run, checks.signature, checks.program, unlimited)
        drift.raise_if_failed()
        found["drift"] = drift.error
        note += (
            f": the model is off from the source by up to {drift.error:.2g} of an output's scale, which is not limited"
        )
    result.report["quantization"] = found
    result.manifest["quantization"] = {"weights": bits, "drift": found["drift"]}
    result.manifest["notes"].append(note)
    return result
