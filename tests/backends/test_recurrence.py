"""``seqc::recurrence`` as ONNX Scan, at lengths that were not traced, one and none included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import pytest
import torch
import torch.fx as fx

from seqc.backends.onnx import export
from seqc.program import Program
from tests.helpers.loops import loop_program, splice, step_module
from tests.helpers.onnx import assert_same, run, session

D = 4
DYNAMIC = {"input_0": {0: "batch", 1: "sequence"}}
SIZES = ((1, 1), (2, 2), (3, 13))


def agree(program: Program, sizes: Sequence[tuple[int, int]] = SIZES, opset: int = 20) -> ir.Model:
    model = export(program, opset)
    sess = session(model)
    for batch, length in sizes:
        x = torch.randn(batch, length, D)
        assert_same(run(sess, (x,)), program(x))
    return model


def ops(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def scan_of(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if node.op_type == "Scan")


def from_zero(x: torch.Tensor, *weights: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x.new_zeros(x.shape[0], D), x.transpose(0, 1), *weights, *named.values())


def peeled(x: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x[:, 0], x[:, 1:].transpose(0, 1), *named.values())


def rnn_step(h: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = torch.tanh(h @ w + x)
    return h, h * 2


def rnn(outer: Callable[..., Any], reverse: bool = False) -> Program:
    torch.manual_seed(0)
    weights = {"w": torch.randn(D, D)}
    return loop_program(
        outer, (torch.randn(2, 7, D),), DYNAMIC, rnn_step, carries=1, xs=1, reverse=reverse, weights=weights
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_loop_over_time_becomes_one_plain_scan(reverse: bool) -> None:
    model = agree(rnn(from_zero, reverse))
    assert ops(model.graph).count("Scan") == 1
    assert "If" not in ops(model.graph)
    assert not model.functions


def test_weight_used_by_the_body_is_captured_not_carried() -> None:
    model = agree(rnn(from_zero))
    scan = scan_of(model)
    assert len(scan.inputs) == 2
    assert "w" in model.graph.initializers
    assert not scan.attributes["body"].as_graph().initializers


@pytest.mark.parametrize("reverse", [False, True])
def test_loop_that_may_make_no_step_returns_the_initial_carry_and_empty_results(reverse: bool) -> None:
    program = rnn(peeled, reverse)
    model = agree(program)  # SIZES holds length 1: no step
    assert "If" in ops(model.graph)
    x = torch.randn(2, 1, D)
    final, steps = run(session(model), (x,))
    assert steps.shape == (0, 2, D)
    assert (final == x[:, 0].numpy()).all()


def test_no_if_where_the_range_proves_a_step() -> None:
    dynamic = {"input_0": {0: "batch", 1: torch.export.Dim("sequence", min=2)}}
    weights = {"w": torch.randn(D, D)}
    program = loop_program(peeled, (torch.randn(2, 7, D),), dynamic, rnn_step, carries=1, xs=1, weights=weights)
    model = agree(program, sizes=((1, 2), (2, 9)))
    assert "If" not in ops(model.graph)


@pytest.mark.parametrize("reverse", [False, True])
def test_several_carries_inputs_and_results_of_several_types(reverse: bool) -> None:
    def outer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zero = x.new_zeros(x.shape[0], D)
        count = torch.zeros(x.shape[0], dtype=torch.int64)
        return zero, count, x.transpose(0, 1), (x > 0).any(-1).transpose(0, 1), x.mean(1)

    def step(h: torch.Tensor, n: torch.Tensor, x: torch.Tensor, on: torch.Tensor, bias: torch.Tensor) -> Any:
        h = torch.where(on[:, None], 0.9 * h + x + bias, h)
        n = n + on
        return h, n, h.sum(-1), n, on

    agree(loop_program(outer, (torch.randn(2, 7, D),), DYNAMIC, step, carries=2, xs=2, reverse=reverse))


def test_body_results_that_are_its_inputs_or_an_invariant() -> None:
    def outer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.new_zeros(x.shape[0], D), x.transpose(0, 1), x.sum(1)

    def step(h: torch.Tensor, x: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x, h, x, c  # the last input, shifted; the same value twice; a value from outside

    agree(loop_program(outer, (torch.randn(2, 7, D),), DYNAMIC, step, carries=1, xs=1))


def test_final_carries_without_results_per_step() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (0.5 * h + x,)

    agree(loop_program(from_zero, (torch.randn(2, 7, D),), DYNAMIC, step, carries=1, xs=1))


def test_results_per_step_without_carries() -> None:
    def outer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.transpose(0, 1),)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.softmax(-1),)

    agree(loop_program(outer, (torch.randn(2, 7, D),), DYNAMIC, step, carries=0, xs=1))


@pytest.mark.parametrize("outer", [from_zero, peeled])
def test_loop_inside_a_loop(outer: Callable[..., Any]) -> None:
    """Each step runs an inner loop over the batch of its own input, whose length is a symbol too."""

    def inner_inputs(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return h.sum(0), x, h

    def inner_step(total: torch.Tensor, row: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = torch.tanh(total + row + h.mean(0))
        return total, total * 2

    def body(values: Sequence[Any]) -> fx.GraphModule:
        gm = step_module(inner_inputs, values)
        inner_values = [n.meta["val"] for n in gm.graph.output_node().args[0]]
        with inner_values[0].fake_mode:
            inner_values[1] = inner_values[1].select(0, 0)
        splice(gm, step_module(inner_step, inner_values), carries=1, xs=1)
        total, rows = gm.graph.output_node().args[0]
        with gm.graph.inserting_before(gm.graph.output_node()):
            new = gm.graph.call_function(torch.ops.aten.add.Tensor, (rows, total))
        gm.graph.output_node().args = ((new, rows),)
        gm.recompile()
        return gm

    agree(loop_program(outer, (torch.randn(2, 7, D),), DYNAMIC, body, carries=1, xs=1, nested=True))


def test_results_whose_size_is_computed_from_symbols_are_empty_of_the_right_shape_without_steps() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = h + x
        return h, torch.cat([h, x], 0)  # [2 * batch, D]

    model = agree(loop_program(peeled, (torch.randn(2, 7, D),), DYNAMIC, step, carries=1, xs=1))
    assert run(session(model), (torch.randn(3, 1, D),))[1].shape == (0, 6, D)


def test_work_that_no_step_changes_leaves_the_body() -> None:
    def step(h: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = torch.tanh(torch.nn.functional.linear(h[:, None], w)[:, 0] + x)
        return h, h

    weights = {"w": torch.randn(D, D)}
    program = loop_program(from_zero, (torch.randn(2, 7, D),), DYNAMIC, step, carries=1, xs=1, weights=weights)
    model = agree(program)
    assert "Transpose" not in ops(scan_of(model).attributes["body"].as_graph())


def test_every_value_has_one_name_in_the_whole_model() -> None:
    model = agree(rnn(peeled))
    names = [value.name for node in model.graph.all_nodes() for value in node.outputs]
    names += [v.name for graph in model.graphs() for v in (*graph.inputs, *graph.initializers.values())]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("opset", [18, 21, 24])
def test_loops_at_every_kind_of_opset(opset: int) -> None:
    agree(rnn(peeled), opset=opset)
