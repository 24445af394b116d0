"""States whose rows are not along the first axis (those of ONNX's LSTM and GRU), put so that they are."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import helper

from seqc.runtime.states import StatePort

SUFFIX = ".batch_first"


def rows_inside(state: StatePort) -> bool:
    """Whether the rows of ``state`` are along another axis than the first."""
    return bool(state.batch_axis)


def put_batch_first(model: onnx.ModelProto, states: Iterable[StatePort]) -> None:
    """Let ``model`` take and give these states with the axis of the rows first, under names that end in ``SUFFIX``.

    past [1, batch, n] -> ...        becomes   past.batch_first [batch, 1, n] -> Transpose -> past [1, batch, n] -> ...
    """
    graph = model.graph
    for state in states:
        rank, rows = len(state.port.shape), int(state.batch_axis or 0)
        outward = [rows, *(axis for axis in range(rank) if axis != rows)]
        inward = [outward.index(axis) for axis in range(rank)]
        given, following = state.port.name, state.following
        _rename(graph.input, given, outward)
        _rename(graph.output, following, outward)
        graph.node.insert(0, helper.make_node("Transpose", [given + SUFFIX], [given], given + SUFFIX, perm=inward))
        graph.node.append(
            helper.make_node("Transpose", [following], [following + SUFFIX], following + SUFFIX, perm=outward)
        )


def _rename(values: Iterable[onnx.ValueInfoProto], name: str, axes: list[int]) -> None:
    (value,) = (value for value in values if value.name == name)
    dims = list(value.type.tensor_type.shape.dim)
    value.name = name + SUFFIX
    del value.type.tensor_type.shape.dim[:]
    value.type.tensor_type.shape.dim.extend(dims[axis] for axis in axes)
