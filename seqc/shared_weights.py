"""Several ONNX models that store their weights in one file, equal ones once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

# Small tensors stay in the model: shape inference reads the values of shapes, axes and indices.
INLINE_TENSOR_BYTES = 1024
# Whole pages, so that onnxruntime can map weights instead of copying them; small ones would leave the file mostly empty.
PAGE = 65536
_LINE = 64


def write_sharing(directory: Path, models: Mapping[str, ir.Model], data_file: str) -> None:
    """Write each of ``models`` under its file name, and all their weights into ``data_file``; the models stay as they are."""
    places: dict[tuple[str, ir.DataType, tuple[object, ...]], tuple[int, int]] = {}
    originals: list[tuple[ir.Value, ir.TensorProtocol]] = []
    with (directory / data_file).open("wb") as data:
        for model in models.values():
            for value, tensor in _large(model):
                content = tensor.tobytes()
                key = (hashlib.sha256(content).hexdigest(), tensor.dtype, tuple(tensor.shape))
                if key not in places:
                    step = PAGE if len(content) >= PAGE else _LINE
                    data.write(b"\0" * (-data.tell() % step))
                    places[key] = (data.tell(), len(content))
                    data.write(content)
                originals.append((value, tensor))
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    data_file,
                    offset,
                    length,
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]
                    name=value.name or "",
                    base_dir=directory,
                )
    try:
        for name, model in models.items():
            ir.save(model, directory / name)
    finally:
        for value, tensor in originals:
            value.const_value = tensor


def _large(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > INLINE_TENSOR_BYTES:
                yield value, tensor
