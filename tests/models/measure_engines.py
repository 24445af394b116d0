"""Builds TensorRT engines of one model of the zoo, for the GPUs and types of the README's table."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import seqc
from seqc.errors import SeqcError
from tests.models.measure import all_right, errors_by_length, example, first_line, loaded
from tests.models.zoo.base import ZooModel

SMS = (80, 89, 120)
DTYPES = ("fp32", "fp16")


def measure_engines(zoo: ZooModel, folder: Path) -> dict[str, Any]:
    """One engine per type for all of ``SMS``: kernels, what loops in it, or why there is none.

    An engine does not run here. What it is built of does: that ONNX model is compared with the source at every length, in
    float32, where the builder's target has forms of its own.
    """
    return {dtype: _engine(zoo, dtype, folder / dtype) for dtype in DTYPES}


def _engine(zoo: ZooModel, dtype: str, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    options = {"sm": list(SMS), "dtype": dtype}
    try:
        compiled = seqc.compile(
            zoo.build(),
            example(zoo),
            dynamic_shapes=zoo.dynamic_shapes,
            target="tensorrt-rtx",
            options=options,
            check=False,
        )
    except SeqcError as error:
        return {"status": "refused", "detail": first_line(error), "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    (built,), (listed,) = compiled.manifest["engines"], compiled.report["engines"]
    (reasons,) = (record["reasons"] for record in compiled.report["passes"] if record["name"] == "lower")
    found = {
        "status": "built",
        "seconds": seconds,
        "kernels": built["kernels"],
        "loops": loops(reasons, {n.op_type for n in compiled.model.graph.all_nodes()})
        if built["has_step_loop"]
        else [],
        "in_loops": sum(kernel["in_loop"] for kernel in listed["kernels"]),
        "activation_bytes": built["activation_bytes"],
    }
    if dtype == "fp32":
        compiled.save(folder)
        errors = errors_by_length(zoo, loaded(folder))
        found |= {"errors": errors, "status": "built" if all_right(errors) else "built of a wrong ONNX model"}
    return found


def loops(reasons: Iterable[str], operators: Iterable[str]) -> list[str]:
    """What the forms that loop compute, as the pass ``lower`` says it, and what ONNX's own recurrent operators do; "inside an
    operator" where none of these is there."""
    found = ["gated_rnn"] if {"LSTM", "GRU", "RNN"} & set(operators) else []
    for reason in reasons:
        told = re.search(r": recurrence as loop: (.*?): a loop over single steps", reason)
        step = re.search(r": (\w+) as sequential", reason)
        blocks = re.search(r": (\w+) as blocks: .* in a loop over blocks", reason)
        found += [match[1] for match in [told or step] if match]
        found += [f"{blocks[1]} (over blocks of rows)"] if blocks else []
    return sorted(set(found)) or ["inside an operator"]


def engine_cells(result: Mapping[str, Any]) -> list[str]:
    """The columns of the table: engine, kernels, "loop over steps?"."""
    if not result:
        return ["", "", ""]
    if "status" in result:  # the process died
        return [f"{result['status']}: {result['detail'][:160]}", "", ""]
    built = {dtype: found for dtype, found in result.items() if "kernels" in found}
    engine = [_status(dtype, found) for dtype, found in result.items()]
    kernels = [str(found["kernels"]) for found in built.values()]
    told = sorted({what for found in built.values() for what in found["loops"]})
    return [
        ", ".join(engine) if all(f["status"] == "built" for f in result.values()) else "; ".join(engine),
        " / ".join(kernels if len(set(kernels)) > 1 else kernels[:1]),
        ("no" if built else "") if not told else f"yes: {', '.join(told)}",
    ]


def _status(dtype: str, found: Mapping[str, Any]) -> str:
    if found["status"] == "built":
        return dtype
    return f"{dtype}: {found['status']}" + (f", {found['detail'][:160]}" if "detail" in found else "")
