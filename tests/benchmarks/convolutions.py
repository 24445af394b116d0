"""A causal convolution over an image of one row, in ONNX Runtime, as a multiple of the same over a line.

``python -m tests.benchmarks.convolutions [--lengths 2 16 64 ..] [--rounds 9]``

Batch 1, float32, two threads, both interleaved, medians. ``seqc.backends.onnx.left_padded_conv`` has its thresholds from here.
"""

from __future__ import annotations

import argparse
from functools import partial

import onnx_ir as ir
import onnxruntime
import torch

from seqc.backends.onnx.left_padded_conv import conv
from tests.benchmarks.scans import opened
from tests.benchmarks.timing import repeated

SIZES = ((1536, 3), (1536, 4), (1536, 7), (1536, 31), (256, 4), (192, 4), (128, 4), (64, 4), (256, 15), (64, 31))
"""(channels, taps)"""


def session(channels: int, taps: int, over_image: bool) -> onnxruntime.InferenceSession:
    x = ir.Value(name="x", shape=ir.Shape([1, channels, "steps"]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = []
    for name, shape in (("weight", (channels, 1, taps)), ("bias", (channels,))):
        tensor = ir.tensor(torch.randn(shape).numpy(), name=name)
        weights.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor))
    graph = ir.Graph([x], [], nodes=[], initializers=weights, opset_imports={"": 18}, name="convolution")
    graph.outputs.append(conv([x, *weights], taps - 1, 1, over_image, graph))
    graph.outputs[0].name, graph.outputs[0].type = "y", x.type
    return opened(ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString(), "CPUExecutionProvider")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 16, 64, 128, 256, 512, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    onnxruntime.set_global_thread_pool_sizes(2, 1)
    for channels, taps in SIZES:
        sessions = {over_image: session(channels, taps, over_image) for over_image in (False, True)}
        shown = []
        for length in options.lengths:
            feeds = {"x": torch.randn(1, channels, length).numpy()}
            times = repeated({str(k): partial(s.run, None, feeds) for k, s in sessions.items()}, options.rounds)
            shown.append(f"{length}: {times['True'] / times['False']:.2f}")
        print(f"{channels} channels, {taps} taps  {', '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
