"""TensorRT engines of seqc's models against those of torch.onnx's own export and of an ONNX Scan.

``python -m tests.benchmarks.engines [--length 2048] [--longest 32768] [--limit 600] [--only NAME ...] [--ways WAY ...]``,
with the extra ``[rtx]`` installed; its builder needs no GPU.

Models of the README's table, float32, batch 1, for compute capability 8.9: once at one length, once for all lengths up to the
longest. ``ONNX Scan`` is seqc's model with its recurrences left as loops; torch.onnx exports at the length (loops unrolled), or
with a dynamic dimension. Each way is a process of its own, which ends at the limit; what is timed is the build alone. Scratch
is what the builder plans: values of over 2^31 elements, as the scores of attention at 32,768 steps, are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

import seqc
from seqc.backends.tensorrt.build import build_engine
from seqc.backends.tensorrt.log import read_log
from seqc.backends.tensorrt.package import PACKAGES
from seqc.backends.tensorrt.profiles import shapes, sizes
from seqc.backends.tensorrt.settings import Range
from seqc.backends.tensorrt.where import Origins
from tests.models.compare import TOLERANCE, relative_error
from tests.models.measure import MARK, first_line, parse
from tests.models.zoo import ALL
from tests.models.zoo.base import Inputs, ZooModel, eager

NAMES = ("mamba", "mamba2", "rwkv", "lstm_cell_loop", "llama")
WAYS = ("seqc", "ONNX Scan", "torch.onnx")
_OTHER = 33
"""A length at which no model was exported."""


def export(zoo: ZooModel, way: str, lengths: Range, path: Path) -> None:
    """Write ``zoo`` as ONNX for these lengths."""
    dims = {
        "batch": torch.export.Dim("batch", max=8),
        "sequence": torch.export.Dim("sequence", max=max(lengths.max, 64)),
    }
    given = {name: {axis: dims[dim] for axis, dim in axes.items()} for name, axes in zoo.dynamic_shapes.items()}
    if way == "torch.onnx":
        fixed = lengths.min == lengths.max
        inputs = zoo.inputs(2, lengths.max if fixed else 7, 0)
        named = {name: {0: dims["batch"]} for name in given} if fixed else given
        done = torch.onnx.export(
            zoo.build(), (), kwargs=inputs, dynamo=True, dynamic_shapes=named, verbose=False, opset_version=20
        )
        assert done is not None
        done.save(path)
        return
    compiled = seqc.compile(
        zoo.build(),
        zoo.inputs(2, 7, 0),
        dynamic_shapes=given,
        target="tensorrt-rtx",
        options={"engines": "off"} | ({"lowering.recurrence": "loop"} if way == "ONNX Scan" else {}),
        passes=["-classify_recurrence", "-fold_lti"] if way == "ONNX Scan" else None,
        check=False,
    )
    compiled.save(path.parent / "artifact")
    (path.parent / "artifact" / "model.onnx").rename(path)


def is_right(zoo: ZooModel, path: Path, length: int) -> bool:
    """Whether the ONNX model runs at ``length`` and gives what the source gives."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs: Inputs = zoo.inputs(1, length, 0)
    try:
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    except Exception:  # whatever the runtime raises for shapes that do not fit
        return False
    return relative_error([np.asarray(x) for x in found], eager(zoo.build(), inputs)) <= TOLERANCE


def measure(name: str, way: str, lengths: Range, folder: Path) -> dict[str, Any]:
    """One engine: seconds of its build, its bytes, kernels and scratch memory; or why there is none."""
    zoo, path = ALL[name], folder / "model.onnx"
    try:
        export(zoo, way, lengths, path)
    except Exception as error:
        return {"none": f"not exported: {first_line(error)}"}
    model = ir.load(path)
    if way == "ONNX Scan" and not any(node.op_type in ("Scan", "Loop") for node in model.graph.all_nodes()):
        return {"none": "no loop"}
    if lengths.min < lengths.max and not is_right(zoo, path, _OTHER):
        return {"none": "frozen at the exported length"}
    asked = {"batch": Range(1, 1, 1), "sequence": lengths}
    ports = shapes(((v.name or "", sizes(v)) for v in model.graph.inputs), asked)
    start = time.perf_counter()
    try:
        content, log = build_engine(PACKAGES["tensorrt_rtx"], path, Origins(model), ports, sms=(89,))
    except seqc.errors.SeqcError as error:
        return {"none": str(error)}
    built = read_log(log)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": len(content),
        "kernels": len(built.kernels),
        "loop": built.has_loop,
        "scratch": built.memory["scratch_bytes"],
    }


def told(found: dict[str, Any]) -> str:
    if "none" in found:
        return str(found["none"])[:120]
    loop = ", a loop over steps" if found["loop"] else ""
    size = f"{found['bytes'] / 1e6:.1f} MB, {found['scratch'] / 1e6:.0f} MB of scratch"
    return f"{found['kernels']} kernels{loop}, {size}, built in {found['seconds']:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--limit", type=int, default=600, help="seconds for the export and the build of one engine")
    parser.add_argument("--only", nargs="+", default=list(NAMES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # the child: model, way, and a range
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        name, way, *numbers = options.one
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, way, Range(*map(int, numbers)), Path(folder))
            print(MARK + json.dumps(found), flush=True)
        return
    fixed, free = Range(*[options.length] * 3), Range(1, options.length, options.longest)
    for name in options.only:
        for title, lengths in ((f"length {options.length}", fixed), (f"lengths to {options.longest}", free)):
            print(f"{name}, {title}")
            for way in options.ways:
                child = ["--one", name, way, *map(str, (lengths.min, lengths.opt, lengths.max))]
                print(f"  {way}: {told(_limited(child, options.limit))}", flush=True)


def _limited(arguments: list[str], limit: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.engines", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"none": f"not done after {limit} s"}
    return parse(done.stdout) or {"none": f"the process ended with {done.returncode}"}


if __name__ == "__main__":
    main()
