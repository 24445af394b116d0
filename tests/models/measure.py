"""Measures one model of the zoo in a process of its own: ``python -m tests.models.measure NAME seqc|torch|engines``.

Prints one line of JSON. A crash or a hang of either exporter then costs one row of the table and nothing else.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import seqc
import seqc.runtime
from seqc.errors import SeqcError, UnsupportedModelError
from tests.models.compare import TOLERANCE, relative_error
from tests.models.onnx_count import op_counts
from tests.models.zoo import ALL
from tests.models.zoo.base import BATCHES, Inputs, ZooModel, eager

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 7
MARK = "RESULT "

Run = Callable[[Inputs], list[Any]]


def example(zoo: ZooModel) -> Inputs:
    """The inputs a model is compiled with."""
    return zoo.inputs(EXAMPLE_BATCH, EXAMPLE_LENGTH if EXAMPLE_LENGTH in zoo.lengths else zoo.lengths[0], 0)


def errors_by_length(zoo: ZooModel, run: Run) -> dict[str, float | str]:
    """The worst error over batches 1 and 3 per length; the exception's first line where running fails."""
    source = zoo.build()
    found: dict[str, float | str] = {}
    for length in zoo.lengths:
        worst: float | str = 0.0
        for batch in BATCHES:
            inputs = zoo.inputs(batch, length, 1000 * length + batch)
            try:
                error = relative_error(run(inputs), eager(source, inputs))
            except Exception as problem:
                worst = first_line(problem)
                break
            worst = max(worst, error)
        found[str(length)] = worst
    return found


def loaded(artifact: Path) -> Run:
    """The artifact in ONNX Runtime on the CPU."""
    session = seqc.runtime.load(artifact, providers=["CPUExecutionProvider"])
    return lambda inputs: list(session.run({name: value.numpy() for name, value in inputs.items()}).values())


def all_right(errors: Mapping[str, float | str]) -> bool:
    """Whether a model ran at every length, and gave what its source gives."""
    return all(isinstance(error, float) and error <= TOLERANCE for error in errors.values())


def measure_seqc(zoo: ZooModel, folder: Path) -> dict[str, Any]:
    """Compile without the check, save, load in the runtime, and compare at every length."""
    start = time.perf_counter()
    try:
        compiled = seqc.compile(zoo.build(), example(zoo), dynamic_shapes=zoo.dynamic_shapes, check=False)
        seconds = time.perf_counter() - start
        compiled.save(folder / "artifact")
    except UnsupportedModelError as refusal:
        return {"status": "refused", "detail": first_line(refusal), "seconds": time.perf_counter() - start}
    except SeqcError as error:
        return {"status": "error", "detail": first_line(error), "seconds": time.perf_counter() - start}
    counts = op_counts(folder / "artifact" / "model.onnx")
    errors = errors_by_length(zoo, loaded(folder / "artifact"))
    right = all_right(errors)
    result = {"status": "right" if right else "wrong", "errors": errors, "seconds": seconds}
    result["became"] = became(compiled.report)
    return {**result, "nodes": sum(counts.values()), "scans": counts["Scan"], "loops": counts["Loop"]}


def became(report: Mapping[str, Any]) -> str:
    """The classes in which the model's recurrences were recognised; "loop" where some were in none."""
    found: set[str] = set()
    for record in report["passes"]:
        for reason in record["reasons"]:
            recognised = re.search(r" is an? (\w+) \(", reason)
            if record["name"] == "classify_recurrence" or (record["name"] == "fold_lti" and recognised):
                found.add(recognised[1] if recognised else "loop")
    return ", ".join(sorted(found))


def measure_torch(zoo: ZooModel, folder: Path) -> dict[str, Any]:
    """What ``torch.onnx.export(dynamo=True)`` makes of the same model with the same dynamic dimensions.

    They are given as torch.export.Dim: given as names, torch 2.13 raises for a loop over time instead of freezing it.
    """
    inputs = example(zoo)
    dims = {dim: torch.export.Dim(dim) for axes in zoo.dynamic_shapes.values() for dim in axes.values()}
    shapes = {name: {axis: dims[dim] for axis, dim in axes.items()} for name, axes in zoo.dynamic_shapes.items()}
    path = folder / "torch.onnx"
    start = time.perf_counter()
    try:
        program = torch.onnx.export(
            zoo.build(), (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False, opset_version=20
        )
        assert program is not None
        program.save(path)
    except Exception as error:
        return {"status": "error", "detail": first_line(error), "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    counts = op_counts(path)
    result = {"seconds": seconds, "nodes": sum(counts.values()), "scans": counts["Scan"], "loops": counts["Loop"]}
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        return {**result, "status": "error", "detail": f"ONNX Runtime refuses the model: {first_line(error)}"}
    names = {i.name for i in session.get_inputs()}

    def run(values: Inputs) -> list[Any]:
        return list(session.run(None, {name: value.numpy() for name, value in values.items() if name in names}))

    errors = errors_by_length(zoo, run)
    return {**result, "errors": errors, "status": verdict(errors, str(inputs_length(zoo)))}


def inputs_length(zoo: ZooModel) -> int:
    return EXAMPLE_LENGTH if EXAMPLE_LENGTH in zoo.lengths else zoo.lengths[0]


def verdict(errors: dict[str, float | str], exported: str) -> str:
    """``right`` at all lengths; ``frozen`` where it runs at the exported length only; else what is wrong."""
    good = {length for length, error in errors.items() if isinstance(error, float) and error <= TOLERANCE}
    if good == set(errors):
        return "right"
    if good == {exported}:
        others = [error for length, error in errors.items() if length != exported]
        silent = any(isinstance(error, float) for error in others)
        return "frozen: wrong numbers elsewhere" if silent else "frozen: fails elsewhere"
    if exported not in good:
        return "wrong"
    return "right only at " + ", ".join(sorted(good, key=int))


def first_line(error: BaseException) -> str:
    """The name of an exception and the first line of its message; for torch.onnx, of what it wraps."""
    cause = error.__cause__ if type(error).__module__.startswith("torch.onnx") and error.__cause__ else error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:400]


def parse(output: str) -> dict[str, Any] | None:
    """The result in what a measuring process printed, None where it died before it had one."""
    for line in output.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    return None


def main() -> None:
    from tests.models.measure_engines import measure_engines  # it reads this module

    name, which = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    measure = {"seqc": measure_seqc, "torch": measure_torch, "engines": measure_engines}[which]
    with tempfile.TemporaryDirectory() as folder:
        print(MARK + json.dumps(measure(ALL[name], Path(folder))), flush=True)


if __name__ == "__main__":
    main()
