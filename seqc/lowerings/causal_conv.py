"""Forms of ``seqc::causal_conv``."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import STANDARD_DTYPES, Lowering, Refused, size_of
from seqc.ops.causal_conv import reach
from seqc.program import named_args

aten = torch.ops.aten

MOST_TAPS = 32
"""Beyond, one Conv is less work to compile than a product for each tap."""


def conv(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """One convolution; without a state the zeros are its padding, and the line is written for the final state only."""
    x, weight, bias, state, dilation = named_args(node).values()
    steps = reach(weight.meta["val"], dilation)
    line, left = (x, steps) if state is None else (emit(aten.cat.default, [state, x], 2), 0)
    y = emit(torch.ops.seqc.left_padded_conv.default, line, weight, bias, left, dilation)
    if not any(reader.args[1] == 1 for reader in node.users):
        return [y, y]
    if state is None:
        before = emit(aten.new_zeros.default, x, [size_of(emit, x, 0), size_of(emit, x, 1), steps])
        line = emit(aten.cat.default, [before, x], 2)
    first = size_of(emit, x, 2)
    length = first + steps if isinstance(first, int) else emit(operator.add, first, steps)
    return [y, emit(aten.slice.Tensor, line, 2, first, length)]


def taps(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """A sum of shifted products, which TensorRT fuses into one kernel with what is around it.

    Its builder (1.7.1 of the package for RTX) fails on the branch for single steps that ``conv`` has in the graph.
    """
    x, weight, bias, state, dilation = named_args(node).values()
    count = weight.meta["val"].shape[2]
    if count > MOST_TAPS:
        raise Refused(f"{count} taps, more than {MOST_TAPS}")
    steps = reach(weight.meta["val"], dilation)
    if state is None:
        state = emit(aten.new_zeros.default, x, [size_of(emit, x, 0), size_of(emit, x, 1), steps])
    line, length = emit(aten.cat.default, [state, x], 2), size_of(emit, x, 2)
    column = emit(aten.permute.default, weight, [2, 0, 1])
    y = None
    for j in range(count):
        start = j * dilation
        end = length + start if isinstance(length, int) else emit(operator.add, length, start)
        part = emit(aten.slice.Tensor, line, 2, start, end)
        product = emit(aten.mul.Tensor, part, emit(aten.select.int, column, 0, j))
        y = product if y is None else emit(aten.add.Tensor, y, product)
    assert y is not None, "a convolution has a tap"
    if bias is not None:
        y = emit(aten.add.Tensor, y, emit(aten.unsqueeze.default, bias, 1))
    last = length + steps if isinstance(length, int) else emit(operator.add, length, steps)
    return [y, emit(aten.slice.Tensor, line, 2, length, last)]


def contrib(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """ONNX Runtime's CausalConvWithState, which has the same arguments."""
    arguments = named_args(node)
    if arguments["x"].meta["val"].dtype != torch.float32:
        raise Refused(f"com.microsoft.CausalConvWithState has no {arguments['x'].meta['val'].dtype} kernel on the CPU")
    call = emit(torch.ops.seqc.ort_causal_conv.default, *arguments.values())
    return [emit(operator.getitem, call, i) for i in (0, 1)]


def standard(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """ONNX's CausalConvWithState."""
    arguments = named_args(node)
    if arguments["dilation"] != 1:
        raise Refused("the operator of ONNX 27 has no dilation")
    if arguments["x"].meta["val"].dtype not in STANDARD_DTYPES:
        raise Refused(f"the operator of ONNX 27 does not take {arguments['x'].meta['val'].dtype}")
    call = emit(torch.ops.seqc.ort_causal_conv.default, *arguments.values(), True)
    return [emit(operator.getitem, call, i) for i in (0, 1)]


def _dilated(node: fx.Node) -> str:
    return "that kernels for GPUs take a dilation is not known" if named_args(node)["dilation"] != 1 else ""


LOWERINGS = (
    Lowering(
        "seqc::causal_conv",
        "conv",
        "one Conv padded in front; a single step is a product with the taps",
        conv,
    ),
    Lowering(
        "seqc::causal_conv",
        "contrib",
        "ONNX Runtime's fused operator CausalConvWithState",
        contrib,
        frozenset({"com.microsoft"}),
        cpu_only=_dilated,
    ),
    Lowering(
        "seqc::causal_conv",
        "standard",
        "the operator CausalConvWithState of ONNX 27",
        standard,
        opset=27,
    ),
    Lowering("seqc::causal_conv", "taps", "a shifted product for each tap: no branch for single steps", taps),
)
