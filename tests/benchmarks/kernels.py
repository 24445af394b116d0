"""How many kernels TensorRT makes of each scan op for target ``tensorrt``; its builder needs no GPU.

``python -m tests.benchmarks.kernels [--length 2048] [--longest 4096] [--only NAME ...]``, with the extra ``[rtx]`` installed.

Float32, batch 1, of a free length, for compute capability 8.9.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import onnx_ir as ir
import torch

import seqc
from seqc.backends.onnx import export
from seqc.backends.tensorrt.build import build_engine
from seqc.backends.tensorrt.log import read_log
from seqc.backends.tensorrt.package import PACKAGES
from seqc.backends.tensorrt.profiles import shapes, sizes
from seqc.backends.tensorrt.settings import Range
from seqc.backends.tensorrt.where import Origins
from seqc.lowerings.lower import Lower
from seqc.passes import DEFAULT, FoldConstants
from seqc.pipeline import run_passes
from seqc.target import TARGETS
from tests.benchmarks.scans import CASES, Calls, Case

_LOOPS = frozenset({"Loop", "Scan"})


class ComplexStates(torch.nn.Module):
    """A diagonal recurrence in complex numbers, as in LRU and S5: 1024 states."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = torch.nn.Parameter(torch.linspace(-5.0, -1.0, 1024))
        self.angle = torch.nn.Parameter(torch.rand(1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = torch.exp(torch.complex(-torch.exp(self.log_decay), self.angle))
        h = torch.zeros(x.shape[0], 1024, dtype=torch.complex64)
        out = []
        for t in range(x.shape[1]):
            h = rate * h + x[:, t]
            out.append(h.real)
        return torch.stack(out, 1)


class DenseStates(torch.nn.Module):
    """A dense state of 16 numbers for each of 256 channels, read before the update, as in SpaceTime."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.linalg.qr(torch.randn(16, 16))[0] * 0.99)
        self.b, self.c = torch.nn.Parameter(torch.randn(256, 16)), torch.nn.Parameter(torch.randn(256, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 256, 16)
        out = []
        for t in range(x.shape[1]):
            out.append((h * self.c).sum(-1))
            h = h @ self.a + self.b * x[:, t].unsqueeze(-1)
        return torch.stack(out, 1)


class LiquidStates(torch.nn.Module):
    """A decay that depends on the input, 16 states for each of 256 channels (liquid S4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.rand(256, 16))
        self.b, self.c = torch.nn.Parameter(torch.randn(256, 16) * 0.1), torch.nn.Parameter(torch.randn(256, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 256, 16)
        out = []
        for t in range(x.shape[1]):
            bu = self.b * x[:, t].unsqueeze(-1)
            h = (self.a + bu) * h + bu
            out.append((h * self.c).sum(-1))
        return torch.stack(out, 1)


LOOPS = {
    "complex states, 1024": Case(
        "recurrence", ComplexStates(), lambda length: (torch.randn(1, length, 1024),), (0,), 1
    ),
    "dense states, 256 x 16": Case("recurrence", DenseStates(), lambda length: (torch.randn(1, length, 256),), (0,), 1),
    "liquid states, 256 x 16": Case(
        "recurrence", LiquidStates(), lambda length: (torch.randn(1, length, 256),), (0,), 1
    ),
}
"""Models whose loop is no op of its own, but affine in its states."""

NAMES = (
    "diagonal, 2048",
    "selective scan, 1536 x 16",
    "scalar decay, 24 heads, 128 x 64, shared keys",
    "softmax scan, 8 heads of 64",
    "complex states, 1024",
    "dense states, 256 x 16",
)
"""What the README shows; every other case can be named by ``--only``."""


def write(case: Case, path: Path, longest: int) -> ir.Model:
    """Write the case as ONNX for TensorRT, of a length up to ``longest``; returns what was written."""
    sequence = torch.export.Dim("sequence", max=longest)
    shapes = [{case.axis: sequence} if i in case.timed else {} for i in range(len(case.inputs(9)))]
    model = case.function if isinstance(case.function, torch.nn.Module) else Calls(case.function)
    program = seqc.trace(model, case.inputs(9), shapes)
    run_passes(program, [*(DEFAULT if case.op == "recurrence" else ()), Lower(TARGETS["tensorrt"]), FoldConstants()])
    onnx = export(program)
    ir.save(onnx, path)
    return onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--only", nargs="+", default=list(NAMES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sequence = {"sequence": Range(1, options.length, options.longest)}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            path = Path(folder) / "model.onnx"
            model = write((CASES | LOOPS)[name], path, options.longest)
            loops = sum(node.op_type in _LOOPS for node in model.graph.all_nodes())
            inputs = shapes(((v.name or "", sizes(v)) for v in model.graph.inputs), sequence)
            _, log = build_engine(PACKAGES["tensorrt_rtx"], path, Origins(model), inputs, sms=(89,))
            built = read_log(log)
            megabytes = built.memory["activation_bytes"] / 1e6
            found = f"{len(built.kernels)} kernels, {loops} loops, {megabytes:.0f} MB of activations"
            print(f"{name}: {found} at lengths up to {options.longest}", flush=True)


if __name__ == "__main__":
    main()
