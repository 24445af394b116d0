"""Runs exported models in ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from seqc.runtime.ort import RELEASED_OPSET, unreleased_opset


def checked(model: ir.Model) -> onnx.ModelProto:
    """The model's proto, after onnx.checker with full shape inference."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    proto = checked(model)
    with unreleased_opset() if model.opset_imports[""] > RELEASED_OPSET else contextlib.nullcontext():
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(sess: ort.InferenceSession, inputs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    names = [i.name for i in sess.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return sess.run(None, feeds)


def assert_same(found: Sequence[np.ndarray], expected: Sequence[torch.Tensor], tolerance: float = 1e-5) -> None:
    """Same dtype, shape, places of NaN and infinity; difference at most ``tolerance`` of the output's scale."""
    assert len(found) == len(expected)
    for a, tensor in zip(found, expected, strict=True):
        b = tensor.detach().numpy()
        assert a.dtype == b.dtype, f"dtype {a.dtype}, expected {b.dtype}"
        assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
        if b.dtype.kind == "f":
            same = (np.isnan(a) == np.isnan(b)) & (np.isinf(a) == np.isinf(b))
            assert same.all(), f"NaN or infinity differ:\n{a}\n{b}"
            finite = np.isfinite(b)
            assert (a[np.isinf(b)] == b[np.isinf(b)]).all(), "infinities of other sign"
            scale = max(float(np.abs(b[finite]).max(initial=0.0)), 1e-30)
            error = float(np.abs(a[finite].astype(np.float64) - b[finite]).max(initial=0.0)) / scale
            assert error <= tolerance, f"relative error {error:.3g}"
        else:
            assert (a == b).all(), f"{a}\n{b}"
