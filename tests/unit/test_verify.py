"""Each rule of the verifier refuses a Program that breaks it, and names the rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx

from seqc.errors import VerificationError
from seqc.ops.recurrence import is_recurrence
from seqc.program import Program, State
from seqc.verify import verify
from tests.helpers.programs import body_of, loop_program

aten = torch.ops.aten


@pytest.fixture(scope="module")
def valid() -> Program:
    def step(h, x, w, b):
        h = torch.tanh(x @ w + h + b)
        return h, h * 2

    return loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(5)], [torch.randn(4, 5), torch.randn(5)])


def loop_of(program: Program) -> fx.Node:
    (node,) = [n for n in program.graph.nodes if is_recurrence(n)]
    return node


def missing_value(p: Program) -> None:
    del p.output_nodes[0].meta["val"]


def strange_value(p: Program) -> None:
    next(n for n in p.graph.nodes if n.op == "call_function").meta["val"] = "text"


def weights_out_of_order(p: Program) -> None:
    p.weights = dict(reversed(p.weights.items()))


def input_without_port(p: Program) -> None:
    p.inputs = ()


def placeholder_behind_operation(p: Program) -> None:
    with p.graph.inserting_before(p.output_node):
        p.graph.placeholder("late").meta["val"] = p.input_nodes[0].meta["val"]
    p.inputs = (*p.inputs, p.inputs[0])


def argument_comes_later(p: Program) -> None:
    loop = loop_of(p)
    loop.prev.prev.append(loop)
    loop.append(loop.prev)


def argument_of_another_graph(p: Program) -> None:
    body = body_of(p)
    foreign = next(n for n in p.graph.nodes if n.op == "call_function")
    node = next(n for n in body.graph.nodes if n.op == "call_function")
    node.args = (foreign, *node.args[1:])


def nested_output(p: Program) -> None:
    p.output_node.args = ((tuple(p.output_nodes),),)


def literal_output(p: Program) -> None:
    p.output_node.args = ((*p.output_nodes[1:], 3),)


def unknown_function(p: Program) -> None:
    node = next(n for n in body_of(p).graph.nodes if n.target is aten.tanh.default)
    node.target = torch.tanh


def method_call(p: Program) -> None:
    node = p.output_nodes[0]
    with p.graph.inserting_after(node):
        p.graph.call_method("tanh", (node,)).meta["val"] = node.meta["val"]


def weight_shape(p: Program) -> None:
    name = next(iter(p.weights))
    p.weights[name] = p.weights[name].t()


def port_rank(p: Program) -> None:
    p.outputs = (dataclasses.replace(p.outputs[0], shape=("batch",)), *p.outputs[1:])


def port_dtype(p: Program) -> None:
    p.outputs = (dataclasses.replace(p.outputs[0], dtype=torch.float64), *p.outputs[1:])


def port_dimension(p: Program) -> None:
    p.inputs = (dataclasses.replace(p.inputs[0], shape=("sequence", "batch", 4)), *p.inputs[1:])


def port_missing(p: Program) -> None:
    p.outputs = p.outputs[1:]


def state_without_ports(p: Program) -> None:
    p.states = (State("h", "h_next", torch.zeros(1, 4), batch_axis=0),)


def state_of_another_type(p: Program) -> None:
    given, following = p.inputs[-1], p.outputs[-1]
    p.states = (State(given.name, following.name, torch.zeros([1] * len(given.shape), dtype=torch.float64), None),)


def too_few_values_for_body(p: Program) -> None:
    loop = loop_of(p)
    loop.args = (*loop.args[:4], (), *loop.args[5:])


def carry_changes_shape(p: Program) -> None:
    out = body_of(p).graph.output_node()
    (x,) = [n for n in body_of(p).graph.nodes if n.op == "placeholder"][1:2]
    out.args = ((x, *out.args[0][1:]),)


def time_not_leading(p: Program) -> None:
    loop = loop_of(p)
    loop.args = (*loop.args[:3], (p.input_nodes[0],), *loop.args[4:])


def wrong_results(p: Program) -> None:
    loop_of(p).meta["val"] = loop_of(p).meta["val"][:1]


def result_used_whole(p: Program) -> None:
    loop = loop_of(p)
    with p.graph.inserting_after(loop):
        p.graph.call_function(aten.stack.default, (loop,)).meta["val"] = p.output_nodes[0].meta["val"]


def duplicate_name(p: Program) -> None:
    nodes = [n for n in p.graph.nodes if n.op == "call_function"]
    nodes[1].name = nodes[0].name


@pytest.mark.parametrize(
    ("rule", "breaks"),
    [
        ("values", missing_value),
        ("values", strange_value),
        ("placeholders", weights_out_of_order),
        ("placeholders", input_without_port),
        ("placeholders", placeholder_behind_operation),
        ("arguments", argument_comes_later),
        ("arguments", argument_of_another_graph),
        ("output", nested_output),
        ("output", literal_output),
        ("targets", unknown_function),
        ("targets", method_call),
        ("weights", weight_shape),
        ("ports", port_rank),
        ("ports", port_dtype),
        ("ports", port_dimension),
        ("ports", port_missing),
        ("states", state_without_ports),
        ("states", state_of_another_type),
        ("recurrences", too_few_values_for_body),
        ("recurrences", carry_changes_shape),
        ("recurrences", time_not_leading),
        ("recurrences", wrong_results),
        ("recurrences", result_used_whole),
        ("lint", duplicate_name),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_a_broken_program_is_refused(valid: Program, rule: str, breaks: Callable[[Program], None]) -> None:
    broken = valid.copy()
    breaks(broken)
    with pytest.raises(VerificationError, match=f"rule {rule}"):
        verify(broken)


def test_a_valid_program_passes(valid: Program) -> None:
    verify(valid)
    verify(valid.copy())


def test_the_error_shows_the_node_among_its_neighbours(valid: Program) -> None:
    broken = valid.copy()
    loop = loop_of(broken)
    loop.meta["stack_trace"] = 'File "model.py", line 7, in forward\n    for t in range(n):'
    wrong_results(broken)
    with pytest.raises(VerificationError) as caught:
        verify(broken)
    first, *shown = str(caught.value).splitlines()
    assert "recurrence" in first and "model.py:7" in first
    assert len(shown) == 5 and shown[2].startswith("  > ")


def test_equal_sizes_in_different_spelling_are_accepted(valid: Program) -> None:
    program = valid.copy()
    program.outputs = (
        program.outputs[0],
        dataclasses.replace(program.outputs[1], shape=("(2*sequence)//2", "batch", 5)),
    )
    verify(program)
