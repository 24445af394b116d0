"""ATen ops through the ONNX backend: traced small, run in ONNX Runtime at other sizes, compared with torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from seqc.backends.onnx import export
from seqc.emit import Emitter
from seqc.frontend.capture import capture
from seqc.frontend.signature import bind
from tests.backends.aten_math import MATH
from tests.backends.aten_moves import MOVES
from tests.helpers.onnx import assert_same, run, session

OPS = {**MOVES, **MATH}


class _Model(nn.Module):
    def __init__(self, ops: list[Callable[..., Any]]) -> None:
        super().__init__()
        self.ops = ops
        self.layers = nn.ModuleList([op for op in ops if isinstance(op, nn.Module)])

    def forward(self, *inputs: torch.Tensor) -> Any:
        return [op(*inputs) for op in self.ops]


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def compare(names: tuple[str, ...]) -> dict[str, str]:
    """Trace and compile these ops, which take the same inputs, as one model; what is wrong with each, by name."""
    torch.manual_seed(0)
    inputs = OPS[names[0]][1]
    model = _Model([OPS[name][0] for name in names]).eval()
    signature = bind(model, inputs(2, 5), None)
    sess = session(export(capture(model, signature, signature.trace_sizes()).program))
    wrong: dict[str, str] = {}
    for batch, length in ((1, 1), (2, 13)):
        given = inputs(batch, length)
        with torch.no_grad():
            expected = [flat(result) for result in model(*(x.clone() for x in given))]
        found = run(sess, given)
        for name, results in zip(names, expected, strict=True):
            part, found = found[: len(results)], found[len(results) :]
            try:
                assert_same(part, results)
            except AssertionError as error:
                wrong.setdefault(name, f"batch {batch}, length {length}: {error}")
    return wrong


def _groups() -> dict[str, tuple[str, ...]]:
    """Ops by the group they are compiled in: tracing costs a second per model, so alike ones share one."""
    by_inputs: dict[Any, list[str]] = {}
    for name, (_, inputs) in OPS.items():
        by_inputs.setdefault(inputs, []).append(name)
    alone = {"pad reflect"}  # torch itself refuses it at length 1
    groups: dict[str, tuple[str, ...]] = {}
    for names in by_inputs.values():
        names = [name for name in names if name not in alone]
        for i in range(0, len(names), 16):
            part = tuple(names[i : i + 16])
            groups.update(dict.fromkeys(part, part))
    return groups


GROUPS = _groups()


@functools.cache
def _compared(names: tuple[str, ...]) -> dict[str, str] | Exception:
    try:
        return compare(names)
    except Exception as error:
        return error


@pytest.mark.parametrize("name", GROUPS)
def test_op_agrees_with_torch_at_sizes_not_traced(name: str) -> None:
    wrong = _compared(GROUPS[name])
    if isinstance(wrong, Exception):  # some op of the group stops all: find out whether it is this one
        wrong = compare((name,))
    assert name not in wrong, wrong[name]


def test_pad_reflect_at_lengths_torch_takes() -> None:
    model = _Model([OPS["pad reflect"][0]])
    signature = bind(model, (torch.randn(2, 5, 4),), None)
    sess = session(export(capture(model, signature, signature.trace_sizes()).program))
    x = torch.randn(3, 11, 4)
    assert_same(run(sess, (x,)), flat(model(x)))


@pytest.mark.parametrize("axes", [[2], [-1, 2], [0, 1, 3], []])
def test_squeeze_of_several_axes_as_passes_write_it(axes: list[int]) -> None:
    model = _Model([lambda x: torch.relu(x[:, :, None, :1])])
    signature = bind(model, (torch.randn(2, 5, 4),), None)
    program = capture(model, signature, signature.trace_sizes()).program
    (node,) = program.output_nodes
    emit = Emitter(program.graph_module)
    with emit.before(program.output_node):
        squeezed = emit(torch.ops.aten.squeeze.dims, node, axes)
    program.output_node.args = ((squeezed,),)
    x = torch.randn(3, 7, 4)
    assert_same(run(session(export(program)), (x,)), [torch.relu(x[:, :, None, :1]).squeeze(axes)])


def test_expm1_keeps_its_digits_over_all_of_float32() -> None:
    class Expm1(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.expm1(x)

    signature = bind(Expm1(), (torch.randn(2, 5, 4),), None)
    sess = session(export(capture(Expm1(), signature, signature.trace_sizes()).program))
    sizes = torch.logspace(-30, math.log10(88.0), 20000)
    x = torch.cat([sizes, -sizes, -torch.logspace(2, 30, 100)]).reshape(1, -1, 4)
    (found,) = run(sess, (x,))
    exact = torch.expm1(x.double())
    assert float(((torch.from_numpy(found).double() - exact).abs() / exact.abs()).max()) < 5e-7
    ends = torch.tensor([[[0.0, torch.inf, -torch.inf, torch.nan], [100.0, -100.0, 89.0, -0.0]]])
    assert_same(run(sess, (ends,)), [torch.expm1(ends)])
